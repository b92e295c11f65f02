"""Laws of the slot cache: nothing is lost, nothing is owned twice, order is position, a refusal changes nothing."""

from __future__ import annotations

import random

import pytest
import torch

from dspark.errors import OutOfSlots
from dspark.target import KVCache, kv_cache


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_against_lists(seed: int) -> None:
    """A model of plain lists, with the slots' contents as witnesses that growth and moves keep them."""
    rng = random.Random(seed)
    cache = KVCache(limit=rng.choice((40, 3000)))
    keys = torch.zeros(1, 2, 1, 4)
    cache.tensors(0, keys, keys)
    expected: dict[int, list[int]] = {}
    for _ in range(400):
        request, action = rng.randrange(6), rng.random()
        if action < 0.6:
            count = rng.choice((1, 3, 8, 90))
            before = cache.num_free_slots
            if count > before:
                with pytest.raises(OutOfSlots, match=f"^{count} more slots are needed and {before} of {cache.limit}"):
                    cache.reserve(request, count)
                assert cache.num_free_slots == before
            else:
                stamps = [rng.randrange(1 << 20) for _ in range(count)]
                slots = torch.from_numpy(cache.reserve(request, count).copy())
                cache.storage[0][0][slots] = torch.tensor(stamps, dtype=torch.float)[:, None, None].expand(-1, 2, 4)
                expected.setdefault(request, []).extend(stamps)
        elif action < 0.9 and request in expected:
            start = rng.randint(0, len(expected[request]))
            tail = expected[request][start:]
            count = rng.randint(0, len(tail))
            chosen = rng.choice((list(range(count)), rng.sample(range(len(tail)), count)))
            cache.keep(request, start, chosen)
            expected[request][start:] = [tail[i] for i in chosen]
        elif action >= 0.9:
            cache.release(request)
            expected.pop(request, None)
        cache.check()
        for known, stamps in expected.items():
            assert cache.length(known) == len(stamps)
            stored = cache.storage[0][0][torch.from_numpy(cache.slots_of(known).copy()), 0, 0]
            assert stored.tolist() == stamps
        assert cache.num_free_slots == cache.limit - sum(map(len, expected.values()))


def test_a_device_without_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, keys = KVCache(5000), torch.zeros(1, 2, 1, 4)
    for layer in range(3):
        cache.tensors(layer, keys, keys)
    cache.reserve_many([(0, 700), (1, 200)])
    cache.storage[2][1][:900] = 7.0
    zeros_like = kv_cache._zeros_like
    sizes: list[int] = []

    def scarce(tensor: torch.Tensor, num_slots: int) -> torch.Tensor:
        sizes.append(num_slots)
        if len(sizes) == 4:  # the second layer's values
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros_like(tensor, num_slots)

    monkeypatch.setattr(kv_cache, "_zeros_like", scarce)
    with pytest.raises(OutOfSlots, match="no memory for a cache of 2048 tokens, 192 bytes each"):
        cache.reserve_many([(0, 100), (2, 60)])
    assert (cache.length(0), cache.length(2), cache.num_allocated, cache.scratch) == (700, 0, 1024, 1024)
    cache.check()
    cache.reserve(2, 160)  # there is memory again
    assert {len(tensor) for pair in cache.storage.values() for tensor in pair} == {2049}
    assert (cache.storage[2][1][:900] == 7.0).all()
    cache.check()


@pytest.mark.parametrize("num_slots", [10, 200])
def test_slots_that_several_own_are_free_when_the_last_one_lets_go(num_slots: int) -> None:
    """Few of them are counted one by one, and many at once."""
    cache = KVCache(512)
    slots = cache.reserve(1, num_slots).copy()
    cache.adopt(2, slots)
    cache.adopt(3, slots[:5])
    cache.release(1)
    cache.check()
    assert cache.num_free_slots == 512 - num_slots
    cache.keep(2, 2, [])
    cache.check()
    assert cache.num_free_slots == 512 - 5
    cache.release(3)
    assert cache.num_free_slots == 512 - 2
    again = cache.reserve(4, num_slots - 2)
    cache.check()
    assert sorted([*again, *cache.slots_of(2)]) == sorted(slots)  # before any that was never used


def test_unknown_requests_are_empty() -> None:
    cache = KVCache(10)
    cache.release(5)
    cache.keep(5, 0, ())
    assert cache.length(5) == 0
    assert len(cache.slots_of(5)) == 0
    with pytest.raises(IndexError, match="no slots"):
        cache.keep(5, 0, (0,))


def test_keep_refuses_what_is_not_there() -> None:
    cache = KVCache(10)
    cache.reserve(1, 4)
    for chosen in ((4,), (0, 0), (-1,)):
        with pytest.raises((IndexError, AssertionError)):
            cache.keep(1, 0, chosen)
        cache.check()
        assert cache.length(1) == 4


def test_resize_gives_memory_back_and_wants_an_empty_cache() -> None:
    cache = KVCache(5000)
    cache.tensors(3, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 6))
    cache.reserve(1, 4000)
    assert cache.storage[3][1].shape[0] >= 4000
    with pytest.raises(AssertionError, match="still have slots"):
        cache.resize(10)
    cache.release(1)
    cache.resize(10)
    assert [tuple(tensor.shape) for tensor in cache.storage[3]] == [(11, 2, 4), (11, 2, 6)]
    assert cache.num_free_slots == 10


def test_allocated_at_once_its_tensors_stay_where_they_are() -> None:
    cache = KVCache(5000)
    cache.tensors(3, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 6))
    cache.reserve(1, 10)
    cache.storage[3][0][cache.slots_of(1)] = 7.0
    cache.allocate()
    for limit in (5000, 3000):
        keys, num_moves = cache.storage[3][0], cache.num_moves
        cache.reserve(2, limit - 10)
        assert cache.storage[3][0] is keys and len(keys) == limit + 1 == cache.scratch + 1
        assert cache.num_moves == num_moves
        cache.check()
        assert limit < 5000 or keys[cache.slots_of(1)].unique().tolist() == [7.0]
        for request in cache.request_ids:
            cache.release(request)
        cache.resize(3000)
        cache.reserve(1, 10)


def test_check_finds_a_lost_slot() -> None:
    cache = KVCache(10)
    cache.reserve(1, 4)
    cache.keep(1, 0, (0,))
    cache._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        cache.check()
