"""EAGLE-3 at work: catch up on what the target has read, then draft token after token from the drafter's own outputs.

Row i of the cache pairs the target's feature of position i with token i + 1. All rows of committed positions come from
the target, so nothing ever has to be rolled back: what a draft wrote lies in scratch slots that the next one overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspark.drafters.context_rows import ContextRows, unread
from dspark.drafters.eagle3_model import Eagle3Model
from dspark.errors import InvalidConfiguration
from dspark.sampling import extended
from dspark.transfer import columns_on_device
from dspark.types import Draft, Request, Rule


@dataclass
class Growth:
    """What has been drafted for B requests so far: n nodes each, which are tokens of a chain or of a tree.

    rows [B]                  the requests' rows in the cache
    starts [B]                position of the first node's row: the anchor's
    visible [B]               context slots of each request; most_visible is the largest, which the host must know
    hidden [B, 1 + n, H]      the layer's output where the anchor was read, then at every node
    depth [B, n]              0 for nodes right after the anchor
    ancestors [B, n, n]       node j is an ancestor of node i, or is i
    """

    rows: Tensor
    starts: Tensor
    visible: Tensor
    most_visible: int
    hidden: Tensor
    depth: Tensor
    ancestors: Tensor


class Eagle3Drafter:
    """Runs an Eagle3Model for many requests at once. It has no confidence head, so drafts come without confidences.

    lm_head      gives logits over the draft vocabulary: [H] -> [W]
    length       draft tokens per step; None: as many as training unrolled
    window       committed positions a draft can see, the newest ones; None: all. It bounds memory and time per request.
    num_scratch  draft tokens that can be read in one step; None: what a chain needs
    """

    def __init__(
        self,
        model: Eagle3Model,
        embed_tokens: nn.Module,
        lm_head: nn.Module,
        length: int | None = None,
        window: int | None = None,
        num_scratch: int | None = None,
    ) -> None:
        if length is not None and length < 1:
            raise InvalidConfiguration(f"length must be 1 or more; got {length}")
        if window is not None and window < 1:
            raise InvalidConfiguration(f"window must be 1 or more, or None for all positions; got {window}")
        config = model.config
        self.model, self.embed_tokens, self.lm_head = model, embed_tokens, lm_head
        self.length = config.ttt_length if length is None else length
        self.feature_layers = tuple(config.target_layer_ids)
        self.dtype, self.device = model.fc.weight.dtype, model.fc.weight.device
        self.target_ids = model.target_ids
        key_shape = (config.num_key_value_heads, config.head_dim)
        # At least one scratch slot, where an empty row of a batch can look without being NaN.
        num_scratch = max(1, self.length - 1) if num_scratch is None else num_scratch
        self.rows = ContextRows(1, key_shape, num_scratch, window, like=model.fc.weight)

    @torch.no_grad()
    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        able = self.able(requests)
        asked = [requests[b] for b in able]
        if not asked:
            return Draft.empty(len(requests))
        noise = rule.noise_ahead(asked, self.length)
        growth, logits = self.begin(asked)
        drawn: list[Tensor] = []
        laws: list[Tensor] = []
        paths: list[list[int]] = [[] for _ in asked]
        for k in range(self.length):
            if noise is None:
                tokens, law = rule.draft(logits, asked, paths)
                paths = extended(paths, tokens, asked)
                laws += [] if law is None else [law]
            else:
                tokens = (logits + noise[:, min(k, noise.shape[1] - 1)]).argmax(-1)
            drawn.append(tokens)
            if k + 1 < self.length:
                logits = self.grow(growth, tokens[:, None], torch.full_like(tokens, k - 1)[:, None])[:, 0]
        sizes = torch.full((len(asked),), self.length, dtype=torch.long)
        draft = Draft(torch.stack(drawn, 1), sizes, probs=torch.stack(laws, 1) if laws else None)
        return draft.among(able, len(requests))

    def release(self, request_id: int) -> None:
        self.rows.release(request_id)

    def able(self, requests: Sequence[Request]) -> list[int]:
        """Places of the requests that have a token before the anchor: EAGLE-3 starts from the feature of one."""
        return [b for b, r in enumerate(requests) if len(r.tokens) > 1]

    def begin(self, requests: Sequence[Request]) -> tuple[Growth, Tensor]:
        """Read what was committed since the last call; logits [B, V] of each request's first draft token."""
        ids, layer = [r.id for r in requests], self.model.layer
        runs, pieces = unread(self.rows, requests)
        assert all(runs), "EAGLE-3 drafts once for every token that is committed"
        rows, slots = self.rows.claim(ids, runs)
        count = sum(map(len, runs))
        # Row i pairs position i with the token after it.
        flat = [r.tokens[i + 1] for r, run in zip(requests, runs, strict=True) for i in run]
        most_visible = max(self.rows.num_visible(i) for i in ids)
        numbers = [
            flat,
            [p for run in runs for p in run],
            rows[:count],
            slots[:count],
            [end - 1 for end in accumulate(map(len, runs))],
            [self.rows.num_visible(i) for i in ids],
            [self.rows.row(i) for i in ids],
        ]
        tokens, positions, *where, last, visible, own = columns_on_device(numbers, self.device)
        x = self.model.fc(torch.cat([piece.cut for piece in pieces]).to(self.dtype))
        inputs = layer.inputs(self._embed(tokens), x)
        rotary = self.model.rotary(positions, self.dtype)
        key, value = layer.self_attn.key_value(inputs, rotary)
        self.rows.keys[0][tuple(where)], self.rows.values[0][tuple(where)] = key, value
        # A single layer: only the last row's attention is ever asked for.
        none = torch.zeros(len(ids), 0, dtype=torch.long, device=self.device)
        growth = Growth(
            rows=own,
            starts=positions[last] + 1,
            visible=visible,
            most_visible=most_visible,
            hidden=x.new_zeros(len(ids), 0, x.shape[-1]),
            depth=none,
            ancestors=torch.zeros(len(ids), 0, 0, dtype=torch.bool, device=self.device),
        )
        query = layer.self_attn.query(inputs[last], self.model.rotary(positions[last], self.dtype))
        hidden = layer.finish(x[last], self._attend(growth, query[:, None], none[:, None, :].bool())[:, 0])
        growth.hidden = hidden[:, None]
        return growth, self._logits(hidden)

    def grow(self, growth: Growth, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read M more tokens per request: tokens, parents [B, M] -> logits [B, M, V] of what follows each.

        parents are numbers of nodes that were read before; -1 is the anchor.
        """
        layer, (batch, count) = self.model.layer, tokens.shape
        num_before = growth.depth.shape[1]
        assert num_before + count <= self.rows.block_size, "more nodes than num_scratch has room for"
        x = growth.hidden.gather(1, (parents + 1)[..., None].expand(-1, -1, growth.hidden.shape[-1]))
        above = torch.cat([growth.depth.new_full((batch, 1), -1), growth.depth], 1).gather(1, parents + 1)
        growth.depth = torch.cat([growth.depth, above + 1], 1)
        positions = growth.starts[:, None] + above + 1
        inherited = F.pad(growth.ancestors, (0, 0, 1, 0)).gather(1, (parents + 1)[..., None].expand(-1, -1, num_before))
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        seen = torch.cat([inherited, own], 2)
        growth.ancestors = torch.cat([F.pad(growth.ancestors, (0, count)), seen], 1)

        inputs = layer.inputs(self._embed(tokens), x).flatten(0, 1)
        rotary = self.model.rotary(positions.flatten(), self.dtype)
        key, value = layer.self_attn.key_value(inputs, rotary)
        slots = torch.arange(num_before, num_before + count, device=tokens.device)
        where = (growth.rows[:, None], slots[None])
        self.rows.keys[0][where] = key.unflatten(0, (batch, count))
        self.rows.values[0][where] = value.unflatten(0, (batch, count))
        query = layer.self_attn.query(inputs, rotary).unflatten(0, (batch, count))
        hidden = layer.finish(x, self._attend(growth, query, seen))
        growth.hidden = torch.cat([growth.hidden, hidden], 1)
        return self._logits(hidden)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embed_tokens(tokens)
        return embedded.to(self.dtype)

    def _attend(self, growth: Growth, query: Tensor, seen: Tensor) -> Tensor:
        """query [B, M, heads, D] over the context and the nodes in seen [B, M, n] -> [B, M, heads * D]."""
        num_scratch = self.rows.block_size
        num_slots = num_scratch + growth.most_visible
        slots = torch.arange(num_slots, device=query.device)
        is_context = (slots >= num_scratch) & (slots < num_scratch + growth.visible[:, None])
        mask = is_context[:, None].repeat(1, query.shape[1], 1)
        mask[:, :, : seen.shape[2]] = seen
        keys = self.rows.keys[0][:, :num_slots].index_select(0, growth.rows)
        values = self.rows.values[0][:, :num_slots].index_select(0, growth.rows)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask[:, None],
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).flatten(2)

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V] by target token id; -inf for tokens it cannot draft."""
        logits: Tensor = self.lm_head(self.model.norm(hidden)).float()
        if self.target_ids is None:
            return logits
        every = logits.new_full((*logits.shape[:-1], self.model.config.vocab_size), float("-inf"))
        every[..., self.target_ids] = logits
        return every
