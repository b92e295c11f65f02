"""What drafting over a view of the cache (`sparse`, MagicDec) costs and brings, next to plain decoding in the same run.

    python benchmarks/sparse.py

First what a draft step, a plain step and a verification cost by context, on the embedded target and on a larger random
one, in seconds of this thread's processor; the keys are of no text, because their values cost nothing. rho is a draft
step over a plain one. MagicDec's condition for a gain is an acceptance above rho, where reading a draft costs no more than
reading one token; `needs` is the acceptance above which it pays at the measured cost of reading it. Then what is accepted
on long conversations of the embedded target, and what a token took.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.prompts import built_in
from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.target import native
from dspark.target.plan import View
from dspark.target.target import Target
from dspark.types import Span

SINKS, LENGTHS = 4, (1, 2, 4)


def larger(dtype: torch.dtype) -> Target:
    """A Llama of 39 million random weights."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    return Target(AutoModelForCausalLM.from_config(config, dtype=dtype), name="larger")


def seconds(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Lower quartile of each call, in turns; by the thread's clock, so others on the machine count little."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            taken[name].append(time.thread_time() - begin)
    return {name: statistics.quantiles(times, n=4)[0] for name, times in taken.items()}


def fill(target: Target, requests: int, context: int) -> None:
    """Give so many requests a context that nobody has read, in memory that was written to: else it need not be there."""
    for request in range(requests):
        target.cache.reserve(request, context)
    for tensor in (tensor for pair in target.cache.storage.values() for tensor in pair):
        tensor.fill_(0.5)


def reading(target: Target, requests: int, context: int, num_tokens: int) -> Callable[[], None]:
    """A forward of so many tokens of each request, forgotten again."""
    spans = [Span(request, context, (5,) * num_tokens, num_logits=num_tokens) for request in range(requests)]

    def read() -> None:
        target.extend(spans)
        for span in spans:
            target.keep(span.request_id, span.start, ())

    return read


def least_acceptance(length: int, draft: float, verify: float) -> float:
    """Acceptance of each token above which drafts of that length pay; costs in plain steps. Above 1: none."""
    cost = length * draft + verify
    low, high = 0.0, 1.01
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if sum(middle**i for i in range(length + 1)) > cost else (middle, high)
    return high


def report_steps(target: Target, contexts: Iterable[int], loads: Iterable[int], window: int, repeats: int) -> None:
    print(
        f"\n| {target.name} | context | plain step, ms | draft step, ms | rho | verify 1 + 4, in plain steps | needs |"
    )
    print("|---|---|---|---|---|---|---|")
    reading(target, 1, 0, 1)()  # its keys and values appear with the first forward
    for requests in loads:
        for context in contexts:
            fill(target, requests, context)
            calls = {"draft": reading(target.seeing(View(SINKS, window)), requests, context, 1)}
            calls |= {str(n): reading(target, requests, context, 1 + n) for n in (0, *LENGTHS)}
            took = seconds(calls, repeats)
            plain, draft = took["0"], took["draft"]
            needs = min(least_acceptance(n, draft / plain, took[str(n)] / plain) for n in LENGTHS)
            cells = (1e3 * plain, 1e3 * draft, draft / plain, took["4"] / plain)
            print(f"| {requests} request{'s' * (requests > 1)} | {context} | ", end="")
            print(
                *(f"{cell:.2f}" for cell in cells), f"{needs:.2f} |" if needs <= 1 else "never |", sep=" | ", flush=True
            )
            for request in range(requests):
                target.release(request)


def conversations(target: Target, count: int, num_tokens: int) -> list[list[int]]:
    """Of the built-in questions and the target's answers, each as long, beginning at another question."""
    turns = [[{"role": "user", "content": prompt.text}] for prompt in built_in()]
    answers = Engine(target).generate(turns, SamplingParams(temperature=0, max_tokens=80))
    for turn, answer in zip(turns, answers, strict=True):
        turn.append({"role": "assistant", "content": answer.text})
    found = []
    for first in range(count):
        messages: list[dict[str, str]] = []
        text: list[int] = []
        for i in range(first * 5, first * 5 + 2 * len(turns)):
            question, answer = turns[i % len(turns)]
            template = target.tokenizer.apply_chat_template
            text = template([*messages, question], add_generation_prompt=True, return_dict=True)["input_ids"]
            if len(text) > num_tokens:
                break
            messages += [question, answer]
        found.append(text)
    return found


def decode(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], list, float]:
    """Token ids, rounds, and seconds for each token once the prompts are read, which they are in one step."""
    requests = [engine.submit(prompt, params) for prompt in prompts]
    while any(not request.generated for request in requests):
        engine.step()
    num_before, begin = sum(len(request.generated) for request in requests), time.thread_time()
    while engine.has_work:
        engine.step()
    num_after = sum(len(request.generated) for request in requests)
    rounds = [round_ for request in requests for round_ in request.rounds]
    return [r.generated for r in requests], rounds, (time.thread_time() - begin) / (num_after - num_before)


