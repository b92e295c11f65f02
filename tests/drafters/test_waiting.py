"""The host never waits for the device within a forward or a draft: on tensors without values, reading one would raise."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.drafters import block_step
from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.noise import COUPLED
from dspark.sampling import KeyedDraws, shape_logits
from dspark.target import Target, attention
from dspark.target.native import attended_shape
from dspark.types import Request, SamplingParams, Span
from target.tape import RunAgain

_SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


class OneDevice(TorchDispatchMode):
    """Refuses operators that a device would refuse: some of their tensors lie on the host, and they are no copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        assert "copy" in str(func) or len({t.device.type for t in tensors}) <= 1, f"{func} mixes devices"
        return func(*args, **(kwargs or {}))


class NoiseAhead:
    """The coupled rule as far as a block drafter asks it at one temperature for all."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def noise_ahead(self, requests, length):
        return torch.zeros(len(requests), length, self.vocab_size, device="meta")


def test_forwards_and_drafts_ask_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_for(query, num_queries, in_fixed_order=False):
        return attended_shape

    monkeypatch.setattr(attention, "kernel_for", kernel_for)
    monkeypatch.setattr(block_step, "kernel_for", kernel_for)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**_SIZES)).eval().requires_grad_(False)
        config = BlockConfig(
            **_SIZES,
            target_layer_ids=(0, 1),
            block_size=4,
            mask_token_id=3,
            markov_rank=8,
            enable_confidence_head=True,
            confidence_head_with_markov=True,
        )
        drafter = BlockModel(config).requires_grad_(False)
    target = Target(model)
    drafts = BlockDrafter(drafter, model.get_input_embeddings(), model.get_output_embeddings())
    with OneDevice():
        prompts = target.extend([Span(0, 0, (1,) * 20), Span(1, 0, (1,) * 5, num_logits=1)], drafts.feature_layers)
        mixed = [Span(0, 20, (1,) * 5, num_logits=5), Span(1, 5, (1,), num_logits=1), Span(2, 0, (1,) * 30)]
        assert target.extend(mixed, drafts.feature_layers).logits.shape == (6, 96)
        requests = [
            Request(r, [1] * (n + 1), SamplingParams(), n, num_cached=n, features=prompts.features[:n])
            for r, n in enumerate((20, 5))
        ]
        draft = drafts.propose(requests, NoiseAhead(96))
    assert draft.tokens.device.type == "meta" and draft.tokens.shape == (2, 4)
    again = RunAgain()
    target.capture(again)  # inputs come from the host, padded, and are copied over
    drafts.capture(again)
    for request in requests:  # usual steps are those of the first rows
        drafts.release(request.id)
    with OneDevice():
        spans = [Span(0, 25, (1,) * 3, num_logits=2), Span(1, 6, (1,), num_logits=1)]
        assert target.extend(spans).logits.shape == (3, 96)
        request = Request(2, [1] * 6, SamplingParams(), 5, num_cached=5, features=prompts.features[:5])
        draft = drafts.propose([request], NoiseAhead(96))
    assert draft.tokens.device.type == "meta" and draft.tokens.shape == (1, 4)
    assert again.num_recordings == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_draws_are_launched_while_the_device_is_still_at_work():
    logits = torch.randn(3, 96, device="cuda")
    draws, request = KeyedDraws(96, "cuda"), Request(0, [1], SamplingParams(temperature=0.5, top_k=5), 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores, temperature = shape_logits(logits, [request] * 3, [[]] * 3)
        draws.tokens(scores, temperature, [7] * 3, [0, 1, 2], COUPLED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
