"""Draws on GPU in one pass over the logits: noise is made where it is added, and only the winners are written.

Import it only where Triton is installed. The noise is that of noise.py word for word; its logarithms round differently,
so a token may differ from the reference's only where the two best scores agree to about 1e-6.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUADS = 1024  # one Philox call gives the noise of four tokens


@triton.jit
def _gumbel(word):
    """float32 standard Gumbel of a 32-bit word, as noise.gumbel: -log(-log(1 - c))."""
    c = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log(1 - c) loses small c, where noise is large: there a series, which no approximate logarithm can spoil.
    s = c / (2.0 - c)
    z = s * s
    series = 1.0 / 13.0 + z * (1.0 / 15.0)
    series = 1.0 / 9.0 + z * (1.0 / 11.0 + z * series)
    series = 1.0 / 5.0 + z * (1.0 / 7.0 + z * series)
    series = 2.0 * s * (1.0 + z * (1.0 / 3.0 + z * series))
    return -tl.log(tl.where(c < 0.5, series, -tl.log(1.0 - c)))


@triton.jit(do_not_specialize=["stream", "num_blocks"])
def _best_of_block(
    scores,  # [N, V]
    temperature,  # [N]
    seeds,  # [N]
    positions,  # [N]
    best,  # [N, blocks] float32: highest score with noise
    token,  # [N, blocks]: the first that has it
    stream,
    vocab_size,
    num_blocks,
    QUADS: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * QUADS * 4 + tl.arange(0, QUADS * 4)
    exists = column < vocab_size
    own = tl.load(scores + row.to(tl.int64) * vocab_size + column, exists, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row).to(tl.float32)
    if heat > 0:
        quad = block * QUADS + tl.arange(0, QUADS)
        w0, w1, w2, w3 = tl.philox(tl.load(seeds + row), quad, tl.load(positions + row).to(tl.int32), stream, 0)
        own += heat * _gumbel(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
    highest = tl.max(own, 0)
    cell = row * num_blocks + block
    tl.store(best + cell, highest)
    # The last one where there is no largest: an id that is none would end in a fault of the device.
    tl.store(token + cell, tl.min(tl.where(exists & (own == highest), column, vocab_size - 1), 0))


def draw(scores: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """[N] tokens: argmax(scores [N, V] + temperature [N, 1] * noise), the first one of equals; seeds, positions [N]."""
    scores = scores.contiguous()
    num_rows, vocab_size = scores.shape
    num_blocks = triton.cdiv(vocab_size, 4 * _QUADS)
    best = scores.new_empty(num_rows, num_blocks, dtype=torch.float32)
    token = scores.new_empty(num_rows, num_blocks, dtype=torch.long)
    if num_rows:
        with torch.cuda.device_of(scores):  # Triton launches on the current device, whatever its tensors lie on
            _best_of_block[(num_rows, num_blocks)](
                scores, temperature, seeds, positions, best, token, stream, vocab_size, num_blocks, QUADS=_QUADS
            )
    return token.gather(1, best.argmax(1, keepdim=True))[:, 0]
