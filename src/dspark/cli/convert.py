"""Write a drafter's checkpoint as another stack reads it.

    dspark convert my_drafter --to speculators --out my_drafter-for-vllm --target path/or/hub-id

Reads DeepSpec, SpecForge, EAGLE, speculators and this project's own. Every tensor stays as it is, bit for bit.
"""

from __future__ import annotations

import argparse

from dspark.cli.models import quiet_weights
from dspark.cli.terminal import print_json, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or hub id of a drafter; dspark, dflash, eagle3")
    parser.add_argument(
        "--to",
        required=True,
        choices=("deepspec", "speculators", "specforge", "dspark"),
        help="speculators: as vLLM loads it; dspark: this project's own, without copies of the target's tables",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--target", help="its target, where embedding and head must be added or left out")
    parser.add_argument("--verifier", metavar="NAME", help="what the config calls the target (speculators)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    from dspark.checkpoints import open_checkpoint
    from dspark.checkpoints.convert import convert
    from dspark.cli.info import checkpoint_path

    source, target = open_checkpoint(checkpoint_path(args.source)), None
    if args.target is not None:
        with progress(f"loading {args.target}", args.no_color):
            from dspark import load_target

            quiet_weights(args.target)
            target = load_target(args.target)
    done = convert(source, args.to, args.out, target, args.verifier)
    if args.json:
        print_json(vars(done))
        return 0
    print(f"{done.written_by} -> {done.to}: {done.num_tensors} tensors, {done.num_bytes / 1e6:.1f} MB in {done.folder}")
    for what, names in (("added", done.added), ("left out", done.left_out)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return 0
