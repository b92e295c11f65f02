"""What a step costs on this machine: measured, refined by every step, kept for the next run of the same kind."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark import caches
from dspark.budget.cost_curve import CostCurve
from dspark.errors import InvalidConfiguration
from dspark.types import StepRecord

log = logging.getLogger(__name__)

_FORMAT = 1
_MOST_UNREAD = 16  # positions per request; a draft that has more to read, such as a prompt, is not a usual one
_TOGETHER = 8  # steps that are learned from at a time: between two the processor's caches forget how it is done
_RARELY = 32  # steps between times of learning where only some of them are asked about; older ones tell little then
_LITTLE = 64  # steps, below which all are learned from
Floats = NDArray[np.float64]
Fingerprint = Mapping[str, str]


class _Step(NamedTuple):
    """What is kept of a step until it is learned from: the record itself has tensors, which are better let go of.

    drafting  requests asked for, their context tokens, and seconds; None: there was no usual draft
    """

    is_reading: bool
    tokens: int
    requests: int
    context: int
    seconds: float
    drafting: tuple[int, int, float] | None


class Capacity:
    """Seconds of a step by (tokens, requests, context tokens), and of drafting by (requests, context tokens).

    fingerprint  what the seconds are true of: hardware, model, dtype, versions; a file of another one is refused

    Steps that read prompts have a curve of their own: they take another way through the target. Learning waits until
    somebody asks: where drafts do not pay, and with a length that the user fixed, hardly anybody does.
    """

    def __init__(self, fingerprint: Fingerprint | None = None) -> None:
        self.fingerprint = dict(fingerprint or {})
        self.decoding, self.reading, self.drafting = CostCurve(), CostCurve(), CostCurve()
        self._waiting: deque[_Step] = deque(maxlen=_RARELY)
        self._is_asked = False  # since the last step
        self._num_noted = self._num_asked = 0  # steps since it last learned, and those before which somebody asked

    @property
    def is_known(self) -> bool:
        """Whether steps have been seen, so that `seconds` has something to go by."""
        self._note_question()
        return self.decoding.is_known

    def seconds(
        self, tokens: Floats | NDArray[np.int64], requests: int, context_tokens: int, is_reading: bool = False
    ) -> Floats:
        """[n]  seconds of everything but drafting in steps that read so many tokens [n], in rising order."""
        return self._curve(is_reading).seconds(tokens, requests, context_tokens)

    def seconds_of(self, tokens: int, requests: int, context_tokens: int, is_reading: bool = False) -> float:
        """The same for one step."""
        return self._curve(is_reading).seconds_of(tokens, requests, context_tokens)

    def _note_question(self) -> None:
        """Whoever asks is told what the steps before have shown, those of the time when nobody asked included."""
        if not self._is_asked:
            self._is_asked = True
            if self._num_noted >= _RARELY or self.decoding.num_observed < _LITTLE:
                self.learn_waiting()

    def _curve(self, is_reading: bool) -> CostCurve:
        self._note_question()
        return self.reading if is_reading and self.reading.is_known else self.decoding

    def draft_seconds(self, requests: int, context_tokens: int) -> float:
        """Seconds of drafting for so many requests; 0 while that is not known."""
        self._note_question()
        if not requests or not self.drafting.is_known:
            return 0.0
        return self.drafting.seconds_of(requests, requests, context_tokens)

    def observe(self, record: StepRecord) -> None:
        """Note what a step took, and learn from several together: at once while little is known."""
        load = record.load
        if load is None or not record.num_tokens:
            return
        drafting = None
        if record.num_asked and record.num_unread <= _MOST_UNREAD * record.num_asked:
            share = record.num_asked / max(1, len(record.request_ids))
            drafting = record.num_asked, round(share * load.context_tokens), record.draft_seconds
        reading = load.num_prompt_tokens > 0
        size = record.num_tokens, load.num_requests, load.context_tokens
        self._waiting.append(_Step(reading, *size, record.step_seconds, drafting))
        self._num_noted += 1
        if self._is_asked:
            self._is_asked, self._num_asked = False, self._num_asked + 1
            if self._num_asked >= _TOGETHER or self.decoding.num_observed < _LITTLE:
                self.learn_waiting()

    def learn_waiting(self) -> None:
        """Take in the last steps that have been noted."""
        self._num_noted = self._num_asked = 0
        while len(self._waiting) > _TOGETHER and self.decoding.num_observed >= _LITTLE:
            self._waiting.popleft()
        while self._waiting:
            is_reading, tokens, requests, context, seconds, drafting = self._waiting.popleft()
            (self.reading if is_reading else self.decoding).observe(tokens, requests, context, seconds)
            if drafting is not None:
                asked, context, seconds = drafting
                self.drafting.observe(asked, asked, context, seconds)

    def save(self, path: Path) -> None:
        """Write a JSON file; whoever reads it at the same time sees the old one or the new one."""
        self.learn_waiting()
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "decoding": self.decoding.as_json(),
            "reading": self.reading.as_json(),
            "drafting": self.drafting.as_json(),
        }
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump(state, file)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path, fingerprint: Fingerprint | None) -> Capacity:
        """What `save` wrote, if it is about the same machine, model and versions (None: about whatever it may be);
        InvalidConfiguration otherwise.
        """
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']}")
            capacity = cls(state["fingerprint"])
            capacity.decoding, capacity.reading, capacity.drafting = (
                CostCurve.from_json(state[name]) for name in ("decoding", "reading", "drafting")
            )
        except OSError as error:
            raise InvalidConfiguration(f"the capacity file {path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise InvalidConfiguration(
                f"{path} is not a capacity file ({type(error).__name__}: {error}): write one with `dspark profile`"
            ) from error
        if fingerprint is None:
            return capacity
        other = sorted(
            name
            for name in {*fingerprint, *capacity.fingerprint}
            if fingerprint.get(name) != capacity.fingerprint.get(name)
        )
        if other:
            differences = ", ".join(f"{n} {capacity.fingerprint.get(n)}, here {fingerprint.get(n)}" for n in other)
            raise InvalidConfiguration(
                f"{path} was measured elsewhere ({differences}): measure here with `dspark profile`"
            )
        return capacity

    @classmethod
    def load_or_new(cls, path: Path, fingerprint: Fingerprint) -> Capacity:
        """The same, but a file that does not fit is left out with one line in the log, and steps are measured anew."""
        if not path.exists():
            return cls(fingerprint)
        try:
            return cls.load(path, fingerprint)
        except InvalidConfiguration as error:
            log.warning("measuring anew: %s", error)
            return cls(fingerprint)

    def as_sps(self, largest: int, requests: int = 1, context_tokens: int = 0) -> dict[str, Any]:
        """Steps per second by tokens 1 .. largest, in the form of the file that SGLang takes."""
        tokens = sorted({*range(1, min(largest, 16) + 1), *np.geomspace(1, largest, 40).round().astype(int).tolist()})
        rates = 1 / self.seconds(np.array(tokens), requests, context_tokens)
        return {
            "sample_batch_tokens": tokens,
            "sample_steps_per_sec": [round(float(r), 3) for r in rates],
            "max_batch_tokens": largest,
        }


def usual_path(fingerprint: Fingerprint) -> Path:
    """Where the capacity of this kind of engine is kept: a folder of the user's caches (XDG base directories)."""
    name = hashlib.sha256(json.dumps(dict(sorted(fingerprint.items()))).encode()).hexdigest()[:16]
    return caches.folder() / "capacity" / f"{name}.json"
