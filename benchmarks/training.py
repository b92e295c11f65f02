"""Training tokens per second and peak memory, against a plain loop with dense losses.

    python -m benchmarks.training --repeats 3

Both train the same drafter on the same batches from the same start, in float32, with the same anchors and AdamW. The
plain loop is what one writes first: logits of the drafter and of the target for all positions of all blocks at once,
softmax, differences, autograd. Each runs in a process of its own, because peak memory is the process's; they take turns.
Seconds are those of the processor and on one thread, so that neighbours on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspark
from dspark.drafters.block_model import TraceBatch
from dspark.losses import EPSILON, LossWeights, cut_blocks, position_weights
from dspark.train.optim import make_adamw, set_learning_rate, trapezoid
from dspark.train.plan import make_plan
from dspark.train.texts import Text, save_texts
from dspark.train.trainer import Trainer

RECIPE = """
[drafter]
kind = "dspark"
num_hidden_layers = {layers}
markov_rank = 96

[train]
steps = {steps}
tokens_per_batch = {tokens}
anchors_per_batch = {anchors}
optimizer = "adamw"
mean_decay = 0.0
precision = "float32"
num_validation = 1
validation_prompts = 0
max_length = 512
"""


def dense_loss(model: Any, batch: TraceBatch, embed: nn.Module, lm_head: Any, weights: LossWeights) -> Tensor:
    """The objective written down plainly: every [positions, vocabulary] tensor exists, and autograd keeps it."""
    hidden = model.teacher_forced_hidden(batch, embed).flatten(0, 1)
    blocks = cut_blocks(batch.token_ids, batch.loss_mask, batch.anchors, batch.kept, model.config.block_size)
    bias, e = model.head.teacher_forced(blocks.previous.flatten(0, 1), hidden)
    logits = F.linear(hidden, lm_head.weight.float())
    logits = logits if bias is None else logits + bias
    where = blocks.positions.clamp(max=batch.token_ids.shape[1] - 1).flatten(1)
    rows = torch.arange(len(where))[:, None]
    teacher = torch.softmax(F.linear(batch.last_hidden[rows, where].view_as(hidden), lm_head.weight.float()), -1)
    l1 = (torch.softmax(logits, -1) - teacher).abs().sum(-1)
    labels = blocks.labels.flatten(0, 1)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(l1)
    survives = (1 - 0.5 * l1.detach()).clamp(0, 1)
    confidence = F.binary_cross_entropy_with_logits(model.confidence(hidden, e), survives, reduction="none")
    weight = position_weights(blocks.evaluated.flatten(0, 1), weights.decay)
    share = weight / (weight.sum() + EPSILON)
    terms = ((cross_entropy, weights.cross_entropy), (l1, weights.total_variation), (confidence, weights.confidence))
    return sum((factor * (values * share).sum() for values, factor in terms), torch.zeros(()))


@dataclass(frozen=True)
class Run:
    """One process's figures. losses: of every step, all parameters' sum of squares after the last as a witness."""

    name: str
    losses: list[float]
    witness: float
    tokens_per_second: float
    peak_bytes: int
    start_bytes: int


def ours(trainer: Trainer, steps: int) -> tuple[list[float], list[float], list[float]]:
    """(losses, seconds, tokens) of every step of the trainer itself."""
    stream, losses, seconds, tokens = trainer.stream(), [], [], []
    [student] = trainer.students
    accumulate = student.accumulate
    student.accumulate = lambda *a, **k: _noted(accumulate(*a, **k), losses)  # type: ignore[method-assign]
    for _ in range(steps):
        before, started = trainer.progress["tokens"], time.process_time()
        trainer.step(stream)
        seconds.append(time.process_time() - started)
        tokens.append(trainer.progress["tokens"] - before)
    return losses, seconds, tokens


def _noted(found: Any, losses: list[float]) -> Any:
    losses.append(float(found.total.detach()))
    return found


def plain(trainer: Trainer, steps: int) -> tuple[list[float], list[float], list[float]]:
    """The same steps by a plain loop: the same data, start, optimiser and schedule, and dense losses."""
    stream, losses, seconds, tokens = trainer.stream(), [], [], []
    [student] = trainer.students
    model, settings = student.model, trainer.settings
    optimizers = make_adamw(model, settings.lr, settings.weight_decay)
    for step in range(steps):
        started = time.process_time()
        number, texts = next(stream)
        batch = trainer.batch(texts, torch.Generator().manual_seed(settings.seed * 1_000_003 + number))
        loss = dense_loss(model, batch, trainer.embed, trainer.lm_head, student.weights)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        set_learning_rate(optimizers, trapezoid(step, settings.steps, settings.warmup, settings.decay))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds.append(time.process_time() - started)
        tokens.append(sum(map(len, texts)))
    return losses, seconds, tokens


def one(name: str, options: argparse.Namespace) -> Run:
    """What a child process does."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target = dspark.load_target(options.target, dtype="float32", device="cpu")
        _write_texts(folder / "texts", target.vocab_size, options.tokens)
        shape = dict(layers=options.layers, steps=options.steps, tokens=options.tokens, anchors=options.anchors)
        (folder / "dspark.toml").write_text(RECIPE.format(**shape), encoding="utf-8")
        places = {"target": options.target, "data": folder / "texts", "out": folder / "run"}
        trainer = Trainer(make_plan([folder / "dspark.toml"], places, {}), target, is_quiet=True)
        start_bytes = _peak_bytes()
        losses, seconds, tokens = (ours if name == "ours" else plain)(trainer, options.steps)
        parameters = trainer.students[0].model.parameters()
        witness = float(sum(p.detach().double().square().sum() for p in parameters))
    speed = sum(tokens[1:]) / sum(seconds[1:])  # the first step allocates
    return Run(name, losses, witness, speed, _peak_bytes(), start_bytes)


