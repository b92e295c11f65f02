"""What a parallel drafter is trained on: cross entropy, total variation and confidence (paper 3.3, eq. 9-12).

The released code decides the details: position weights decay with 4 and not with the block size, every loss is a
weighted *mean* over all kept positions of all blocks, L1 carries no 1/2, and one position that may not be learned
from (past the end, not the assistant's) takes the rest of its block with it.

Letters here: S tokens of a sequence, A anchors of a sequence, K block size, N = positions of all blocks, r head rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # in every denominator, as released
CHUNK_ROWS = 64  # of the vocabulary-wide tensors that exist at once


@dataclass(frozen=True)
class LossWeights:
    """Shares of the three losses, and how fast positions of a block lose weight: exp(-j / decay).

    total_variation weighs the L1 distance, which is twice the total variation. Cross entropy alone is DFlash as
    released. detach_confidence: the confidence loss trains the confidence head alone, not what it looks at.
    """

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    detach_confidence: bool = False


@dataclass(frozen=True)
class Losses:
    """total is what to differentiate; the rest are detached numbers for the log.

    cross_entropy, l1, confidence   weighted means
    acceptance [K]                  mean 1 - L1/2 of each position, given that the true tokens precede it
    tau                             1 + mean sum over k of the product of 1 - L1/2 up to k: close to decoding's
    num_positions                   positions that counted
    """

    total: Tensor
    cross_entropy: Tensor
    l1: Tensor
    confidence: Tensor
    acceptance: Tensor
    tau: Tensor
    num_positions: int


@dataclass(frozen=True)
class Blocks:
    """What every position of every block sees and should say.

    positions [B, A, K]   of the position's input; it predicts the token after it
    previous  [B, A, K]   the true token before the predicted one (teacher forcing): the anchor first
    labels    [B, A, K]   the true token
    evaluated [B, A, K]   may be learned from
    """

    positions: Tensor
    previous: Tensor
    labels: Tensor
    evaluated: Tensor


def cut_blocks(token_ids: Tensor, loss_mask: Tensor, anchors: Tensor, kept: Tensor, block_size: int) -> Blocks:
    """Blocks that start at anchors [B, A] of token_ids [B, S]; kept [B, A] is false for fillers."""
    length = token_ids.shape[1]
    positions = anchors[:, :, None] + torch.arange(block_size, device=anchors.device)
    wanted = positions + 1
    inside = wanted < length

    def at(values: Tensor, where: Tensor) -> Tensor:
        return values.gather(1, where.clamp(max=length - 1).flatten(1)).view_as(where)

    evaluated = (inside & at(loss_mask, wanted) & kept[:, :, None]).long().cumprod(-1).bool()
    return Blocks(positions, at(token_ids, positions), at(token_ids, wanted), evaluated)


def position_weights(evaluated: Tensor, decay: float) -> Tensor:
    """exp(-j / decay) where evaluated [..., K], else 0."""
    steps = torch.arange(evaluated.shape[-1], device=evaluated.device, dtype=torch.float32)
    return evaluated * torch.exp(-steps / decay)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum(w x) / (sum w + 1e-6)."""
    return (values * weights).sum() / (weights.sum() + EPSILON)


