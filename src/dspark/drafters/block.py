"""A parallel drafter at work: DSpark, and DFlash, which is DSpark with its heads off (paper, section 3.1).

One pass over a block of positions gives base logits for every draft token; the sequential head then corrects and draws
them left to right. What the block attends to is the context: projected target features of all committed positions but
the anchor, as keys and values that are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dspark.budget.calibration import Calibration
from dspark.drafters.block_model import BlockModel
from dspark.drafters.block_step import Step, attend_to_rows
from dspark.drafters.captured_draft import CapturedDraft
from dspark.drafters.compiled_draft import CompiledDraft
from dspark.drafters.context_rows import ContextRows, unread
from dspark.drafters.heads import MarkovHead, NoHead, TabulatedHead
from dspark.errors import InvalidConfiguration
from dspark.gradients import without_gradients
from dspark.sampling import extended
from dspark.target.captured import GraphRecorder, Outputs, Recorder
from dspark.target.kept_graphs import kept_graphs
from dspark.target.kernels import kernel_for
from dspark.target.linears import with_packed_linears
from dspark.transfer import on_device, tables_on_device
from dspark.types import Draft, FeaturePiece, Request, Rule


@dataclass
class BlockGrowth:
    """A block of B requests, and the n nodes that the sequential head has read after it.

    hidden [B, K, H], base [B, K, V]  by depth: the same for all nodes of a depth
    depth  [B, n]         0 for nodes right after the anchor
    states [B, 1 + n, r]  the head's, after the anchor and after every node; None: it has none
    """

    hidden: Tensor
    base: Tensor
    depth: Tensor
    states: Tensor | None


class BlockDrafter:
    """Runs a BlockModel for many requests at once.

    length  draft tokens proposed per step; None: all the model's block gives
    window  committed positions a block can see, the newest ones; None: all. It bounds memory and time per request.
    """

    def __init__(
        self,
        model: BlockModel,
        embed_tokens: nn.Module,
        lm_head: nn.Module,
        length: int | None = None,
        window: int | None = None,
    ) -> None:
        block_size = model.config.block_size
        if length is not None and not 1 <= length <= block_size:
            raise InvalidConfiguration(f"length must be 1 to {block_size}, the drafter's block size; got {length}")
        if window is not None and window < 1:
            raise InvalidConfiguration(f"window must be 1 or more, or None for all positions; got {window}")
        self.model, self.embed_tokens, self.lm_head = model, embed_tokens, lm_head
        self.folder: Path | None = None  # where it was loaded from
        self.calibration: Calibration | None = None  # of its confidences, which it states as they are
        self.feature_layers = tuple(model.config.target_layer_ids)
        self.block_size = block_size
        self.length = block_size if length is None else length
        self.dtype, self.device = model.fc.weight.dtype, model.fc.weight.device
        key_shape = (model.config.num_key_value_heads, model.config.head_dim)
        self._head: MarkovHead | TabulatedHead | NoHead = model.head
        self.rows = ContextRows(model.config.num_hidden_layers, key_shape, block_size, window, like=model.fc.weight)
        self.reads_pieces = True  # where their features lie, which spares a step cutting them out
        self.leaves_chains = True  # always `length` tokens for each, which stay on the device until they are asked for
        self._is_compiled = False
        self._graph: Callable[[Step, Tensor], Outputs] | None = None  # what runs usual steps; None: `_run`
        self._has_kernel = False  # for usual steps: they take any rows, and whole ones; else the first ones only
        self._is_recorded = False  # usual steps, which then have one size for each number of requests

    def compile(self) -> None:
        """Compile the usual step (the coupled rule with a plain temperature): a graph for one request, one for more.

        Each takes some seconds at its first use. On CPU the weights are packed into it for its kernels. Once is enough,
        however many engines share the drafter.
        """
        if self._is_compiled:
            return
        self._is_compiled = True
        self._head = self.model.head.for_drawing()
        self.model = cast(BlockModel, with_packed_linears(self.model))
        self.lm_head = with_packed_linears(self.lm_head)
        parts = {"model": self.model, "head": self._head, "embedding": self.embed_tokens, "logits": self.lm_head}
        self._graph = CompiledDraft(
            self._run, self.device, kept_graphs(parts, self.model.config, self.length, self.block_size)
        )
        self._has_kernel = kernel_for(self.model.fc.weight, self.block_size) is not None
        if self.device.type == "cuda" and self._has_kernel:
            self.capture(GraphRecorder(self.device))

    def capture(self, record: Recorder) -> None:
        """Record usual steps and replay them: compiled ones where they are. Only where a kernel attends over slots."""
        self._graph = CapturedDraft(self._graph or self._run, record)
        self._has_kernel = self._is_recorded = True

    @without_gradients
    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        """A chain for each request, from one pass over all their blocks."""
        if not requests:
            return Draft.empty(0)
        # In the order of their rows the context of all requests is a view, not a copy.
        ordered = sorted(requests, key=lambda r: self.rows.row(r.id))
        noise, probs = rule.noise_ahead(ordered, self.length), None
        step = self._prepare(ordered, for_graph=self._graph is not None and noise is not None)
        if noise is None:
            tokens, confidence, probs = self._draw_by_rule(step, *self._block(step), ordered, rule)
        elif self._graph is None or not step.news.shape[1] or not (self._has_kernel or step.is_first):
            tokens, confidence = self._run(step, noise)
        else:
            tokens, confidence = self._run_graph(step, noise)
        if ordered != list(requests):
            place = {r.id: row for row, r in enumerate(ordered)}
            order = on_device([place[r.id] for r in requests], tokens.device)
            tokens = tokens[order]
            confidence = None if confidence is None else confidence[order]
            probs = None if probs is None else probs[order]
        return Draft(tokens, _sizes(len(requests), self.length), confidence, probs=probs)

    def able(self, requests: Sequence[Request]) -> list[int]:
        """Places of the requests that it can draft for: all."""
        return list(range(len(requests)))

    def begin(self, requests: Sequence[Request]) -> tuple[BlockGrowth, Tensor]:
        """The one pass that all nodes share; logits [B, V] of each request's first draft token."""
        step = self._prepare(requests, for_graph=False)
        hidden, base = self._block(step)
        state = self._head.initial_state(len(requests))
        bias, _, state = self._head.step(step.anchors, hidden[:, 0], state)
        depth = torch.zeros(len(requests), 0, dtype=torch.long, device=self.device)
        growth = BlockGrowth(hidden, base, depth, None if state is None else state[:, None])
        return growth, base[:, 0] if bias is None else base[:, 0] + bias.float()

    def grow(self, growth: BlockGrowth, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read M more tokens per request: tokens, parents [B, M] (-1: the anchor) -> logits [B, M, V] of what follows.

        Only the sequential head runs: without one, all nodes of a depth have the same followers.
        """
        batch, count = tokens.shape
        above = torch.cat([growth.depth.new_full((batch, 1), -1), growth.depth], 1).gather(1, parents + 1)
        growth.depth = torch.cat([growth.depth, above + 1], 1)
        where = (torch.arange(batch, device=tokens.device)[:, None], above + 2)
        state = None
        if growth.states is not None:
            places = (parents + 1)[..., None].expand(-1, -1, growth.states.shape[-1])
            state = growth.states.gather(1, places).flatten(0, 1)
        bias, _, state = self._head.step(tokens.flatten(), growth.hidden[where].flatten(0, 1), state)
        if growth.states is not None and state is not None:
            growth.states = torch.cat([growth.states, state.unflatten(0, (batch, count))], 1)
        base = growth.base[where]
        return base if bias is None else base + bias.float().unflatten(0, (batch, count))

    @without_gradients
    def read(self, requests: Sequence[Request]) -> None:
        """Take in features without drafting, for requests that are not drafted for at present."""
        runs, pieces = unread(self.rows, requests)
        rows, slots = self.rows.claim([r.id for r in requests], runs)
        positions = [p for run in runs for p in run]
        features = torch.cat([piece.cut for piece in pieces]).to(self.dtype)
        (news,) = tables_on_device([[positions, rows, slots, range(len(positions))]], self.device)
        self._write(features, news)

    def release(self, request_id: int) -> None:
        self.rows.release(request_id)

    def _prepare(self, requests: Sequence[Request], for_graph: bool) -> Step:
        """Collect what was committed since the last call and find places for it.

        for_graph: of one request two news or more, because graphs tell one apart from all other numbers. Of many, or where
        it is recorded, as many as one step can bring at most, the same number whatever was accepted.
        """
        ids, size = [r.id for r in requests], len(requests)
        runs, pieces = unread(self.rows, requests)
        rows, slots = self.rows.claim(ids, runs)
        positions = [p for run in runs for p in run]
        features, which = self._side_by_side(pieces)
        if for_graph and features.shape[0] == 1:
            features = features.expand(2, -1).contiguous()
        least = (size * (self.block_size + 1) if self._needs_one_size(size) else 2) if for_graph else 0
        if 0 < len(positions) < least:
            # The first piece once more, as often as is missing: writing the same to the same slot does nothing.
            missing = least - len(positions)
            positions, rows, slots, which = (v[:1] * missing + v for v in (positions, rows, slots, which))
        starts, visible = [len(r.tokens) - 1 for r in requests], [self.rows.num_visible(i) for i in ids]
        anchors, chosen = [r.tokens[-1] for r in requests], [self.rows.row(i) for i in ids]
        tables = [[positions, rows, slots, which], [anchors, starts, visible, chosen]]
        news, each = tables_on_device(tables, self.device)
        mask = None
        if not (for_graph and self._has_kernel):
            num_slots = self.block_size + max(visible)
            mask = self.rows.keys[0].new_zeros(size, 1, 1, num_slots)
            if size > 1:
                ends = each[2][:, None, None, None] + self.block_size
                mask.masked_fill_(torch.arange(num_slots, device=self.device) >= ends, float("-inf"))
        return Step(
            features=features if features.dtype == self.dtype else features.to(self.dtype),
            news=news,
            each=each,
            mask=mask,
            is_first=mask is not None and self.rows.is_prefix(ids),
            keys=self.rows.keys,
            values=self.rows.values,
        )

    def _side_by_side(self, pieces: Sequence[FeaturePiece]) -> tuple[Tensor, list[int]]:
        """Features [M, F], and which of them are the pieces' own. One piece alone is not cut out: a graph finds its rows
        sooner than a view of them is made."""
        if len(pieces) == 1:
            return pieces[0].features, [*pieces[0].places]
        features = torch.cat([piece.cut for piece in pieces]) if pieces else self.model.fc.weight[:0]
        return features, [*range(features.shape[0])]

    def _needs_one_size(self, num_requests: int) -> bool:
        """Whether a graph takes as many news of so many requests as they can bring in a step, and no other number."""
        return num_requests > 1 or self._is_recorded

    def _run(self, step: Step, noise: Tensor) -> Outputs:
        """A whole step; tensors only, so that it can be one graph."""
        return self._draw_ahead(step, *self._block(step), noise)

    def _run_graph(self, step: Step, noise: Tensor) -> Outputs:
        """As _run, in shapes of which there are few."""
        assert self._graph is not None
        batch, num_news = step.each.shape[1], step.news.shape[1]
        early = num_news - batch * (self.block_size + 1)
        if early > 0 and self._needs_one_size(batch):  # a prompt: all but its end is read outside
            self._write(step.features, step.news[:, :early])
            step = step._replace(news=step.news[:, early:].contiguous())
        if noise.numel() == 1:  # the same for all tokens is none at all
            noise = _silence((batch, self.length, self.model.config.vocab_size), noise.device)
        return self._graph(step, noise)

    def _write(self, features: Tensor, news: Tensor) -> None:
        """Keep keys and values of context, without drafting."""
        positions, rows, slots, which = news
        context = self.model.context(features.index_select(0, which))
        for layer, (k, v) in enumerate(self.model.context_keys_values(context, positions)):
            self.rows.keys[layer].index_put_((rows, slots), k)
            self.rows.values[layer].index_put_((rows, slots), v)

    def _block(self, step: Step) -> tuple[Tensor, Tensor]:
        """One pass over the blocks: states [B, K, H] of the anchor and the masks after it, and base logits [B, K, V].

        The whole block runs, however few of its tokens are wanted: that is what the model was trained on.
        """
        slots = torch.arange(self.block_size, device=step.anchors.device)
        tokens = torch.where(slots == 0, step.anchors[:, None], self.model.config.mask_token_id)
        positions = step.starts[:, None] + slots
        context = self.model.context(step.features.index_select(0, step.news[3]))
        news = self.model.context_keys_values(context, step.news[0])
        places = step.places(self.block_size)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = torch.cat([news[layer][0], k]), torch.cat([news[layer][1], v])
            return attend_to_rows(q, keys, values, step, places, layer)

        hidden = self.model.block(self.embed_tokens(tokens.flatten()).to(self.dtype), positions.flatten(), attend)
        hidden = hidden.view(*tokens.shape, -1)[:, : self.length]
        return hidden, self.model.base_logits(hidden, self.lm_head).float()

    def _draw_ahead(self, step: Step, hidden: Tensor, base: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw with noise [B, K or 1, V or 1] that is known beforehand: tensors only, nothing waits for the host."""
        head, scores, previous = self._head, base + noise, step.anchors
        drawn, embedded, state = [], [], head.initial_state(len(previous))
        for k in range(self.length):
            bias, e, state = head.step(previous, hidden[:, k], state)
            previous = (scores[:, k] if bias is None else scores[:, k] + bias.float()).argmax(-1)
            drawn.append(previous)
            embedded.append(e)
        return torch.stack(drawn, 1), self._confidence(hidden, embedded)

    def _draw_by_rule(
        self, step: Step, hidden: Tensor, base: Tensor, requests: Sequence[Request], rule: Rule
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Draw through the rule, whatever sampling parameters and laws it needs."""
        head, previous = self._head, step.anchors
        drawn, laws, embedded, state = [], [], [], head.initial_state(len(previous))
        paths: list[list[int]] = [[] for _ in requests]
        for k in range(self.length):
            bias, e, state = head.step(previous, hidden[:, k], state)
            previous, law = rule.draft(base[:, k] if bias is None else base[:, k] + bias.float(), requests, paths)
            paths = extended(paths, previous, requests)
            drawn.append(previous)
            embedded.append(e)
            if law is not None:
                laws.append(law)
        return torch.stack(drawn, 1), self._confidence(hidden, embedded), torch.stack(laws, 1) if laws else None

    def _confidence(self, hidden: Tensor, embedded: list[Tensor | None]) -> Tensor | None:
        """[B, K]  entry k is a function of the state at k and of the token before: known before token k is drawn."""
        e = None if embedded[0] is None else torch.stack([e for e in embedded if e is not None], 1)
        logit = self.model.confidence(hidden, e)
        return None if logit is None else torch.sigmoid(logit.float())


@lru_cache(maxsize=256)
def _sizes(num_requests: int, length: int) -> Tensor:
    """[B]  for reading only: the same for all."""
    return torch.full((num_requests,), length, dtype=torch.long)


@lru_cache(maxsize=4)
def _silence(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Zeros, for reading only."""
    return torch.zeros(shape, device=device)
