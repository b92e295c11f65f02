"""Everyone who takes part: our engine with each drafter, transformers' modes, vLLM in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Run
from dspark import SamplingParams

PLAIN = "ours: plain"

_PEER = Path(__file__).with_name("vllm_peer.py")


class Ours:
    """Our engine with one drafter."""

    family = "ours"

    def __init__(self, name: str, engine: Any, max_requests: int = 1_000) -> None:
        self.name, self.engine, self.max_requests = name, engine, max_requests
        self.is_speculative = name != PLAIN

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int) -> Run:
        params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=seed)
        # As `generate` does it. Nobody observes the engine: that would be timed as well.
        steps: list[tuple[bool, dict[str, float]]] = []
        start = time.perf_counter()
        requests = [self.engine.submit(list(p), params) for p in prompts]
        while any(r.finish_reason is None for r in requests):
            record = self.engine.step()
            steps.append((record.num_prompt_tokens > 0, record.seconds))
        generations = [self.engine.result(r) for r in requests]
        seconds = time.perf_counter() - start
        decoding = [spent for is_reading, spent in steps if not is_reading]
        phases: dict[str, float] = defaultdict(float)
        for step in decoding:
            for phase, spent in step.items():
                phases[phase] += spent
        in_steps = sum(sum(spent.values()) for _, spent in steps)
        phases["between steps"] = (seconds - in_steps) * len(decoding) / max(1, len(steps))
        return Run(
            token_ids=[list(g.token_ids) for g in generations],
            seconds=seconds,
            seeds=[g.seed for g in generations],
            rounds=[[(r.drafted, r.verified, r.accepted) for r in g.rounds] for g in generations],
            phases=dict(phases),
            num_steps=len(decoding),
        )

    def own_length(self, prompt: Sequence[int], most: int, temperature: float, seed: int) -> int:
        """How many tokens the text has when it may end by itself, its end token included."""
        params = SamplingParams(temperature=temperature, max_tokens=most, seed=seed)
        return len(self.engine.generate([list(prompt)], params)[0].token_ids)

    def close(self) -> None:
        pass


class Transformers:
    """`generate` in one of its modes: greedy, prompt lookup, or assisted by a draft LM."""

    family = "transformers"

    def __init__(self, name: str, model: Any, assistant: Any = None, max_requests: int = 1_000, **mode: Any) -> None:
        self.name, self.model, self.assistant, self.mode, self.max_requests = name, model, assistant, mode, max_requests
        self.is_speculative = assistant is not None or "prompt_lookup_num_tokens" in mode

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int) -> Run:
        width = max(map(len, prompts))
        device = self.model.device
        input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        mode = dict(self.mode, do_sample=temperature > 0)
        if temperature > 0:
            torch.manual_seed(seed)
            mode |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if self.assistant is not None:
            mode["assistant_model"] = self.assistant
        start = time.perf_counter()
        output = self.model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=num_tokens, **mode)
        seconds = time.perf_counter() - start
        return Run(token_ids=output[:, width:].tolist(), seconds=seconds)

    def close(self) -> None:
        pass


def load_for_transformers(source: str, dtype: str) -> Any:
    """A causal LM that never stops at an end token: suppressing the token instead would change the text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0  # masked out; any id does
    return model


class Vllm:
    """vLLM in a process of its own, stopped (SIGSTOP) while others run: its idle workers would poll."""

    family = "vllm"

    def __init__(
        self,
        name: str,
        python: Path,
        source: str,
        dtype: str,
        num_threads: int,
        max_requests: int,
        log: Path,
        is_eager: bool = False,
        num_ngram_tokens: int = 0,
        preload: Sequence[Path] = (),
    ) -> None:
        """Starts loading and returns at once; `wait_until_ready` waits for it.

        preload: shared libraries to load first. vLLM asks for Intel's OpenMP, which comes with its package and is found
        beside the interpreter, and for tcmalloc, which does not.
        """
        self.name, self.max_requests, self.is_speculative = name, max_requests, num_ngram_tokens > 0
        command = [
            str(python),
            str(_PEER),
            "--model",
            source,
            "--dtype",
            dtype,
            "--max-num-seqs",
            str(max_requests),
        ]
        command += ["--eager"] if is_eager else []
        command += ["--ngram", str(num_ngram_tokens)] if num_ngram_tokens else []
        openmp = python.parent.parent / "lib" / "libiomp5.so"
        libraries = [str(p) for p in (*preload, openmp) if p.exists()]
        environment = os.environ | {
            "LD_PRELOAD": ":".join(libraries),
            # "auto" sets one core aside for the scheduler; with two cores all of them do more
            "VLLM_CPU_OMP_THREADS_BIND": _core_list(num_threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.log = log
        with log.open("wb") as log_file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env=environment,
                start_new_session=True,  # so that its workers can be stopped with it
            )
        self.version = ""

    def wait_until_ready(self) -> None:
        self.version = self._read()["version"]
        os.killpg(self.process.pid, signal.SIGSTOP)

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int) -> Run:
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            short = min(8, num_tokens)
            self._ask(prompts, short, temperature, seed)  # untimed: gets its processes back on the cores
            reply = self._ask(prompts, num_tokens, temperature, seed)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGSTOP)
        return Run(token_ids=reply["token_ids"], seconds=reply["seconds"])

    def _ask(self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        order = {
            "prompts": [list(p) for p in prompts],
            "num_tokens": num_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(
                f"{self.name} ended with status {self.process.wait()}; the last lines of {self.log}:\n{last}"
            )
        return json.loads(line)

    def close(self) -> None:
        """Asks it to end, then ends what is left of its group."""
        assert self.process.stdin is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _core_list(num_threads: int) -> str:
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    return ",".join(map(str, cores))
