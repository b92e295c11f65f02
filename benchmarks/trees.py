"""What does drafting a tree bring over a chain of as many tokens? tau of the embedded pair, printed as a table.

    python benchmarks/trees.py --drafters dspark,dflash,eagle3,draft

Every draft token is verified, and every text is compared with plain decoding, token by token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import prompts
from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.train.acceptance import Outcome

CHAIN = 7  # draft tokens: what the drafters of the pair were trained to propose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--drafters", default="dspark,dflash,eagle3,draft", help="names or folders")
    parser.add_argument("--sizes", default="7,15", help="draft tokens of a tree (default 7,15)")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--width", type=int, default=4, help="nodes read per layer (default 4)")
    parser.add_argument("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of ours)")
    parser.add_argument("--num-tokens", type=int, default=96)
    options = parser.parse_args()
    target = load_target(options.target, dtype="float32")
    wanted = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    encoded = [list(p.token_ids) for p in prompts.encode(wanted, target.tokenizer, max_prompt_tokens=400)]
    shapes: list[dict[str, Any]] = [{"length": CHAIN}]
    shapes += [{"length": CHAIN, "tree": int(size), "width": options.width} for size in options.sizes.split(",")]
    columns = [f"chain of {CHAIN}", *(f"tree of {shape['tree']}" for shape in shapes[1:])]
    print(f"| drafter | temperature | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for temperature in map(float, options.temperatures.split(",")):
        params = [
            SamplingParams(temperature=temperature, max_tokens=options.num_tokens, seed=i, ignore_eos=True)
            for i in range(len(encoded))
        ]
        plain = [g.token_ids for g in Engine(target).generate(encoded, params)]
        for name in options.drafters.split(","):
            cells = []
            for shape in shapes:
                engine = Engine(target, load_drafter(name, target, **shape), f"fixed:{CHAIN}")
                generations = engine.generate(encoded, params)
                if [g.token_ids for g in generations] != plain:
                    raise SystemExit(f"{name} with {shape} wrote another text than plain decoding")
                outcome = Outcome([[r.accepted for r in g.rounds] for g in generations], engine.drafter.length)
                cells.append(f"{outcome.tau:.2f} ± {outcome.standard_error:.2f}")
            print(f"| {name} | {temperature:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