def l1_and_cross_entropy(logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: sum_v |q - p| and -log q(label), of logits [N, V] and teacher laws [N, V]. The plain form, for tests."""
    law = torch.softmax(logits, -1)
    return (law - teacher).abs().sum(-1), F.cross_entropy(logits, labels, reduction="none")


def confidence_loss(logits: Tensor, l1: Tensor, weights: Tensor) -> Tensor:
    """Binary cross entropy of confidence logits [N] against the share of draws that survive, 1 - L1/2 (eq. 8, 11).

    Only the label is detached: the gradient reaches what the logits were made from.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label = (1 - 0.5 * l1.detach()).clamp(0, 1).to(logits.dtype)
    return weighted_mean(F.binary_cross_entropy_with_logits(logits, label, reduction="none"), weights)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma's bounded logits; None leaves them."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class ProjectedLoss(torch.autograd.Function):
    """Vocabulary projection and losses in one sweep over chunks of rows, so [N, V] never exists.

    The gradient is known as soon as the chunk's law is, so it is taken on the way forward and only scaled on the way
    back. Chunks are small enough for a core's cache (benchmarks/training.py has the speed); on any device it saves 5
    tensors of [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor | None,
        projection: Tensor | None,
        head: Tensor,
        teacher_hidden: Tensor,
        labels: Tensor,
        ce_weights: Tensor,
        l1_weights: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (sum of the weighted losses, ce [N], l1 [N]); only the first is differentiable.

        hidden [N, H], head [V, H]: base logits. latent [N, r], projection [V, r]: the sequential head's bias.
        teacher_hidden [N, H]: the target's normed last hidden state. ce_weights, l1_weights [N] sum the losses up.
        """
        dtype = hidden.dtype
        compute = (
            torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else dtype
        )
        head_c = head.detach().to(compute)
        projection_c = None if projection is None else projection.detach().to(compute)
        d_hidden = torch.empty_like(hidden)
        d_latent = None if latent is None else torch.empty_like(latent)
        d_projection = None if projection is None else torch.zeros_like(projection)
        ce, l1 = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                base = capped((hidden[part].to(compute) @ head_c.T).to(dtype), softcap)
                logits = base
                if latent is not None and projection_c is not None:
                    logits = base + latent[part].to(compute) @ projection_c.T
                log_law = torch.log_softmax(logits, -1)
                law = log_law.exp()
                gap = law - torch.softmax(capped((teacher_hidden[part].to(compute) @ head_c.T).to(dtype), softcap), -1)
                label = labels[part, None]
                ce[part] = -log_law.gather(1, label).squeeze(1)
                l1[part] = gap.abs().sum(-1)
                # d l1 / d logits = q (s - <s, q>), s = sign(q - p);  d ce / d logits = q - 1[label]
                sign = gap.sign_().mul_(l1_weights[part, None])
                sign -= (sign * law).sum(-1, keepdim=True) - ce_weights[part, None]
                gradient = law.mul_(sign)
                gradient.scatter_add_(1, label, -ce_weights[part, None])
                gradient_c = gradient.to(compute)
                if latent is not None and projection_c is not None:
                    assert d_latent is not None and d_projection is not None
                    d_latent[part] = (gradient_c @ projection_c).to(dtype)
                    d_projection += (gradient_c.T @ latent[part].to(compute)).to(dtype)
                if softcap is not None:
                    gradient_c = (gradient * (1 - (base / softcap) ** 2)).to(compute)
                d_hidden[part] = (gradient_c @ head_c).to(dtype)
        ctx.save_for_backward(d_hidden, d_latent, d_projection)
        ctx.mark_non_differentiable(ce, l1)
        total = (ce * ce_weights).sum() + (l1 * l1_weights).sum()
        return total, ce, l1

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * scale for g in ctx.saved_tensors]
        return (*scaled, *[None] * 7)


def block_losses(
    hidden: Tensor,
    latent: Tensor | None,
    projection: Tensor | None,
    head: Tensor,
    confidence: Tensor | None,
    teacher_hidden: Tensor,
    labels: Tensor,
    evaluated: Tensor,
    weights: LossWeights,
    softcap: float | None = None,
    chunk: int = CHUNK_ROWS,
) -> Losses:
    """The whole loss of M blocks: hidden, teacher_hidden [M, K, H], latent [M, K, r], confidence logits and the rest [M, K]."""
    position = position_weights(evaluated, weights.decay)
    share = (position / (position.sum() + EPSILON)).flatten().to(hidden.dtype)
    total, ce, l1 = ProjectedLoss.apply(
        hidden.flatten(0, 1),
        None if latent is None else latent.flatten(0, 1),
        projection,
        head,
        teacher_hidden.flatten(0, 1),
        labels.flatten(),
        share * weights.cross_entropy,
        share * weights.total_variation,
        softcap,
        chunk,
    )
    l1 = l1.view_as(evaluated)
    conf = hidden.new_zeros(())
    if confidence is not None and weights.confidence:
        conf = confidence_loss(confidence, l1, position)
        total = total + weights.confidence * conf
    counted = evaluated.float()
    survival = (1 - 0.5 * l1.float()) * counted
    acceptance = survival.sum(0) / (counted.sum(0) + EPSILON)
    whole = counted[:, -1].bool()  # blocks cut short would pull tau down
    tau = 1 + survival[whole].cumprod(-1).sum(-1).mean() if whole.any() else hidden.new_ones(())
    return Losses(
        total,
        (ce * share).sum().detach(),
        weighted_mean(l1, position).detach(),
        conf.detach(),
        acceptance,
        tau,
        int(evaluated.sum()),
    )
