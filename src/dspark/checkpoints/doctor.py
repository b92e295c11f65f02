"""What a drafter's checkpoint means, measured: acceptance on real text under every plausible reading of its config.

A wrong reading of layer ids or slots raises no error anywhere. It costs nearly all acceptance, and that is the most
expensive silent failure users of released drafters report; so the readings are tried and the numbers decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.checkpoints.dialects import dialect
from dspark.checkpoints.drafter import (
    LoadedDrafter,
    for_target,
    load_block_drafter,
    misfits,
    read_config,
)
from dspark.checkpoints.folder import Checkpoint
from dspark.checkpoints.prompt_format import system_prompt_note, template_note
from dspark.drafters.block_model import BlockModel, TraceBatch
from dspark.drafters.eagle3_model import Eagle3Model
from dspark.errors import InvalidConfiguration
from dspark.target.target import Target
from dspark.types import Span

LEAST_ACCEPTANCE = 0.1  # of the first draft token; a drafter below it costs more than it brings under any load
_STANDARD_ERRORS = 2.5  # by so many another reading must be better, anchor by anchor, to be what the checkpoint means


@dataclass(frozen=True)
class Reading:
    """One way to understand a config.

    shift             added to the layer ids: -1 if they count hidden states, the first being the embedding
    anchor_predicts   the anchor's slot predicts the first draft token; if not, only masks predict (block drafters)
    normed_residual   the residual carries the normed feature (EAGLE-3)
    """

    shift: int = 0
    anchor_predicts: bool = True
    normed_residual: bool | None = None


@dataclass(frozen=True)
class Measurement:
    """How a reading does, teacher-forced at temperature 0.

    hits  per text [anchors, K]: is each draft token the target's, given that the true tokens precede it?
    """

    reading: Reading
    hits: list[Tensor]

    @property
    def acceptance(self) -> list[float]:
        """Of each draft position."""
        shares: list[float] = torch.cat(self.hits).mean(0).tolist()
        return shares

    @property
    def accepted(self) -> Tensor:
        """[anchors]  draft tokens accepted by a round that starts there."""
        return torch.cat(self.hits).cumprod(1).sum(1)

    @property
    def tau(self) -> float:
        """Tokens per target pass, the bonus token included, going from round to round as decoding does.

        Not the mean over all anchors: most tokens lie in long rounds.
        """
        rounds = []
        for hits in self.hits:
            accepted, anchor = hits.cumprod(1).sum(1).tolist(), 0
            while anchor < len(accepted):
                rounds.append(accepted[anchor])
                anchor += int(accepted[anchor]) + 1
        return 1 + sum(rounds) / len(rounds)

    def is_clearly_better(self, than: Measurement) -> bool:
        """Whether its lead is more than chance on these texts."""
        gain = self.accepted - than.accepted
        return float(gain.mean()) > _STANDARD_ERRORS * float(gain.std()) / len(gain) ** 0.5


@dataclass(frozen=True)
class Diagnosis:
    """claimed is what the config says; measurements has it and every other reading, best first. problems: why not to run it."""

    claimed: Reading
    measurements: list[Measurement]
    problems: list[str]
    notes: list[str]

    @property
    def best(self) -> Measurement:
        """The reading with the highest tau."""
        return self.measurements[0]


def examine(checkpoint: Checkpoint, target: Target, texts: Sequence[tuple[list[int], int]]) -> Diagnosis:
    """Check shapes, then measure on texts: (token ids, length of the prompt in them), each written by the target itself.

    Answers should be the target's greedy ones, so that a draft token is accepted iff it is the text's.
    """
    checkpoint, claimed = _readable(checkpoint)
    config = for_target(read_config(checkpoint), target)
    if claimed.normed_residual is None and hasattr(config, "norm_before_residual"):
        claimed = dataclasses.replace(claimed, normed_residual=config.norm_before_residual)
    notes = _notes(checkpoint, target)
    if problems := misfits(checkpoint, config, target):
        return Diagnosis(claimed, [], problems, notes)
    loaded = load_block_drafter(checkpoint, target, dtype=torch.float32, own_embeddings=True)
    loaded = dataclasses.replace(loaded, model=loaded.model.to(target.device))
    readings = _readings(config.target_layer_ids, claimed, target.num_layers)
    layers = sorted({i + r.shift for r in readings for i in config.target_layer_ids})
    long_enough = [(ids, start) for ids, start in texts if len(ids) - start > config.block_size]
    if not long_enough:
        raise InvalidConfiguration(
            f"expected answers of more than {config.block_size} tokens, the drafter's block; the longest of "
            f"{len(texts)} has {max((len(ids) - start for ids, start in texts), default=0)}: ask for longer ones"
        )
    traces = [_trace(target, ids, start, tuple(layers), config.block_size) for ids, start in long_enough]
    found = []
    for reading in readings:
        wanted = [layers.index(i + reading.shift) for i in config.target_layer_ids]
        hits = [_hits(loaded, _with_layers(t, wanted, target.hidden_size), reading) for t in traces]
        found.append(Measurement(reading, hits))
    # At equal numbers what the config says comes first.
    found.sort(key=lambda m: (-m.tau, m.reading != claimed))
    return Diagnosis(claimed, found, _verdict(found, claimed), notes)


def describe_reading(reading: Reading) -> str:
    """In words, as difference from the usual."""
    parts = []
    if reading.shift:
        parts.append(f"layer ids {'one lower' if reading.shift < 0 else 'one higher'}")
    if not reading.anchor_predicts:
        parts.append("only masks predict")
    if reading.normed_residual:
        parts.append("normed residual")
    return ", ".join(parts) or "layer ids as they stand" + (
        ", plain residual" if reading.normed_residual is False else ", the anchor predicts"
    )


def remedy(claimed: Reading, meant: Reading) -> str:
    """What to change in config.json."""
    steps = []
    if meant.shift != claimed.shift:
        by = meant.shift - claimed.shift
        steps.append(f"{'add' if by > 0 else 'subtract'} {abs(by)} {'to' if by > 0 else 'from'} every layer id")
    if meant.anchor_predicts and not claimed.anchor_predicts:
        steps.append("set sample_from_anchor to true")
    if claimed.anchor_predicts and not meant.anchor_predicts:
        steps.append("use an engine whose masks alone predict: this project does not run such drafters")
    if meant.normed_residual != claimed.normed_residual:
        steps.append(f"set norm_before_residual to {str(bool(meant.normed_residual)).lower()}")
    return "; ".join(steps)


def _readable(checkpoint: Checkpoint) -> tuple[Checkpoint, Reading]:
    """The checkpoint, made loadable where only a reading is in doubt, and the reading that its config claims."""
    config = checkpoint.config
    is_block = config.get("speculators_model_type", "dspark") in ("dspark", "dflash")
    if dialect(config) == "speculators" and is_block and not config.get("sample_from_anchor", False):
        return checkpoint.with_config(sample_from_anchor=True), Reading(anchor_predicts=False)
    return checkpoint, Reading()


def _readings(ids: Sequence[int], claimed: Reading, num_layers: int) -> list[Reading]:
    """Every plausible one for which the target has features."""
    shifts = [s for s in (0, -1, 1) if ids[0] + s >= -1 and ids[-1] + s <= num_layers - 2]
    if claimed.normed_residual is None:
        return [Reading(s, anchor) for s in shifts for anchor in (True, False)]
    return [
        Reading(s, True, normed) for s in shifts for normed in (claimed.normed_residual, not claimed.normed_residual)
    ]


@torch.no_grad()
def _trace(target: Target, ids: list[int], num_prompt: int, layers: tuple[int, ...], length: int) -> TraceBatch:
    """One text as the drafter would have met it, with an anchor wherever a whole draft follows in the answer."""
    out = target.extend([Span(-1, 0, ids, num_logits=1)], layers)
    target.release(-1)
    assert out.features is not None
    anchors = torch.arange(num_prompt, len(ids) - length, device=target.device)[None]
    token_ids = torch.tensor([ids], device=target.device)
    mask = torch.arange(len(ids))[None] >= num_prompt
    features = out.features.float()[None]
    return TraceBatch(token_ids, mask, features, features[..., :0], anchors, anchors > 0)


def _with_layers(trace: TraceBatch, wanted: list[int], width: int) -> TraceBatch:
    columns = trace.features.unflatten(-1, (-1, width))[:, :, wanted].flatten(-2)
    return dataclasses.replace(trace, features=columns)


@torch.no_grad()
def _hits(loaded: LoadedDrafter, trace: TraceBatch, reading: Reading) -> Tensor:
    """[anchors, K] float: is each draft token the text's, given the true tokens before it?"""
    model, ids, anchors = loaded.model, trace.token_ids[0], trace.anchors[0]
    first = 0 if reading.anchor_predicts else 1
    if isinstance(model, Eagle3Model) and reading.normed_residual is not None:
        model.layer.norm_before_residual = reading.normed_residual
    hidden = model.teacher_forced_hidden(trace, loaded.embed_tokens)[0][:, first:]
    wanted = anchors[:, None] + 1 + torch.arange(hidden.shape[1], device=ids.device)
    return (_logits(loaded, hidden, ids[wanted - 1]).argmax(-1) == ids[wanted]).float()


