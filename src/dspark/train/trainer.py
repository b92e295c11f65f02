"""Train drafters on texts their target wrote.

    python -m dspark.train.trainer --target DIR --texts DIR --recipe recipes/tiny/dspark.toml --out DIR

The trainer knows of a drafter only that it has `loss(batch, embed, lm_head, weights)`. It can be stopped at any time
and goes on where it was: texts are taken in an order that depends on the seed and the step alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.checkpoints import save_drafter
from dspark.drafters.block_model import BlockConfig, BlockModel, TraceBatch
from dspark.errors import DSparkError, InvalidConfiguration
from dspark.losses import Losses, LossWeights
from dspark.train.anchors import choose_anchors
from dspark.train.optim import RunningMean, make_optimizers, set_learning_rate, trapezoid
from dspark.train.settings import read_recipe
from dspark.train.texts import Text, batches, pad, read_texts, split_validation
from dspark.train.traces import TargetStates


@dataclass(frozen=True)
class DrafterSettings:
    """The drafter's shape; what is not here is the target's own (width, heads, vocabulary, rotation)."""

    num_hidden_layers: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int = 7
    intermediate_size: int | None = None
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = True

    def config(self, target: dict[str, Any]) -> BlockConfig:
        """target: config.json of the target, a text config."""
        own = {key: value for key, value in vars(self).items() if value is not None}
        return BlockConfig.from_dict({**target, **own, "num_target_layers": target["num_hidden_layers"]})


@dataclass(frozen=True)
class TrainSettings:
    """How a drafter is trained.

    tokens_per_batch   prompt and padding included
    anchors_per_batch  blocks in one step, spread evenly over its texts
    warmup, decay      shares of the steps in which the learning rate rises and falls
    mean_decay         of the running mean of the weights, which is what is saved
    num_validation     texts that are only evaluated
    start_from_target  copy the target's last layers instead of drawing weights
    """

    steps: int
    tokens_per_batch: int = 2560
    anchors_per_batch: int = 512
    lr_matrices: float = 0.02
    lr_rest: float = 0.004
    weight_decay: float = 0.05
    warmup: float = 0.02
    decay: float = 0.4
    mean_decay: float = 0.998
    clip: float = 1.0
    num_validation: int = 256
    validate_every: int = 500
    save_seconds: float = 180.0
    log_every: int = 25
    max_length: int = 512
    start_from_target: bool = False
    seed: int = 0


class Student:
    """One drafter in training: its model, optimisers, running mean, losses, and the files it is written to."""

    def __init__(
        self, config: BlockConfig, settings: TrainSettings, weights: LossWeights, out: Path, teacher: Any
    ) -> None:
        torch.manual_seed(settings.seed)
        self.weights, self.out, self.settings = weights, out, settings
        out.mkdir(parents=True, exist_ok=True)
        self.model = BlockModel(config)
        if settings.start_from_target:
            start_from_target(self.model, teacher.model)
        else:
            start_as_identity(self.model)
        self.mean = RunningMean(self.model, settings.mean_decay)
        self.optimizers = make_optimizers(self.model, settings.lr_matrices, settings.lr_rest, settings.weight_decay)
        self.smooth: dict[str, float] = {}

    def losses(
        self, batch: TraceBatch, embed: nn.Module, lm_head: nn.Linear, model: BlockModel | None = None
    ) -> Losses:
        with torch.autocast("cpu", torch.bfloat16):
            return (model or self.model).loss(batch, embed, lm_head, self.weights)

    def learn(self, losses: Losses, scale: float) -> None:
        """One optimiser step at `scale` times the peak learning rates."""
        if not math.isfinite(float(losses.total.detach())):
            raise DSparkError(
                f"the loss of {self.out.name} became {float(losses.total.detach())}. The last saved state is as it was; "
                "lower lr_matrices and lr_rest in the recipe, or raise warmup, and start again in a new folder"
            )
        set_learning_rate(self.optimizers, scale)
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.mean.update(self.model)
        for name, value in numbers(losses).items():
            self.smooth[name] = 0.95 * self.smooth.get(name, value) + 0.05 * value

    def averaged(self) -> BlockModel:
        model = BlockModel(self.model.config)
        model.load_state_dict(self.mean.mean)
        return model.eval()

    def log(self, kind: str, values: dict[str, float], progress: dict[str, float]) -> None:
        row = {"kind": kind, **progress, **{name: round(value, 5) for name, value in values.items()}}
        print(self.out.name, " ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        path = self.out / f"{kind}.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def save(self, progress: dict[str, float]) -> None:
        """The averaged weights as a checkpoint others can load, and everything needed to go on."""
        save_drafter(self.averaged(), self.out)
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {
            "progress": progress,
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizers": optimizers,
        }
        torch.save(state, self.out / "training_state.partial")
        (self.out / "training_state.partial").rename(self.out / "training_state.pt")

    def resume(self) -> dict[str, float] | None:
        """Go on from training_state.pt, if there is one."""
        path = self.out / "training_state.pt"
        if not path.exists():
            return None
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.mean.load_state_dict(state["mean"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress: dict[str, float] = state["progress"]
        return progress


def numbers(losses: Losses) -> dict[str, float]:
    return {
        name: float(getattr(losses, name).detach()) for name in ("total", "cross_entropy", "l1", "confidence", "tau")
    }


class Trainer:
    """Teaches students side by side: each batch and the target's states over it are made once for all of them."""

    def __init__(
        self,
        target: Path,
        texts: Path,
        settings: TrainSettings,
        recipes: Sequence[tuple[BlockConfig, TrainSettings, LossWeights, Path]],
    ) -> None:
        self.settings = settings
        teacher = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval().requires_grad_(False)
        self.embed, self.lm_head = teacher.get_input_embeddings(), teacher.get_output_embeddings()
        self.students = [Student(config, own, weights, out, teacher) for config, own, weights, out in recipes]
        layer_ids = {student.model.config.target_layer_ids for student in self.students}
        if len(layer_ids) != 1:
            raise InvalidConfiguration(
                f"drafters trained together must want the same target layers; got {sorted(layer_ids)}"
            )
        self.states = TargetStates(teacher, *layer_ids)
        everything = read_texts(texts, max_length=settings.max_length)
        if not 0 < settings.num_validation < len(everything):
            raise InvalidConfiguration(
                f"expected num_validation between 1 and {len(everything) - 1}, as there are {len(everything)} texts; "
                f"got {settings.num_validation}"
            )
        self.train_texts, self.validation_texts = split_validation(everything, settings.num_validation, settings.seed)
        self.progress: dict[str, float] = {"step": 0, "seconds": 0.0, "tokens": 0, "positions": 0}

    def resume(self) -> None:
        """Go on where all students stopped, if they were stopped."""
        found = [student.resume() for student in self.students]
        if all(progress == found[0] for progress in found) and found[0] is not None:
            self.progress = found[0]
            print(f"going on from step {self.progress['step']}", flush=True)
        elif any(progress is not None for progress in found):
            raise InvalidConfiguration(
                "expected the drafters' training states to be of one step: train them apart, or start over"
            )

    def batch(self, texts: list[Text], generator: torch.Generator) -> TraceBatch:
        token_ids, loss_mask = pad(texts)
        features, last_hidden = self.states(token_ids)
        anchors, kept = choose_anchors(loss_mask, max(1, self.settings.anchors_per_batch // len(texts)), generator)
        return TraceBatch(token_ids, loss_mask, features.float(), last_hidden.float(), anchors, kept)

    def stream(self) -> Iterator[list[Text]]:
        """Endless passes over the texts, from the current step on."""
        skip, epoch = self.progress["step"], 0
        while True:
            for texts in batches(
                self.train_texts, self.settings.tokens_per_batch, random.Random(self.settings.seed + epoch)
            ):
                if skip:
                    skip -= 1
                else:
                    yield texts
            epoch += 1

    def run(self) -> None:
        settings, progress = self.settings, self.progress
        started = last_save = time.time()
        before = progress["seconds"]
        for texts in self.stream():
            if progress["step"] >= settings.steps:
                break
            scale = trapezoid(int(progress["step"]), settings.steps, settings.warmup, settings.decay)
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + int(progress["step"]))
            batch = self.batch(texts, generator)
            for student in self.students:
                losses = student.losses(batch, self.embed, self.lm_head)
                student.learn(losses, scale)
            progress["step"] += 1
            progress["tokens"] += sum(len(text.token_ids) for text in texts)
            progress["positions"] += losses.num_positions
            progress["seconds"] = round(before + time.time() - started, 1)
            is_last = progress["step"] == settings.steps
            for student in self.students:
                if progress["step"] % settings.log_every == 0 or progress["step"] <= 3:
                    student.log("train", {**student.smooth, "learning_rate": scale}, progress)
                if progress["step"] % settings.validate_every == 0 or is_last:
                    student.log("validation", self.validate(student), progress)
            if time.time() - last_save > settings.save_seconds or is_last:
                for student in self.students:
                    student.save(progress)
                last_save = time.time()

    @torch.no_grad()
    def validate(self, student: Student) -> dict[str, float]:
        """Mean losses of the averaged weights over the validation texts, with the same anchors each time."""
        averaged = student.averaged()
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, float] = {}
        count = 0
        for texts in batches(self.validation_texts, self.settings.tokens_per_batch, random.Random(0)):
            losses = student.losses(self.batch(texts, generator), self.embed, self.lm_head, averaged)
            values = numbers(losses) | {f"acceptance_{k + 1}": float(a) for k, a in enumerate(losses.acceptance)}
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * losses.num_positions
            count += losses.num_positions
        return {name: value / count for name, value in sums.items()}


