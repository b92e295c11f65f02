"""Train drafters on texts their target wrote.

The trainer knows of a drafter only that it has `loss(batch, embed, lm_head, weights)`. It can be stopped at any moment,
by a kill too, and goes on with the same bits: which texts a step reads, and where their blocks begin, depends on the
seed and the step alone, and everything else is in one file that is replaced in one step.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dspark.drafters.block_model import TraceBatch
from dspark.errors import CheckpointError, DSparkError, InvalidConfiguration
from dspark.losses import Losses
from dspark.target.target import Target
from dspark.train.anchors import choose_anchors
from dspark.train.cache import TraceCache
from dspark.train.decoding import Decoding, decode
from dspark.train.distributed import Objective, gathered, join, mean_over_processes
from dspark.train.files import replace_file
from dspark.train.plan import Plan, identity
from dspark.train.report import write_report
from dspark.train.run_log import Curves, ProgressBar, for_people, time_left
from dspark.train.student import Student, numbers
from dspark.train.texts import Text, batches, pad, split_validation
from dspark.train.traces import TargetStates

_log = logging.getLogger(__name__)

STATE = "training_state.pt"
_UNWRITABLE = (OSError, RuntimeError, SafetensorError)  # what a full disk makes the libraries raise
_PLAIN_PROMPT = 32  # tokens of a plain text that validation continues

States = Callable[[list[Text], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(texts, token_ids [B, S]) -> features [B, S, F], last_hidden [B, S, H]"""


