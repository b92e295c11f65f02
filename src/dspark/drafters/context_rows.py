"""Where a parallel drafter keeps the keys and values of its context: one row per request."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark import pages
from dspark.types import FeaturePiece, Request


class ContextRows:
    """Keys and values of committed positions, and room in every row for the block being drafted.

    keys, values  per layer [rows, slots, KV, D]
    block_size    slots 0..P-1 of a row are scratch for the block: what a draft leaves there, the next one overwrites
    window        positions kept per request, the newest ones; None: all

    Position p lies in slot P + p % window. A block attends to its whole context without an order (keys carry their
    rotation), so the oldest position may be overwritten in place, and no key is ever moved or concatenated.
    The requests at hand always have rows 0..num_rows-1, so a batch of all of them is a view.
    """

    def __init__(
        self, num_layers: int, key_shape: tuple[int, int], block_size: int, window: int | None, like: Tensor
    ) -> None:
        """key_shape (KV, D); dtype and device as of `like`."""
        self.block_size, self.window = block_size, window
        self.keys = [like.new_zeros(0, block_size, *key_shape) for _ in range(num_layers)]
        self.values = [like.new_zeros(0, block_size, *key_shape) for _ in range(num_layers)]
        self._owners: list[int] = []  # row -> request id
        self._rows: dict[int, int] = {}
        self._num_read: dict[int, int] = {}

    @property
    def num_rows(self) -> int:
        return len(self._owners)

    def num_read(self, request_id: int) -> int:
        """Positions whose keys and values were written; the next one to write."""
        return self._num_read.get(request_id, 0)

    def num_visible(self, request_id: int) -> int:
        """Positions that are still there."""
        num_read = self.num_read(request_id)
        return num_read if self.window is None else min(num_read, self.window)

    def row(self, request_id: int) -> int:
        """The row of a request, given to it at the first call."""
        if request_id not in self._rows:
            self._rows[request_id] = len(self._owners)
            self._owners.append(request_id)
        return self._rows[request_id]

    def release(self, request_id: int) -> None:
        """Forget a request. The last row moves into the gap."""
        self._num_read.pop(request_id, None)
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        last = self._owners.pop()
        if last != request_id:
            self._owners[row], self._rows[last] = last, row
            used = self.block_size + self.num_visible(last)
            for store in (*self.keys, *self.values):
                store[row, :used] = store[len(self._owners), :used]

    def claim(self, request_ids: Sequence[int], runs: Sequence[range]) -> tuple[list[int], list[int]]:
        """Make room for a run of positions of each request and count them as read.

        rows (N), slots (N)  where the keys and values of the runs go, back to back.
        """
        rows: list[int] = []
        slots: list[int] = []
        longest = 0
        for request_id, run in zip(request_ids, runs, strict=True):
            rows += [self.row(request_id)] * len(run)
            slots += [self.block_size + (p if self.window is None else p % self.window) for p in run]
            self._num_read[request_id] = run.stop
            longest = max(longest, run.stop)
        self.reserve(longest)
        return rows, slots

    def reserve(self, num_positions: int) -> None:
        """Room for so many positions in every row. Both sizes double, so a token is copied about once on average."""
        rows, slots, kv_heads, width = self.keys[0].shape
        need_rows, need_slots = len(self._owners), self.block_size + min(num_positions, self.window or num_positions)
        if need_rows <= rows and need_slots <= slots:
            return
        new_rows = rows if need_rows <= rows else max(need_rows, 2 * rows, 2)
        new_slots = slots if need_slots <= slots else max(need_slots, 2 * slots, 256)
        if self.window is not None:
            new_slots = min(new_slots, self.block_size + self.window)

        def grown(store: Tensor) -> Tensor:
            # Zeros, not empty: attention multiplies what the mask hides by 0, and 0 * NaN is NaN.
            larger = pages.zeros((new_rows, new_slots, kv_heads, width), store)
            larger[:rows, :slots] = store
            return larger

        self.keys, self.values = [grown(k) for k in self.keys], [grown(v) for v in self.values]

    def is_prefix(self, request_ids: Sequence[int]) -> bool:
        """Whether these requests have rows 0, 1, 2, … in this order: their context is a view then."""
        return list(request_ids) == self._owners[: len(request_ids)]


def unread(rows: ContextRows, requests: Sequence[Request]) -> tuple[list[range], list[FeaturePiece]]:
    """Positions of each request that were not read before, and their features, in pieces one after another."""
    runs: list[range] = []
    pieces: list[FeaturePiece] = []
    for r in requests:
        start, stop = rows.num_read(r.id), r.num_cached
        assert stop == len(r.tokens) - 1, f"request {r.id}: the target has not read all but the anchor"
        if start < stop:
            own = list(r.feature_pieces)
            if r.features is not None:
                own.insert(0, FeaturePiece(r.features, 0, r.features.shape[0]))
            have = range(r.features_start, r.features_start + sum(piece.num for piece in own))
            assert have.start <= start and have.stop == stop, (
                f"request {r.id}: features of {start}..{stop - 1} are needed, {have} are there"
            )
            if rows.window is not None:
                start = max(start, stop - rows.window)
            too_early = start - have.start
            for piece in own:
                if too_early < piece.num:
                    pieces.append(piece.after(too_early) if too_early > 0 else piece)
                too_early -= piece.num
        runs.append(range(start, stop))
    return runs, pieces