@torch.no_grad()
def start_as_identity(model: BlockModel) -> None:
    """Layers that add nothing at first: the same start for every drafter of a shape, and a calmer one."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


@torch.no_grad()
def start_from_target(model: BlockModel, backbone: Any) -> None:
    """Layers, norms and keys of the target's own last layers, where shapes agree (Qwen3-style targets).

    fc hands on the highest feature, and hidden_norm is what the first copied layer expects before its keys: so the
    draft starts out reading context as the target does, which saves a short training its first thousand steps.
    """
    first = len(backbone.layers) - len(model.layers)
    if first <= min(model.config.target_layer_ids):
        raise InvalidConfiguration(
            f"start_from_target copies layers {first} and up, and needs a feature layer below; target_layer_ids are "
            f"{list(model.config.target_layer_ids)}: use fewer draft layers, an earlier feature layer, or random weights"
        )
    for layer, own in zip(model.layers, backbone.layers[first:], strict=True):
        layer.load_state_dict({name: tensor.float() for name, tensor in own.state_dict().items()})
    width = model.config.hidden_size
    model.fc.weight.normal_(std=0.02 * model.fc.in_features**-0.5)
    nearest = max(i for i, layer in enumerate(model.config.target_layer_ids) if layer < first)
    model.fc.weight[:, nearest * width : (nearest + 1) * width] += torch.eye(width)
    model.hidden_norm.weight.copy_(backbone.layers[first].input_layernorm.weight)
    model.norm.weight.copy_(backbone.norm.weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="folder written by dspark.train.regenerate")
    parser.add_argument(
        "--recipe",
        type=Path,
        nargs="+",
        required=True,
        help="TOML with the tables [drafter], [train] and [loss]; several are trained side by side, "
        "with batches, steps and schedule of the first",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="every drafter goes into a folder named like its recipe"
    )
    parser.add_argument(
        "--steps", type=int, help="overrides the recipe; may be changed between runs while the rate is flat"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target_config = AutoConfig.from_pretrained(arguments.target).get_text_config().to_dict()
    recipes = [
        (
            read_recipe(path, "drafter", DrafterSettings).config(target_config),
            read_recipe(path, "train", TrainSettings, {"steps": arguments.steps}),
            read_recipe(path, "loss", LossWeights),
            arguments.out / path.stem,
        )
        for path in arguments.recipe
    ]
    trainer = Trainer(arguments.target, arguments.texts, recipes[0][1], recipes)
    trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