def report_texts(
    target: Target, windows: Iterable[int], length: int, temperatures: Iterable[float], num_tokens: int, repeats: int
) -> None:
    prompts = conversations(target, 8, 1500)
    low, high = min(map(len, prompts)), max(map(len, prompts))
    print(f"\nThe embedded target after conversations of {low} to {high} tokens, drafts of {length}:\n")
    print(
        "| temperature | window | accepted of those judged | tokens per pass | ms per token, 1 request | 8 requests |"
    )
    print("|---|---|---|---|---|---|")
    drafters = {w: load_drafter("sparse", target, window=w, sinks=SINKS, length=length) for w in windows}
    for temperature in temperatures:
        params = SamplingParams(temperature=temperature, max_tokens=num_tokens, seed=1, ignore_eos=True)
        texts, rounds = {}, {}
        alone: dict[int, list[float]] = {}
        together: dict[int, list[float]] = {}
        for _ in range(repeats):
            for window in (0, *drafters):
                engine = Engine(target, drafters.get(window), f"fixed:{length}", max_num_batched_tokens=8 * high)
                texts[window], rounds[window], took = decode(engine, prompts, params)
                together.setdefault(window, []).append(took)
                alone.setdefault(window, []).append(sum(decode(engine, [p], params)[2] for p in prompts[:3]) / 3)
        for window in (0, *drafters):
            if texts[window] != texts[0]:
                raise SystemExit(f"with a window of {window} another text was written than by plain decoding")
            accepted, reached = (sum(getattr(r, name) for r in rounds[window]) for name in ("accepted", "reached"))
            alpha, tau = f"{accepted / reached:.3f}" if reached else "", 1 + accepted / len(rounds[window])
            cells = (f"{temperature:g}", f"{window or 'plain decoding'}", alpha, f"{tau:.2f}")
            times = (f"{1e3 * min(taken[window]):.2f}" for taken in (alone, together))
            print("|", " | ".join((*cells, *times)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="tiny,larger,texts")
    parser.add_argument("--contexts", default="256,1024,4096,16384")
    parser.add_argument("--requests", default="1,8")
    parser.add_argument("--windows", default="64,128,256")
    parser.add_argument("--window", type=int, default=512, help="of the steps that are timed")
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=96)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    native.load()
    contexts, loads, windows = (
        [int(n) for n in text.split(",")] for text in (options.contexts, options.requests, options.windows)
    )
    for part in options.parts.split(","):
        target = larger(torch.bfloat16) if part == "larger" else load_target("tiny", dtype="float32", device="cpu")
        target.resize(max(loads) * (max(contexts) + 16))
        if not options.no_compile:
            target.compile()
        if part == "texts":
            temperatures = [float(t) for t in options.temperatures.split(",")]
            report_texts(target, windows, options.length, temperatures, options.num_tokens, repeats=2)
        else:
            report_steps(target, contexts, loads, options.window, repeats=12)


if __name__ == "__main__":
    main()
