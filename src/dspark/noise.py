"""Noise that depends on (seed, position, stream, token id) and on nothing else.

The coupled rule adds the same Gumbel noise to the draft's and to the target's logits and never draws it twice, which
is what makes the text a function of the seed alone (Gumbel coupling; Daliri et al. 2024). So the generator is
counter-based: Philox4x32-10 (Salmon et al., SC 2011), the one GPUs and Triton use, written over int64 tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Independent streams. The rejection rule must never share one between its three draws at a position (vllm#47386).
COUPLED, DRAFT, RESIDUAL, ACCEPT = 0, 1, 2, 3

# From C++, once target/native.py has built them: the same numbers, and where scores + heats * noise are largest.
keyed_uniform: Callable[..., Tensor] | None = None
largest: Callable[..., Tensor] | None = None

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# A request that runs is asked for at least once a step, which is a call or two, or one more for each token of a draft that
# is drawn one by one. Others have passed.
_CALLS_KEPT = 64


def philox(counter: tuple, key: tuple[int, int], rounds: int = 10) -> tuple:
    """Philox4x32: four 32-bit words from a 128-bit counter, elementwise over int64 tensors, Python ints or both."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # Products of two 32-bit words wrap around in int64; shifting and masking recovers both halves all the same.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> 32 & _MASK) ^ c1 ^ k0, right & _MASK, (left >> 32 & _MASK) ^ c3 ^ k1, left & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int, stream: int) -> float:
    """One number in [0, 1) on the grid of 2^-32."""
    return philox((0, position, stream, 0), _key(seed))[0] * 2.0**-32


def gumbel(
    seed: int, first_position: int, num_positions: int, vocab_size: int, stream: int, device: torch.device
) -> Tensor:
    """[num_positions, V] float32, standard Gumbel, always finite."""
    # 1 - u in place of u: single precision resolves the end that makes large noise; the clamp keeps the other finite.
    if keyed_uniform is not None and device.type == "cpu":
        complement = keyed_uniform(*_key(seed), first_position, num_positions, vocab_size, stream)
    else:
        quads = torch.arange((vocab_size + 3) // 4, device=device)
        positions = torch.arange(first_position, first_position + num_positions, device=device)[:, None]
        words = philox((quads, positions, stream, 0), _key(seed))  # first rounds are cheap: their words still broadcast
        complement = torch.stack(words, -1).flatten(1)[:, :vocab_size].float().add_(0.5).mul_(2.0**-32)
    return complement.clamp_max_(1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


class GumbelNoise:
    """Gumbel rows by (seed, position), made a block of positions at a time and kept while a request passes through.

    Drafting and verifying ask for the same rows several times over; the cache bounds what that costs. A row that was
    dropped is made again, bit for bit.

    none [1, 1, 1]  what there is where nobody samples: for reading only
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu", max_bytes: int = 2**28) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.block = max(4, min(64, 2**16 // vocab_size))  # so many draws at once still fit a core's cache
        self.max_blocks = max(4, max_bytes // (4 * self.block * vocab_size))
        self.none = torch.zeros(1, 1, 1, device=self.device)
        self._silence = torch.zeros(self.block, vocab_size, device=self.device)
        self._blocks: OrderedDict[tuple[int, int, int], tuple[Tensor, int]] = OrderedDict()  # and the call that used it
        self._num_calls = 0

    def rows(self, seeds: Sequence[int | None], positions: Sequence[int], stream: int) -> Tensor:
        """[N, V]  the noise of N (seed, position) pairs; runs of following positions are cut out in one piece.

        Without a seed there is none: zeros, for rows at temperature 0.
        """
        if not seeds:  # a step that only reads parts of prompts
            return torch.zeros(0, self.vocab_size, device=self.device)
        self._num_calls += 1
        pieces, start = [], 0
        while start < len(seeds):
            seed, position = seeds[start], positions[start]
            index, offset = divmod(position, self.block)
            stop = start + 1
            while (
                stop < len(seeds)
                and seeds[stop] == seed
                and positions[stop] == position + stop - start
                and offset + stop - start < self.block
            ):
                stop += 1
            pieces.append(self._block(seed, index, stream)[offset : offset + stop - start])
            start = stop
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _block(self, seed: int | None, index: int, stream: int) -> Tensor:
        if seed is None:
            return self._silence
        name = (seed, index, stream)
        block, _ = self._blocks.pop(name, (None, 0))
        if block is None:
            block = gumbel(seed, index * self.block, self.block, self.vocab_size, stream, self.device)
            self._make_room()
        self._blocks[name] = block, self._num_calls  # behind all others
        return block

    def _make_room(self) -> None:
        """For one block more: drop what requests that have passed have left, and otherwise what was not used for longest."""
        while self._blocks:
            _, last_call = next(iter(self._blocks.values()))
            if len(self._blocks) < self.max_blocks and last_call >= self._num_calls - _CALLS_KEPT:
                return
            self._blocks.popitem(last=False)


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, seed >> 32 & _MASK
