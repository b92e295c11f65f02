"""A block drafter's usual step, recorded once per number of requests and replayed (target/captured.py)."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.block_step import Step
from dspark.target.captured import Outputs, Recorder

_log = logging.getLogger(__name__)

_MOST_REQUESTS = 16  # more keep the device busy for longer than the host needs to tell it what to do
_MOST_STEPS = 32  # recordings that are kept: rows that grow want new ones


class CapturedDraft:
    """Draft tokens and confidences of a Step by replaying recordings, each made when a number of requests first comes.

    run  what is recorded, eager or compiled: (step, noise [B, K, V]) -> tokens [B, K], confidence [B, K]. A step brings
         whole rows and no mask, so what it attends with must go by `visible` alone
    """

    def __init__(self, run: Callable[[Step, Tensor], Outputs], record: Recorder) -> None:
        self._run, self._record = run, record
        self._noise: Tensor | None = None  # of the largest step; the others use its beginning
        self._recordings: OrderedDict[tuple[Any, ...], tuple[Step, Callable[[], Outputs]] | None] = OrderedDict()

    def __call__(self, step: Step, noise: Tensor) -> Outputs:
        """The step's shapes must follow from its number of requests and from the rows."""
        if len(noise) > _MOST_REQUESTS:
            return self._run(step, noise)
        # Recordings know where the rows were: those of rows that have grown since are not asked again.
        size = (len(noise), step.keys[0].shape, *(tensor.data_ptr() for tensor in (*step.keys, *step.values)))
        if size not in self._recordings:
            self._recordings[size] = self._recorded(step, noise)
            if len(self._recordings) > _MOST_STEPS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(size)
        recording = self._recordings[size]
        if recording is None:
            return self._run(step, noise)
        own, replay = recording
        for there, here in zip(own[:3], _in_order(step)[:3], strict=True):
            there.copy_(here)
        assert self._noise is not None
        self._noise[: len(noise)].copy_(noise)
        tokens, confidence = replay()
        return tokens.clone(), None if confidence is None else confidence.clone()

    def _recorded(self, step: Step, noise: Tensor) -> tuple[Step, Callable[[], Outputs]] | None:
        """A rehearsal writes the same to the same places as the step itself."""
        if self._noise is None:
            self._noise = noise.new_zeros(_MOST_REQUESTS, *noise.shape[1:])
        own = _in_order(step)
        own_noise = self._noise[: len(noise)]
        try:
            replay = self._record(lambda: self._run(own, own_noise))
        except RuntimeError as error:  # out of memory, and all that CUDA refuses to record
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning("drafts for %d requests run unrecorded: %s", len(noise), reason[0])
            return None
        megabytes = self._record.num_bytes / 2**20
        _log.info("recorded drafts for %d requests: %.0f MB with those before", len(noise), megabytes)
        return own, replay


def _in_order(step: Step) -> Step:
    """The same in tensors of its own, with features of the news and no others: however many there were."""
    news = step.news.clone()
    news[3] = torch.arange(news.shape[1], device=news.device)
    return step._replace(features=step.features.index_select(0, step.news[3]), news=news, each=step.each.clone())
