"""Where keys and values live: one slot per token, one pair of tensors per layer, and whose slots they are.

The bookkeeping is on the host and the same for all layers; the tensors appear at a layer's first write, because only
then are its sizes known (they may differ by layer, and between keys and values).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dspark import pages
from dspark.errors import OutOfSlots

_FIRST_ALLOCATION = 1024  # slots; doubled whenever they run out
_FEW = 32  # slots up to which one by one is sooner than as an array


class _SlotList:
    """The slots of one request in order of position: an array that doubles, so that a gather copies it in one go."""

    __slots__ = ("array", "length")

    def __init__(self) -> None:
        self.array = np.zeros(64, dtype=np.int64)
        self.length = 0

    def append(self, slots: Sequence[int] | np.ndarray) -> None:
        end = self.length + len(slots)
        if end > len(self.array):
            self.array = np.concatenate([self.array, np.zeros(max(len(self.array), end), dtype=np.int64)])
        self.array[self.length : end] = slots
        self.length = end


class Spare(Protocol):
    """Owns slots that others may have as soon as they need them."""

    @property
    def num_spare(self) -> int: ...

    @property
    def slots(self) -> Iterable[np.ndarray]:
        """All that it owns, spare or not."""
        ...

    def give_back(self, num_slots: int) -> None:
        """Give up at least so many slots, or all that are spare."""
        ...

    def retire(self) -> None:
        """Give up all slots, those in use as soon as they are not."""
        ...


class KVCache:
    """Slots of all requests, and the tensors behind them. Requests that begin alike may share slots.

    limit    slots at most, over all requests; memory grows towards it as slots are used
    storage  by layer index: keys [slots allocated + 1, KV, D] and values [slots allocated + 1, KV, D of values]
    shared   {layer: the earlier layer whose keys and values it attends to}; such a layer has no storage
    num_moves  how often the tensors in `storage` were replaced by others
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.storage: dict[int, tuple[Tensor, Tensor]] = {}
        self.shared: dict[int, int] = {}
        self.num_moves = 0
        self._owned: dict[int, _SlotList] = {}
        self._free: list[int] = []  # a stack of slots that were used before
        self._num_touched = 0  # slots from here on have never been handed out
        self._grows = True
        self._num_allocated = min(_FIRST_ALLOCATION, limit)
        self._count_owners_of(limit)
        self._spare: Spare | None = None

    @property
    def num_free_slots(self) -> int:
        """Slots that `reserve` can give, those included that it would have to ask back for."""
        return self._num_unowned + (0 if self._spare is None else self._spare.num_spare)

    @property
    def _num_unowned(self) -> int:
        return self.limit - self._num_touched + len(self._free)

    @property
    def num_allocated(self) -> int:
        """Slots that have memory behind them, or will have at a layer's first write."""
        return self._num_allocated

    @property
    def bytes_per_slot(self) -> int:
        """Of all layers that have been written to."""
        tensors = [tensor for pair in self.storage.values() for tensor in pair]
        return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)

    @property
    def scratch(self) -> int:
        """The last slot of `storage`, which no request ever gets: what padding writes goes there."""
        return self._num_allocated

    @property
    def request_ids(self) -> list[int]:
        return list(self._owned)

    def slots_of(self, request_id: int) -> np.ndarray:
        """[S]  slots in order of position; a view that the next change of the request makes stale."""
        owned = self._owned.get(request_id)
        return np.zeros(0, dtype=np.int64) if owned is None else owned.array[: owned.length]

    def length(self, request_id: int) -> int:
        """Tokens of the request in the cache; 0 for an unknown one."""
        owned = self._owned.get(request_id)
        return 0 if owned is None else owned.length

    def reserve(self, request_id: int, num_slots: int) -> np.ndarray:
        """Give a request `num_slots` more slots and return them, as a view. OutOfSlots changes nothing."""
        self._make_room(num_slots)
        return self._hand_out(request_id, num_slots)

    def reserve_many(self, wanted: Sequence[tuple[int, int]]) -> np.ndarray:
        """Reserve for several (request id, slots) at once: all new slots, one request's after another's."""
        self._make_room(sum(num_slots for _, num_slots in wanted))  # for all, or nobody gets any
        new = [self._hand_out(request_id, num_slots) for request_id, num_slots in wanted]
        return new[0] if len(new) == 1 else np.concatenate(new)

    def _hand_out(self, request_id: int, num_slots: int) -> np.ndarray:
        owned = self._owned.get(request_id)
        if owned is None:
            owned = self._owned[request_id] = _SlotList()
        num_reused = min(num_slots, len(self._free))
        slots = self._free[len(self._free) - num_reused :][::-1]
        del self._free[len(self._free) - num_reused :]
        slots.extend(range(self._num_touched, self._num_touched + num_slots - num_reused))
        self._num_touched += num_slots - num_reused
        owned.append(slots)
        new = owned.array[owned.length - num_slots : owned.length]
        if num_slots > _FEW:
            self._num_owners[new] = 1
        else:
            for slot in slots:
                self._few_owners[slot] = 1
        return new

    def keep(self, request_id: int, start: int, chosen: Sequence[int]) -> None:
        """Of the request's slots from position `start` on keep those at `chosen` (relative to start, in this order).

        The others become free. The kept ones move up to positions start, start + 1, ...
        """
        owned = self._owned.get(request_id)
        if owned is None:
            if start or len(chosen):
                raise IndexError(f"request {request_id} has no slots: keep({start}, {list(chosen)}) asks for some")
            return
        tail, num_kept = owned.array[start : owned.length], len(chosen)
        is_beginning = list(chosen) == list(range(num_kept)) and num_kept <= len(tail)  # of a chain, say: nothing moves
        dropped = () if is_beginning else set(range(len(tail))).difference(chosen)
        assert start <= owned.length, f"request {request_id} has {owned.length} slots: none from position {start} on"
        if not is_beginning:
            assert num_kept + len(dropped) == len(tail), "chosen must be distinct and in range"
            tail[:] = tail[[*chosen, *sorted(dropped)]]
        self.give_up(tail[num_kept:][::-1])
        owned.length = start + num_kept
        if owned.length == 0:
            del self._owned[request_id]

    def release(self, request_id: int) -> None:
        """Give up all slots of a request. An unknown id is fine."""
        owned = self._owned.pop(request_id, None)
        if owned is not None:
            self.give_up(owned.array[: owned.length][::-1])

    def adopt(self, request_id: int, slots: np.ndarray) -> None:
        """Let a request without slots begin with these, which others own as well."""
        assert request_id not in self._owned, f"request {request_id} has slots already"
        self._owned[request_id] = _SlotList()
        self._owned[request_id].append(slots)
        self.share(slots)

    def share(self, slots: np.ndarray) -> None:
        """One more owner of slots that have one."""
        self._num_owners[slots] += 1

    def give_up(self, slots: np.ndarray) -> None:
        """One owner fewer; slots without any are free."""
        if len(slots) > _FEW:
            self._num_owners[slots] -= 1
            self._free += slots[self._num_owners[slots] == 0].tolist()
            return
        owners = self._few_owners
        for slot in slots.tolist():
            owners[slot] -= 1
            if not owners[slot]:
                self._free.append(slot)

    def lend_spare_slots_to(self, spare: Spare) -> None:
        """Slots may lie with `spare` until somebody needs them. There is one such at a time: an earlier one retires."""
        if self._spare is not None:
            self._spare.retire()
        self._spare = spare

    def allocate(self) -> None:
        """Have memory behind every slot from now on, so that tensors stay where they are until the cache is resized."""
        self._grows = False
        if self._num_allocated < self.limit:
            self._grow(self.limit)

    def resize(self, limit: int) -> None:
        """Set the number of slots and give the memory back; only while no request has any."""
        assert not self._owned, f"requests {self.request_ids} still have slots"
        assert limit > 0, "a cache has at least one slot"
        if self._spare is not None:
            self._spare.give_back(self.limit)
        self.limit, self._free, self._num_touched = limit, [], 0
        self._count_owners_of(limit)
        self._num_allocated = min(_FIRST_ALLOCATION, limit) if self._grows else limit
        self.num_moves += 1
        for layer, (keys, values) in self.storage.items():
            self.storage[layer] = (_zeros_like(keys, self._num_allocated), _zeros_like(values, self._num_allocated))

    def tensors(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's storage, made on first use to fit keys [.., KV, T, D] and values [.., KV, T, D of values]."""
        if layer not in self.storage:
            self.storage[layer] = (
                pages.zeros((self._num_allocated + 1, keys.shape[-3], keys.shape[-1]), keys),
                pages.zeros((self._num_allocated + 1, values.shape[-3], values.shape[-1]), values),
            )
        return self.storage[layer]

    def check(self) -> None:
        """Every slot that was ever handed out is free exactly once or has exactly the owners that it is said to have."""
        num_owners = np.zeros(self._num_touched, dtype=np.int32)
        spare = [] if self._spare is None else list(self._spare.slots)
        for slots in (*map(self.slots_of, self._owned), *spare):
            assert len(set(slots.tolist())) == len(slots), "a slot occurs twice in one request"
            num_owners[slots] += 1
        assert np.array_equal(num_owners, self._num_owners[: self._num_touched]), "a slot was lost, or is owned twice"
        assert sorted(self._free) == np.flatnonzero(num_owners == 0).tolist(), "a slot was lost, or is free and owned"
        assert self._num_touched <= self._num_allocated <= self.limit, "more slots in use than there is memory for"

    def _count_owners_of(self, num_slots: int) -> None:
        """From none on. The same memory twice: for many slots at once, and one by one."""
        self._num_owners = np.zeros(num_slots, dtype=np.int32)
        self._few_owners = self._num_owners.data

    def _make_room(self, num_slots: int) -> None:
        """See to it that so many slots can be handed out, with memory behind them."""
        unowned = self._num_unowned
        if num_slots > unowned and num_slots > self.num_free_slots:
            raise OutOfSlots(
                f"{num_slots} more slots are needed and {self.num_free_slots} of {self.limit} are free; run fewer requests at "
                "once, or raise the number of slots"
            )
        if num_slots > unowned:
            assert self._spare is not None
            self._spare.give_back(num_slots - unowned)
        needed = self._num_touched + max(0, num_slots - len(self._free))
        if needed > self._num_allocated:
            self._grow(needed)

    def _grow(self, needed: int) -> None:
        previous = num_allocated = self._num_allocated
        while num_allocated < needed:
            num_allocated = min(2 * num_allocated, self.limit)
        self.num_moves += 1
        try:
            for layer, pair in self.storage.items():
                grown = tuple(_zeros_like(tensor, num_allocated) for tensor in pair)
                for new, old in zip(grown, pair, strict=True):
                    new[:previous].copy_(old[:previous])
                self.storage[layer] = (grown[0], grown[1])
        except torch.OutOfMemoryError as error:  # layers that have grown already are only larger than they need be
            raise OutOfSlots(
                f"the device has no memory for a cache of {num_allocated} tokens, {self.bytes_per_slot} bytes each: ask for "
                f"fewer slots than {self.limit}, or run fewer requests at once"
            ) from error
        self._num_allocated = num_allocated


def _zeros_like(tensor: Tensor, num_slots: int) -> Tensor:
    """Storage of so many slots and the scratch slot."""
    return pages.zeros((num_slots + 1, *tensor.shape[1:]), tensor)


def gather(tensor: Tensor, slots: Tensor) -> Tensor:
    """[*slots, KV, D]  rows of a layer's keys or values. index_select costs a fifth of advanced indexing on CPU."""
    rows = tensor.flatten(1).index_select(0, slots.reshape(-1))
    return rows.view(*slots.shape, *tensor.shape[1:])