def _write_texts(folder: Path, vocab_size: int, num_tokens: int) -> None:
    """Random ids: what is computed does not depend on what they say."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(96, 256, (64,), generator=generator).tolist()
    rows = [Text.after_prompt(torch.randint(4, vocab_size, (n,), generator=generator).int(), 24) for n in lengths]
    assert num_tokens >= 256, "a batch holds at least one text"
    save_texts(rows, folder / "shard-00000.safetensors")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(runs: list[Run]) -> dict[str, Any]:
    """Medians over the repeats of each kind, and how far the two computations part."""
    by_name = {name: [run for run in runs if run.name == name] for name in ("ours", "plain")}
    first = {name: own[0] for name, own in by_name.items()}
    pairs = list(zip(first["ours"].losses, first["plain"].losses, strict=True))
    speed = {name: statistics.median(run.tokens_per_second for run in own) for name, own in by_name.items()}
    peak = {name: statistics.median(run.peak_bytes for run in own) for name, own in by_name.items()}
    start = {name: statistics.median(run.start_bytes for run in own) for name, own in by_name.items()}
    return {
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "relative_witness_difference": abs(first["ours"].witness / first["plain"].witness - 1),
        "tokens_per_second": speed,
        "speedup": speed["ours"] / speed["plain"],
        "peak_bytes": peak,
        "bytes_above_start": {name: peak[name] - start[name] for name in peak},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2560, help="per batch")
    parser.add_argument("--anchors", type=int, default=512, help="per batch")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(asdict(one(options.only, options))))
        return
    runs = []
    for repeat in range(options.repeats):
        for name in ("ours", "plain") if repeat % 2 == 0 else ("plain", "ours"):
            command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--only", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(Run(**json.loads(output.splitlines()[-1])))
    found = compare(runs)
    print(f"largest difference of a loss over {options.steps} steps: {found['largest_loss_difference']:.2g}")
    print(f"relative difference of the weights' sum of squares: {found['relative_witness_difference']:.2g}")
    for name in ("ours", "plain"):
        print(
            f"{name}: {found['tokens_per_second'][name]:.0f} tokens/s, peak {found['peak_bytes'][name] / 1e6:.0f} MB, "
            f"{found['bytes_above_start'][name] / 1e6:.0f} MB above the models loaded"
        )
    print(f"{found['speedup']:.2f}x the plain loop's speed")
    if options.json:
        options.json.write_text(json.dumps({**found, "runs": [asdict(run) for run in runs]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
