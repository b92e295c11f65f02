"""One drafter in training: its model, optimisers and running mean, and the files it is written to."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from dspark.checkpoints import save_drafter
from dspark.checkpoints.dialects import MODELS
from dspark.drafters.block_model import TraceBatch
from dspark.errors import DSparkError, InvalidConfiguration
from dspark.losses import Losses, LossWeights
from dspark.train.distributed import shared, spread_like, whole, whole_state, without_averaging
from dspark.train.files import move_files, replace_file
from dspark.train.optim import SCHEDULES, RunningMean, load_optimizer, make_adamw, make_optimizers, set_learning_rate
from dspark.train.run_log import Table
from dspark.train.start import WHERE_IT_FITS, start
from dspark.train.texts import Text


@dataclass(frozen=True)
class TrainSettings:
    """How a drafter is trained.

    tokens_per_batch   prompt and padding included; of one process and one accumulated batch
    accumulate         batches per step, weighted equally
    anchors_per_batch  blocks in one batch, spread evenly over its texts
    optimizer          muon: lr_matrices for matrices, lr_rest for the rest; adamw: lr for everything
    schedule           trapezoid: flat, then down to 0 over the last `decay` of the steps; cosine. Both rise over `warmup`
    mean_decay         of the running mean of the weights, which is what is saved; 0: the weights themselves
    precision          of the arithmetic: bfloat16 (autocast; parameters stay float32) or float32
    sharded            several processes: each keeps a part of weights, gradients and optimiser state (FSDP2), not all (DDP)
    checkpoint_layers  compute the layers again on the way back instead of keeping what is inside them
    num_validation     texts that are only evaluated
    validation_prompts decoded at every validation, validation_tokens each at most; 0: losses only
    start_from_target  copy the target's last layers instead of drawing weights; "where it fits": only of targets like Llama
    start_head_from_texts  the Markov head starts as the texts' own pairs of tokens
    start_from         folder of a drafter of the same shape to go on from
    """

    steps: int
    tokens_per_batch: int = 2560
    accumulate: int = 1
    anchors_per_batch: int = 512
    optimizer: str = "muon"
    lr: float = 6e-4
    lr_matrices: float = 0.02
    lr_rest: float = 0.004
    weight_decay: float = 0.05
    schedule: str = "trapezoid"
    warmup: float = 0.02
    decay: float = 0.4
    mean_decay: float = 0.998
    clip: float = 1.0
    precision: str = "bfloat16"
    sharded: bool = False
    checkpoint_layers: bool = False
    num_validation: int = 256
    validate_every: int = 500
    validation_prompts: int = 32
    validation_tokens: int = 128
    save_seconds: float = 180.0
    log_every: int = 25
    max_length: int = 512
    start_from_target: bool | str = False
    start_head_from_texts: bool = False
    start_from: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("optimizer", ("muon", "adamw")),
            ("schedule", tuple(SCHEDULES)),
            ("precision", ("bfloat16", "float32")),
            ("start_from_target", (True, False, WHERE_IT_FITS)),
        ):
            if getattr(self, name) not in choices:
                raise InvalidConfiguration(
                    f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}"
                )
        for name in ("steps", "tokens_per_batch", "accumulate", "anchors_per_batch", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise InvalidConfiguration(f"{name} must be 1 or more; got {getattr(self, name)}")
        if self.start_from and (self.start_from_target or self.start_head_from_texts):
            raise InvalidConfiguration(
                "start_from goes on from all weights of a drafter: leave start_from_target and start_head_from_texts out"
            )


@dataclass(frozen=True)
class Recipe:
    """What one recipe file asks for, with the drafter's config already made for the target."""

    name: str
    architecture: str
    config: Any
    settings: TrainSettings
    weights: LossWeights
    out: Path


