"""transformers on the same weights, in the same process: generate, its compiled mode, and its continuous batching."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig

from benchmarks.contenders import Transformers
from benchmarks.gpu_sections import random_prompts, sharing_weights
from benchmarks.measure import Contender, Run
from dspark.target.target import Target

_PAGE = 256  # tokens


class ContinuousBatching:
    """`generate_batch`, with a cache for what it is asked at most: left alone it takes all memory there is."""

    family, is_speculative, name = "transformers", False, "transformers continuous batching"

    def __init__(self, model: Any, max_requests: int, tokens_per_request: int) -> None:
        self.model, self.max_requests = model, max_requests
        num_blocks = max_requests * math.ceil(tokens_per_request / _PAGE) + 16
        self.settings = ContinuousBatchingConfig(page_size=_PAGE, num_blocks=num_blocks, max_batch_tokens=2048)

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int) -> Run:
        wanted = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        outputs = self.model.generate_batch(
            [list(p) for p in prompts],
            generation_config=wanted,
            continuous_batching_config=self.settings,
            persistent_manager=self.model.device.type == "cuda",  # its graphs outlast a call
            warmup=self.model.device.type == "cuda",
        )
        seconds = time.perf_counter() - start
        return Run([list(output.generated_tokens) for output in outputs.values()], seconds)

    def close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()


def peers(
    target: Target,
    wanted: Sequence[str],
    max_requests: int,
    num_prompt_tokens: int,
    num_tokens: int,
    say: Callable[[str], None],
) -> tuple[list[Contender], list[str]]:
    """Those of eager, compiled and continuous that are wanted and work here, and what became of the others.

    Compiled is for one request: every other number of them would be compiled anew.
    """
    found: list[Contender] = []
    skipped: list[str] = []
    for mode in wanted:
        model = sharing_weights(target.model)
        model.set_attn_implementation("sdpa")
        if mode == "eager":
            peer: Contender = Transformers("transformers generate", model)
        elif mode == "compiled":
            settings = CompileConfig(mode="reduce-overhead")
            settings._compile_all_devices = True
            mode_options = {"cache_implementation": "static", "compile_config": settings}
            peer = Transformers("transformers compiled", model, max_requests=1, **mode_options)
        else:
            peer = ContinuousBatching(model, max_requests, num_prompt_tokens + num_tokens)
        say(f"trying {peer.name}")
        try:
            peer.run([p.token_ids for p in random_prompts(target, 1, num_prompt_tokens)], num_tokens, 0.0, 0)
        except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            skipped.append(f"{peer.name}: {reason[0]}")
            continue
        found.append(peer)
    return found, skipped
