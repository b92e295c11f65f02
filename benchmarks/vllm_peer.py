"""vLLM's side of the benchmark. Runs under vLLM's own interpreter, loads once, then answers JSON lines.

    {"prompts": [[ids], ...], "num_tokens": 200, "temperature": 0.0, "seed": 0}
    {"token_ids": [[ids], ...], "seconds": 0.4}

Needs nothing but the standard library and vLLM; the other side is `contenders.Vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--ngram", type=int, default=0, help="draft tokens by prompt lookup; 0: none")
    options = parser.parse_args()

    # vLLM and its worker processes print to standard output: keep that stream for replies and give them the log.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import vllm

    llm = vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        enforce_eager=options.eager,
        enable_prefix_caching=False,  # prompts come back in every repeat: nobody may remember them
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": options.ngram,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
        if options.ngram
        else None,
    )
    print(json.dumps({"ready": True, "version": vllm.__version__}), file=replies)
    for line in sys.stdin:
        order = json.loads(line)
        params = vllm.SamplingParams(
            temperature=order["temperature"],
            seed=order["seed"] if order["temperature"] > 0 else None,
            max_tokens=order["num_tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(
            json.dumps({"token_ids": [list(o.outputs[0].token_ids) for o in outputs], "seconds": seconds}), file=replies
        )


if __name__ == "__main__":
    main()
