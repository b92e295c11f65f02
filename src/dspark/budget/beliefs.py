"""What is believed of a draft, kept true while serving.

It is right under censoring: only tokens that were verified, and whose ancestors were all accepted, are labels. Where the
acceptance rule knows how likely a token was to be accepted (rejection: what draft and target law have in common), that is
the label, else what happened. A small
share of drafts is verified whole; there, tokens that the scheduler would have left out weigh more (inverse propensity),
because they stand for many that nobody looked at.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.budget.acceptance_map import AcceptanceMap, Law, OwnRecords, Stated
from dspark.budget.calibration import Calibration
from dspark.budget.judged import Judged, judge
from dspark.budget.online_logistic import Array, OnlineLogistic
from dspark.budget.prefix_scheduler import survival_of
from dspark.budget.running_error import RunningError
from dspark.errors import CheckpointError
from dspark.types import Draft, Request, StepRecord

log = logging.getLogger(__name__)

_FORMAT = 2
_EVERYONE = ""  # all traffic, whatever its class
_NEW = 16  # updates


@dataclass(frozen=True)
class LiveSettings:
    """How beliefs are learned while serving.

    memory              rounds (drafts decided) after which an outcome weighs 1/e; after a drift alarm far fewer
    full_share          of drafts, those that are verified whole whatever the scheduler chose
    most_weight         of one label, however unlikely it was to be seen
    rounds_per_update   outcomes are collected until there are so many,
    steps_per_update    and, but for the first few times, of so many steps: what an update takes hardly grows with them
    most_classes        classes of traffic with beliefs of their own; later ones share everyone's
    """

    memory: float = 3000.0
    full_share: float = 0.001
    most_weight: float = 25.0
    rounds_per_update: int = 16
    steps_per_update: int = 4
    most_classes: int = 16


class _Asked(NamedTuple):
    """What was believed of a draft, until its outcome is known."""

    requests: list[Request]
    num_tokens: list[int]
    classes: list[str]
    stated: Stated
    believed: Array  # [B, K]


class _Outcome(NamedTuple):
    """What came of a step's drafts, until it is learned.

    left_out  [B, K] by the scheduler, before whole drafts were drawn; None: nothing
    classes   of the drafts with any judged token
    """

    asked: _Asked
    judged: Judged
    left_out: NDArray[np.bool_] | None
    classes: list[str]


class LiveBeliefs:
    """Beliefs that learn from every step.

    calibration   of the drafter's confidences: where learning starts, and where positions without outcomes stay
    num_positions deeper ones share the last one's beliefs
    identity      of target and drafter; saved beliefs about others are refused
    """

    def __init__(
        self,
        calibration: Calibration | None = None,
        num_positions: int = 8,
        settings: LiveSettings | None = None,
        identity: str = "",
        seed: int = 0,
    ) -> None:
        self.settings, self.identity = settings or LiveSettings(), identity
        self.map = AcceptanceMap(calibration, num_positions)
        self.classes: dict[str, OnlineLogistic] = {_EVERYONE: self.map.learner(self.settings.memory)}
        self.num_full = 0
        self.running_error = RunningError(num_positions)
        self._own = OwnRecords()
        self._random = np.random.default_rng(seed)
        self._until_whole = self._drafts_to_next_whole() - 1
        self._laws: dict[str, Law] = {}  # by class
        self._asked: _Asked | None = None
        self._waiting: list[_Outcome] = []
        self._num_waiting = 0  # drafts in them
        self._sum_weights = self._sum_squares = 0.0
        self._logged_at: dict[str, float] = {}  # class -> its rounds at the last alarm
        self._has_warned = False

    # -- what the engine asks -------------------------------------------------------------------------------------------

    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor:
        """[B, K]  P(token and all its ancestors are accepted); entry k depends on tokens before k only."""
        stated = self.map.read(draft, self._own.offsets(requests))
        classes = [self._class_of(r) for r in requests]
        laws = [self._law(name) for name in (classes if len(set(classes)) > 1 else classes[:1])]
        believed = self.map.apply(laws, stated)
        self._asked = _Asked(list(requests), [len(r.tokens) for r in requests], classes, stated, believed)
        if draft.parents is None:
            return torch.from_numpy(believed.cumprod(1))
        return survival_of(draft, torch.from_numpy(believed))

    def _law(self, name: str) -> Law:
        """What is believed of a class of traffic, made ready once after each update."""
        law, learner = self._laws.get(name), self.classes[name]
        if law is None or law.coefficients is not learner.coefficients:
            law = self._laws[name] = self.map.law(learner)
        return law

    def wants_whole(self, num_requests: int) -> list[int]:
        """Places of drafts to verify whole, drawn at random: what they tell is bent by nobody's choice. Mostly there is none."""
        whole = []
        while self._until_whole < num_requests:  # the next one is drawn, not each: it comes once in a thousand drafts
            whole.append(self._until_whole)
            self._until_whole += self._drafts_to_next_whole()
        self._until_whole -= num_requests
        return whole

    def _drafts_to_next_whole(self) -> int:
        share = self.settings.full_share
        return int(self._random.geometric(share)) if share > 0 else sys.maxsize

    def observe(self, record: StepRecord) -> None:
        """Note what came of the draft that was asked about last."""
        asked, self._asked = self._asked, None
        if asked is None or record.kept is None or record.accepted_nodes is None:
            return
        if record.request_ids != [r.id for r in asked.requests] or not record.kept.shape[1]:
            return
        outcome = self._outcome(asked, record, record.kept, record.accepted_nodes)
        if outcome.classes:
            self._waiting.append(outcome)
            self._num_waiting += len(outcome.classes)
        is_new = self.classes[_EVERYONE].num_rounds < _NEW * self.settings.rounds_per_update
        enough = len(self._waiting) >= self.settings.steps_per_update or is_new
        if enough and self._num_waiting >= self.settings.rounds_per_update:
            self.learn_waiting()

    # -- learning -------------------------------------------------------------------------------------------------------

    def learn_waiting(self) -> None:
        """Take in the outcomes that have been collected."""
        if not self._waiting:
            return
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        starts = accumulate((o.asked.believed.size for o in waiting), initial=0)
        judged = np.concatenate([np.array(o.judged.tokens) + start for o, start in zip(waiting, starts, strict=False)])

        def of_judged(values: Iterable[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(list(values), None)[judged]

        y, believed = np.concatenate([o.judged.happened for o in waiting]), of_judged(o.asked.believed for o in waiting)
        places = of_judged(o.asked.stated.place for o in waiting)
        lengths = [o.asked.believed.shape[1] for o in waiting for _ in o.asked.requests]
        drafts = np.repeat(np.arange(len(lengths)), lengths)[judged]
        own = np.array([own for o in waiting for own in o.asked.stated.own])[drafts]
        x = self.map.features(of_judged(o.asked.stated.confidence for o in waiting), places, own)
        w = np.ones(len(y))
        if any(o.left_out is not None for o in waiting):
            left_out = (np.zeros(o.asked.believed.shape, bool) if o.left_out is None else o.left_out for o in waiting)
            w[of_judged(left_out)] = self._weight_if_drawn
        rounds = [name for o in waiting for name in o.classes]
        self.running_error.add(places, believed, y)
        w = w * self._fair_share(w)
        if self.classes[_EVERYONE].learn(x, y, w, len(rounds)):
            self._log_alarm(_EVERYONE)
        classes = np.array([name for o in waiting for name in o.asked.classes], dtype=object)
        for name in dict.fromkeys(name for name in rounds if name != _EVERYONE):
            rows = classes[drafts] == name
            if self.classes[name].learn(x[rows], y[rows], w[rows], rounds.count(name)):
                self._log_alarm(name)

    def _log_alarm(self, name: str) -> None:
        """One line for each excursion, however many alarms it takes to follow it."""
        learner = self.classes[name]
        if learner.num_rounds > self._logged_at.get(name, -np.inf) + self.settings.memory:
            log.warning(
                "the traffic%s has changed: recent drafts were accepted more or less often than expected, by %.1f standard "
                "deviations; learning anew",
                f" of class {name!r}" if name else "",
                learner.drift_at_alarm,
            )
        self._logged_at[name] = learner.num_rounds

    def _outcome(self, asked: _Asked, record: StepRecord, kept: Tensor, accepted: Tensor) -> _Outcome:
        """What is to be learned of a step, with others; requests' own records know of it at once."""
        chances = None if record.chances is None else record.chances.numpy()
        parents = None if record.parents is None else record.parents.numpy()
        may_tell = kept.numpy()
        for b, request in enumerate(asked.requests):
            if request.finish_reason == "stop":  # what the target thinks of a draft past the end means nothing
                depth = Draft(kept, kept.sum(1), parents=record.parents).depth[b].numpy()
                may_tell = may_tell.copy()
                may_tell[b] &= depth <= len(request.tokens) - asked.num_tokens[b]
        judged = judge(may_tell, accepted.numpy(), parents, chances, asked.believed)
        for request, own, miss, e in zip(asked.requests, asked.stated.own, judged.misses, judged.evidence, strict=True):
            self._own.note(request, own, miss, e)
        left_out = None
        if record.chosen is not None and record.chosen is not kept:
            left_out = kept.numpy() & ~record.chosen.numpy()
            self.num_full += int(left_out.any(1).sum())
        classes = [name for name, e in zip(asked.classes, judged.evidence, strict=True) if e]
        return _Outcome(asked, judged, left_out, classes)

    @property
    def _weight_if_drawn(self) -> float:
        """Of a token that only the draw had verified: it stands for all those that were not drawn."""
        return 1 / max(self.settings.full_share, 1 / self.settings.most_weight)

    def _fair_share(self, weights: Array) -> float:
        """Scale weights so that labels count as many as they tell (Kish's effective size), not as they stand for."""
        kept = np.exp(-len(weights) / self.settings.memory)
        self._sum_weights = kept * self._sum_weights + float(weights.sum())
        self._sum_squares = kept * self._sum_squares + float((weights**2).sum())
        return self._sum_weights / self._sum_squares

    def _class_of(self, request: Request) -> str:
        name = request.params.traffic_class or _EVERYONE
        if name in self.classes:
            return name
        if len(self.classes) > self.settings.most_classes:
            if not self._has_warned:
                log.warning("more than %d traffic classes: further ones share beliefs", self.settings.most_classes)
                self._has_warned = True
            return _EVERYONE
        # A class starts from what is known of all traffic.
        known = self.classes[_EVERYONE].coefficients.copy()
        self.classes[name] = replace(self.map.learner(self.settings.memory), prior=known)
        return name

    # -- what people see, and what survives a restart -------------------------------------------------------------------

    @property
    def drift(self) -> float:
        """By how many standard deviations recent outcomes miss what was believed, over all traffic."""
        return self.classes[_EVERYONE].drift

    @property
    def num_alarms(self) -> int:
        """How often all traffic has been found changed."""
        return self.classes[_EVERYONE].num_alarms

    @property
    def at_alarm(self) -> dict[str, float]:
        """What the last alarm saw: drift then, and stated less observed acceptance at the first position."""
        learner = self.classes[_EVERYONE]
        return {"drift": round(learner.drift_at_alarm, 2), "bias": round(self.running_error.biases[0], 4)}

    def summary(self) -> dict[str, Any]:
        """How well beliefs hold and where they stand, by position and by class of traffic."""
        return {
            "drift": self.drift,
            "whole_drafts": self.num_full,
            "judged_tokens": self.running_error.num_tokens,
            "calibration_error": self.running_error.errors,
            "bias": self.running_error.biases,
            "classes": {name or "everyone": self._class_summary(learner) for name, learner in self.classes.items()},
        }

    def _class_summary(self, learner: OnlineLogistic) -> dict[str, Any]:
        slope, offsets, own_share = self.map.terms(learner)
        return {
            "rounds": learner.num_rounds,
            "drift": learner.drift,
            "alarms": learner.num_alarms,
            "temperature": 1 / slope,  # on top of the offline calibration
            "offsets": offsets.tolist(),
            "own_record": own_share,
        }

    def save(self, path: Path) -> None:
        """Write what was learned, so that a restart goes on from it."""
        self.learn_waiting()
        content = {
            "format": _FORMAT,
            "identity": self.identity,
            "num_positions": self.map.num_positions,
            "classes": {name: learner.to_json() for name, learner in self.classes.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a saved file; nothing changes if it cannot be used."""
        known = {"format": _FORMAT, "identity": self.identity, "num_positions": self.map.num_positions}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for key, expected in known.items():
                if content[key] != expected:
                    raise ValueError(f"{key} is {content[key]!r}, expected {expected!r}")
            learners = {name: self.map.learner(self.settings.memory) for name in content["classes"]}
            for name, learner in learners.items():
                learner.restore(content["classes"][name])
            if _EVERYONE not in learners:
                raise ValueError("no beliefs about all traffic")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} holds no beliefs about this target and drafter ({type(error).__name__}: {error}): delete it, and "
                "they are learned anew"
            ) from error
        self.classes = learners