class Trainer:
    """Teaches students side by side: each batch and the target's states over it are made once for all of them.

    cache  folder for traces; None: the target's states are made anew for every batch
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        cache: Path | None = None,
        is_quiet: bool = False,
        tensorboard: bool = False,
    ) -> None:
        self.plan, self.settings, self.target, self.is_quiet = plan, plan.settings, target, is_quiet
        self.rank, self.num_processes = join()
        self.is_first = self.rank == 0
        self.identity = identity(plan, self.num_processes)
        teacher = target.model.requires_grad_(False)
        self.embed, self.lm_head = teacher.get_input_embeddings(), teacher.get_output_embeddings()
        self.online = TargetStates(teacher, plan.recipes[0].config.target_layer_ids)
        self.states: States = (
            (lambda texts, token_ids: self.online(token_ids)) if cache is None else self._traces(cache)
        )
        self.train_texts, self.validation_texts = self._split(plan.texts)
        self.prompts = self._prompts()
        self.students = [Student(recipe, teacher, self.train_texts, plan.prints) for recipe in plan.recipes]
        for student in self.students:
            _choose_vocabulary(student.model, self.train_texts)
        self.curves = [Curves(s.out / "tensorboard") for s in self.students] if tensorboard and self.is_first else []
        self.progress: dict[str, float] = {"step": 0, "seconds": 0.0, "tokens": 0, "positions": 0}

    def _split(self, texts: list[Text]) -> tuple[list[Text], list[Text]]:
        if not 0 < self.settings.num_validation < len(texts):
            raise InvalidConfiguration(
                f"expected num_validation between 1 and {len(texts) - 1}, as there are {len(texts)} texts; got "
                f"{self.settings.num_validation}: hold out fewer with --num-validation (or in the recipe's [train]), or make "
                "more texts with dspark data"
            )
        num_left = len(texts) - self.settings.num_validation
        if num_left < self.settings.num_validation and self.is_first:
            _log.warning(
                "%s of %s texts are held out, and there is less to learn from than to judge by: "
                "--num-validation %s leaves more, and more texts with dspark data are better",
                self.settings.num_validation,
                len(texts),
                max(1, len(texts) // 5),
            )
        return split_validation(texts, self.settings.num_validation, self.settings.seed)

    def _prompts(self) -> list[list[int]]:
        """What validation decodes: held-out prompts, or the beginnings of held-out plain texts."""
        found = []
        for text in self.validation_texts[: self.settings.validation_prompts]:
            length = text.prompt_length if text.prompt_length > 1 else min(_PLAIN_PROMPT, len(text) // 2)
            found.append(text.token_ids[: max(1, length)].tolist())
        return found

    def _traces(self, folder: Path) -> TraceCache:
        """One process makes what is missing, and the others wait for it."""
        traces = TraceCache(folder, self.plan.texts, self.plan.target, self.online.layer_ids)
        for rank in (True, False):
            if self.is_first is rank:
                traces.fill(self.online, self.target.device, self.say)
            gathered(None)
        return traces

    def say(self, line: str) -> None:
        """A line on stderr, from the first process only."""
        if self.is_first and not self.is_quiet:
            print(f"dspark: {line}", file=sys.stderr, flush=True)

    # -- data -----------------------------------------------------------------------------------------------------------

    def batch(self, texts: list[Text], generator: torch.Generator) -> TraceBatch:
        """Texts as the drafter learns from them, with the target's states and anchors drawn anew."""
        device = self.target.device
        token_ids, loss_mask = pad(texts)
        anchors, kept = choose_anchors(loss_mask, max(1, self.settings.anchors_per_batch // len(texts)), generator)
        features, last_hidden = self.states(texts, token_ids.to(device))
        return TraceBatch(
            token_ids.to(device),
            loss_mask.to(device),
            features.float(),
            last_hidden.float(),
            anchors.to(device),
            kept.to(device),
        )

    def stream(self) -> Iterator[tuple[int, list[Text]]]:
        """Endless passes over the texts, numbered, from this process's first batch of the current step on."""
        number, epoch = 0, 0
        first = int(self.progress["step"]) * self.settings.accumulate * self.num_processes
        while True:
            order = random.Random(self.settings.seed + epoch)
            for texts in batches(self.train_texts, self.settings.tokens_per_batch, order):
                if number >= first and number % self.num_processes == self.rank:
                    yield number, texts
                number += 1
            epoch += 1

    # -- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train up to the recipe's last step."""
        settings, progress = self.settings, self.progress
        started = last_save = time.time()
        before, first_step = progress["seconds"], int(progress["step"])
        stream = self.stream()
        with ProgressBar(settings.steps, first_step, self.is_first and not self.is_quiet) as bar:
            while progress["step"] < settings.steps:
                self.step(stream)
                progress["seconds"] = round(before + time.time() - started, 1)
                done, left = int(progress["step"]) - first_step, settings.steps - int(progress["step"])
                self._report(bar, left * (time.time() - started) / done)
                is_last = left == 0
                if progress["step"] % settings.validate_every == 0 or is_last:
                    for student in self.students:
                        self._log(bar, student, "validation", self.validate(student))
                    if self.is_first:
                        write_report(self.plan)
                is_due = time.time() - last_save > settings.save_seconds
                if any(mean_over_processes([is_due])) or is_last:  # saving is for all of them, and clocks differ
                    self.save()
                    last_save = time.time()
        if self.is_first:
            write_report(self.plan)  # once more: a finished run that is resumed shows what came later, as calibration

    def step(self, stream: Iterator[tuple[int, list[Text]]]) -> None:
        """One optimiser step of every student."""
        settings, step = self.settings, int(self.progress["step"])
        num_tokens = num_positions = 0
        for part in range(settings.accumulate):
            number, texts = next(stream)
            batch = self.batch(texts, torch.Generator().manual_seed(settings.seed * 1_000_003 + number))
            losses: Losses | None = None
            for student in self.students:
                losses = student.accumulate(batch, self.embed, self.lm_head, part == settings.accumulate - 1)
            assert losses is not None
            num_tokens += sum(map(len, texts))
            num_positions += losses.num_positions
        for student in self.students:
            student.step(student.rate(step, settings.steps), batch)
            means = mean_over_processes(student.sums.values())
            for name, value in zip(student.sums, means, strict=True):
                student.smooth[name] = 0.95 * student.smooth.get(name, value) + 0.05 * value
            student.sums.clear()
        counts = mean_over_processes([num_tokens, num_positions])
        for name, count in zip(("tokens", "positions"), counts, strict=True):
            self.progress[name] += round(count * self.num_processes)
        self.progress["step"] += 1

    def _report(self, bar: ProgressBar, seconds_left: float) -> None:
        step, settings = int(self.progress["step"]), self.settings
        smooth = self.students[0].smooth
        bar.update(step, smooth["total"], smooth["tau"])
        if step % settings.log_every and 3 < step < settings.steps:
            return
        for student in self.students:
            values = {**student.smooth, "rate": student.rate(step - 1, settings.steps)}
            self._log(bar, student, "train", values, f"{time_left(seconds_left)} left")

    def _log(self, bar: ProgressBar, student: Student, kind: str, values: dict[str, float], note: str = "") -> None:
        if not self.is_first:
            return
        row = {**self.progress, **{name: round(value, 5) for name, value in values.items()}}
        student.out.mkdir(parents=True, exist_ok=True)
        student.tables[kind].append(row)
        if self.curves:
            self.curves[self.students.index(student)].add(kind, row)
        if not self.is_quiet:
            bar.say(for_people(student.recipe.name, kind, row, self.settings.steps, note))

    # -- validation -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, student: Student) -> dict[str, float]:
        """Losses of the averaged weights over the validation texts, and tau of decoding held-out prompts with them."""
        averaged = student.averaged()
        values = self.validation_losses(student, averaged)
        if not self.prompts:
            return values
        if self.is_first:
            self._written(lambda: student.export(averaged, student.out / "last"))
        gathered(None)  # wait for the file
        decoding = Decoding(self.settings.validation_tokens)
        with self.online.over_slots():
            outcome = decode(student.out / "last", self.target, self.prompts, decoding)
        if not outcome.accepted:
            raise InvalidConfiguration("no validation prompt got two tokens: raise validation_tokens")
        if self.is_first:
            self._written(lambda: student.keep_best(averaged, outcome.tau))
        accepted = {f"accepted_{k + 1}": share for k, share in enumerate(outcome.acceptance)}
        return {**values, "decoded_tau": outcome.tau, "decoded_tau_error": outcome.standard_error, **accepted}

    def validation_losses(self, student: Student, model: Any) -> dict[str, float]:
        """Means over the validation texts, with the same anchors each time."""
        objective = Objective(model)
        generator = torch.Generator().manual_seed(0)
        sums: dict[str, float] = {}
        count = 0
        for texts in batches(self.validation_texts, self.settings.tokens_per_batch, random.Random(0)):
            losses = student.losses(self.batch(texts, generator), self.embed, self.lm_head, objective)
            values = numbers(losses) | {f"acceptance_{k + 1}": float(a) for k, a in enumerate(losses.acceptance)}
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * losses.num_positions
            count += losses.num_positions
        if not count:
            raise InvalidConfiguration("no validation text has two answer tokens in a row: use more or longer texts")
        return {name: value / count for name, value in sums.items()}

    # -- stopping and going on ------------------------------------------------------------------------------------------

    @property
    def state_path(self) -> Path:
        """The file from which `resume` goes on."""
        return self.plan.out / STATE

    def save(self) -> None:
        """The newest drafters, then everything needed to go on: killed in between, the older state writes them again."""
        averaged = [student.averaged() for student in self.students]
        state = {
            "identity": self.identity,
            "progress": self.progress,
            "students": {student.recipe.name: student.state_dict() for student in self.students},
        }
        if not self.is_first:
            return  # it was needed for its parts

        def write() -> None:
            for student, model in zip(self.students, averaged, strict=True):
                student.save_newest(model)
            with replace_file(self.state_path) as partial:
                torch.save(state, partial)

        self._written(write)

    def _written(self, write: Callable[[], None]) -> None:
        try:
            write()
        except _UNWRITABLE as error:
            raise CheckpointError(
                f"the drafters could not be written below {self.plan.out} ({error}). What was saved before is whole: "
                "make room and go on with --resume"
            ) from error

    def resume(self) -> bool:
        """Go on from the last save; false when there is none."""
        if not self.state_path.exists():
            self._forget_after(0)  # rows of a run that was killed before its first save
            return False
        state = torch.load(self.state_path, weights_only=True, map_location=self.target.device)
        if state["identity"] != self.identity:
            raise InvalidConfiguration(
                f"{self.plan.out} has a run with other recipes, texts or number of processes: only steps and how often "
                "to log, validate and save may change. Use a new folder, or the same as then"
            )
        self.progress.update(state["progress"])
        for student in self.students:
            student.load_state_dict(state["students"][student.recipe.name])
        self._forget_after(int(self.progress["step"]))
        return True

    def _forget_after(self, step: int) -> None:
        if self.is_first:
            for student in self.students:
                student.forget_after(step)


def _choose_vocabulary(model: Any, texts: list[Text]) -> None:
    """For drafters that know only some of the target's tokens: the most frequent ones of what is to be learned."""
    size = getattr(model.config, "draft_vocab_size", None)
    if size is None:
        return
    counts = torch.zeros(model.config.vocab_size, dtype=torch.long)
    for text in texts:
        counts += text.token_ids[text.loss_mask].long().bincount(minlength=len(counts))
    model.choose_vocabulary(counts.argsort(descending=True, stable=True)[:size])


def refuse_to_overwrite(out: Path) -> None:
    """A folder with a run in it is gone on with when that is asked for, and not otherwise."""
    if (out / STATE).exists():
        raise DSparkError(f"{out} has a run in it already: go on with --resume, or choose another --out")