def _logits(loaded: LoadedDrafter, hidden: Tensor, previous: Tensor) -> Tensor:
    model, weight = loaded.model, loaded.lm_head.weight
    hidden = hidden.to(weight.dtype)  # type: ignore[arg-type]
    if isinstance(model, BlockModel):
        base = model.base_logits(hidden, loaded.lm_head).float()
        bias, _ = model.head.teacher_forced(previous, hidden.float())
        return base if bias is None else base + bias
    logits: Tensor = loaded.lm_head(hidden).float()
    if model.target_ids is None:
        return logits
    every = logits.new_full((*logits.shape[:-1], model.config.vocab_size), float("-inf"))
    every[..., model.target_ids] = logits
    return every


def _verdict(found: list[Measurement], claimed: Reading) -> list[str]:
    best, said = found[0], next(m for m in found if m.reading == claimed)
    problems = []
    if best.acceptance[0] < LEAST_ACCEPTANCE:
        problems.append(
            f"under every reading the first draft token is accepted in {best.acceptance[0]:.1%} at most: the drafter was "
            "trained for another target, another prompt format, or not at all"
        )
    elif best.reading != claimed and best.is_clearly_better(said):
        problems.append(
            f"the checkpoint means: {describe_reading(best.reading)} (tau {best.tau:.2f}); its config says: "
            f"{describe_reading(claimed)} (tau {said.tau:.2f}). In config.json {remedy(claimed, best.reading)}"
        )
    elif not claimed.anchor_predicts:
        problems.append("only its masks predict, which this project does not run: use a drafter whose anchor predicts")
    return problems


def _notes(checkpoint: Checkpoint, target: Target) -> list[str]:
    """What cannot be measured: prompt format and mask token."""
    notes, tokenizer = [], target.tokenizer
    template = checkpoint.path / "chat_template.jinja"
    if tokenizer is None:
        notes.append("the target has no tokenizer: the prompt format cannot be checked")
    elif "template_sha256" in checkpoint.config:
        notes += filter(None, [template_note(checkpoint.config, target)])
    elif not template.is_file():
        notes.append("the drafter does not say which chat template it was trained with; the target's own was used here")
    elif template.read_text(encoding="utf-8").strip() != str(tokenizer.chat_template or "").strip():
        notes.append(
            "the drafter's chat template is not the target's: acceptance in chats will be lower than it could be"
        )
    notes += filter(None, [system_prompt_note(checkpoint.config)])
    settings: dict[str, Any] = {**checkpoint.config, **(checkpoint.config.get("dflash_config") or {})}
    mask = settings.get("mask_token_id")
    if tokenizer is not None and mask in target.end_token_ids:
        notes.append(f"its mask token {mask} is one of the target's end tokens: right only if it was trained so")
    return notes