class Student:
    """One drafter in training.

    out            the folder `--drafter` takes: the best validated weights, or the newest while there are none
    out/last       the newest weights
    texts          what it will learn from
    extra          goes into config.json of both
    """

    def __init__(self, recipe: Recipe, teacher: Any, texts: Sequence[Text], extra: Mapping[str, Any]) -> None:
        self.recipe, self.settings, self.weights, self.out = recipe, recipe.settings, recipe.weights, recipe.out
        self.extra = dict(extra)
        torch.manual_seed(self.settings.seed)
        self.model: Any = MODELS[recipe.architecture][1](recipe.config)
        start(self.model, self.settings, teacher, texts)
        self.device = teacher.get_input_embeddings().weight.device
        self.model.to(self.device)
        if self.settings.checkpoint_layers:
            for layer in self.model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.objective = shared(self.model, self.settings.sharded)
        self.mean = RunningMean(self.model, self.settings.mean_decay)
        self.optimizers = (
            make_optimizers(self.model, self.settings.lr_matrices, self.settings.lr_rest, self.settings.weight_decay)
            if self.settings.optimizer == "muon"
            else make_adamw(self.model, self.settings.lr, self.settings.weight_decay)
        )
        self.smooth: dict[str, float] = {}
        self.sums: dict[str, float] = {}
        self.best_tau = 0.0
        self.tables = {kind: Table(self.out / f"{kind}.csv") for kind in ("train", "validation")}

    # -- learning -------------------------------------------------------------------------------------------------------

    def losses(self, batch: TraceBatch, embed: nn.Module, lm_head: nn.Module, objective: nn.Module) -> Losses:
        """Of one batch, in the precision of the recipe."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            total, losses = objective(batch, embed, lm_head, self.weights)
        return replace(losses, total=total)  # several processes: the one whose gradient is averaged

    def accumulate(self, batch: TraceBatch, embed: nn.Module, lm_head: nn.Module, is_last: bool) -> Losses:
        """One batch's share of the gradient; processes share theirs with the step's last batch."""
        if is_last:
            losses = self._backward(batch, embed, lm_head)
        else:
            with without_averaging(self.objective):
                losses = self._backward(batch, embed, lm_head)
        for name, value in numbers(losses).items():
            self.sums[name] = self.sums.get(name, 0.0) + value / self.settings.accumulate
        return losses

    def _backward(self, batch: TraceBatch, embed: nn.Module, lm_head: nn.Module) -> Losses:
        losses = self.losses(batch, embed, lm_head, self.objective)
        if not math.isfinite(float(losses.total.detach())):
            self.stop(f"the loss of {self.out.name} became {float(losses.total.detach())}", batch)
        (losses.total / self.settings.accumulate).backward()
        return losses

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rates of a step, as a share of their peaks."""
        return SCHEDULES[self.settings.schedule](step, num_steps, self.settings.warmup, self.settings.decay)

    def step(self, rate: float, batch: TraceBatch) -> None:
        """One optimiser step; batch is the last one, for when it goes wrong."""
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip))
        if not math.isfinite(float(norm)):
            self.stop(f"the gradient of {self.out.name} became {float(norm)}", batch)
        set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.mean.update(self.model)

    def stop(self, what: str, batch: TraceBatch) -> None:
        """End the run at numbers that are none, and keep the batch that did it."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "bad_batch.safetensors"
        with replace_file(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in vars(batch).items()}, partial)
        raise DSparkError(
            f"{what}; its batch is in {path}. The last saved state is as it was; lower the learning rates in the "
            "recipe, or raise warmup, and start again in a new folder"
        )

    # -- writing --------------------------------------------------------------------------------------------------------

    def averaged(self) -> Any:
        """A copy of the model with the running mean of its weights, whole in every process."""
        with torch.device(self.device):
            model = MODELS[self.recipe.architecture][1](self.recipe.config)
        model.load_state_dict(whole_state({**self.model.state_dict(), **self.mean.mean}))
        return model.eval()

    def export(self, averaged: Any, folder: Path) -> None:
        """The averaged weights as a drafter that the engine loads; whole or not at all."""
        save_drafter(averaged, folder / "saving", **self.extra)
        move_files(folder / "saving", folder, ("config.json", "model.safetensors"))

    def keep_best(self, averaged: Any, tau: float) -> None:
        """If nothing so far was better, these weights are what `--drafter` gets."""
        if tau > self.best_tau:
            self.best_tau = tau
            self.export(averaged, self.out)

    def save_newest(self, averaged: Any) -> None:
        """Write `last`; and the drafter itself while no validation has found a best one."""
        self.export(averaged, self.out / "last")
        if not self.best_tau:
            self.export(averaged, self.out)

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, in one piece."""
        state = {
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "smooth": self.smooth,
            "best_tau": self.best_tau,
        }
        return dict(whole_state(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: weights, their mean, optimisers and the best tau so far."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: spread_like(value, own[name]) for name, value in state["model"].items()})
        self.mean.load_state_dict(state["mean"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        self.smooth, self.best_tau = state["smooth"], state["best_tau"]

    def forget_after(self, step: int) -> None:
        """Drop logged rows that are about to be written again."""
        for table in self.tables.values():
            table.forget_after(step)


def numbers(losses: Losses) -> dict[str, float]:
    """The losses as the tables and curves have them."""
    return {
        name: float(getattr(losses, name).detach()) for name in ("total", "cross_entropy", "l1", "confidence", "tau")
    }
