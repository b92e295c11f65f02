"""Optimisers (AdamW, or Muon for matrices with AdamW for the rest), schedules, and a running mean of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dspark.train.distributed import spread_like, whole


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024); matrices of one shape are taken together."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix on; those that are taller than wide go further."""
        assert closure is None
        for group in self.param_groups:
            matrices = group["params"]
            ahead = torch.stack([whole(self._ahead(matrix, group["momentum"])) for matrix in matrices])
            rows, columns = matrices[0].shape
            step_size = group["lr"] * max(1, rows / columns) ** 0.5
            for matrix, update in zip(matrices, orthogonalised(ahead), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(spread_like(update, matrix), alpha=-step_size)

    def _ahead(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's gradient: where the momentum is going."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum)


def orthogonalised(x: Tensor, num_iterations: int = 5) -> Tensor:
    """x [n, rows, columns] -> nearly the nearest matrices with singular values 1, in bf16 and without an SVD."""
    half = x.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    half = half.mT if is_tall else half
    half = half / (half.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        square = half @ half.mT
        half = 3.4445 * half + (-4.7750 * square + 2.0315 * (square @ square)) @ half
    return (half.mT if is_tall else half).float()


def make_optimizers(
    model: nn.Module, lr_matrices: float, lr_rest: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers and projections; AdamW for norms, biases, and tables indexed by tokens."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables |= {
        id(p)
        for name, p in model.named_parameters()
        if "markov_w2" in name or "lm_head" in name or "confidence" in name
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in tables]
    taken = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr_rest, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(matrices, lr_matrices, weight_decay=weight_decay))
    return _with_peaks(optimizers)


def make_adamw(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything; weight decay for matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
    ]
    return _with_peaks([torch.optim.AdamW([g for g in groups if g["params"]], lr, betas=(0.9, 0.95))])


def _with_peaks(optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Every group at `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """From a state in one piece; what has its parameter's shape is laid out over the processes as the parameter is."""
    optimizer.load_state_dict(saved)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = spread_like(value, parameter)


def trapezoid(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """Up over the first share of the steps, flat, and down to 0 over the last: the end can be moved while it is flat."""
    return max(
        0.0, min(1.0, (step + 1) / max(1.0, warmup * num_steps), (num_steps - step) / max(1.0, decay * num_steps))
    )


def cosine(step: int, num_steps: int, warmup: float, decay: float) -> float:
    """Up over the first share of the steps, then down to 0 along half a cosine; decay has no meaning here."""
    rising = max(1.0, warmup * num_steps)
    if step + 1 <= rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rising) / max(1.0, num_steps - rising)))


SCHEDULES: dict[str, Callable[[int, int, float, float], float]] = {"trapezoid": trapezoid, "cosine": cosine}


class RunningMean:
    """Exponential mean of a model's parameters; young ones forget faster, so the initial weights leave no trace.

    decay  0: no mean, just the parameters
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model after a step; the first ones count more, or the start would linger."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 10))
        for name, p in model.named_parameters():
            self.mean[name].lerp_(p, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for name, value in state["mean"].items():
            self.mean[name].copy_(spread_like(value, self.mean[name]))
