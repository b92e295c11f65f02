"""What a run writes down: CSV files, lines or a bar for people, and TensorBoard for those who want it."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.errors import InvalidConfiguration
from dspark.train.files import replace_file

Row = Mapping[str, Any]


class Table:
    """A CSV file that grows by rows; a resumed run first drops the rows that it is about to write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Row) -> None:
        """One more row, below a header if it is the first."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict[str, float]]:
        """All rows, numbers as numbers; a last row that a kill cut short is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(whole))]

    def forget_after(self, step: int) -> None:
        """Drop rows of later steps, and a half one."""
        if self.path.exists():
            rows = [row for row in self.rows() if row["step"] <= step]
            with replace_file(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                if rows:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows({k: int(v) if v.is_integer() else v for k, v in row.items()} for row in rows)
            if not rows:
                self.path.unlink()


class Curves:
    """TensorBoard event files."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidConfiguration('--tensorboard needs tensorboard: pip install "dspark[train]"') from error
        self.writer = SummaryWriter(str(folder))

    def add(self, kind: str, row: Row) -> None:
        """One more point of every curve of this kind."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(f"{kind}/{name}", value, int(row["step"]))
        self.writer.flush()


class ProgressBar:
    """Step, time left and tau, redrawn in place on a terminal; elsewhere nothing, for there are the log's lines."""

    def __init__(self, num_steps: int, done: int, is_shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.is_live = is_shown and console.is_terminal and not console.is_dumb_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.is_live,
        )
        self.task = self.progress.add_task("training", total=num_steps, completed=done)

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def update(self, step: int, loss: float, tau: float) -> None:
        """Where the run is."""
        self.progress.update(self.task, completed=step, description=f"loss {loss:.3f}, tau about {tau:.2f}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.is_live:
            self.progress.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def for_people(name: str, kind: str, row: Row, num_steps: int, note: str = "") -> str:
    """One row as a line: losses, then how drafts fare by decoding, if that was tried. The CSV file has the rest."""
    line = f"{name}: step {row['step']:.0f} of {num_steps}, {kind} loss {row['total']:.4g}"
    parts = [
        f"{part.replace('_', ' ')} {row[part]:.3g}" for part in ("cross_entropy", "l1", "confidence") if row.get(part)
    ]
    line += f" ({', '.join(parts)})" if parts else ""
    if "decoded_tau" in row:
        accepted = [f"{value:.2f}" for column, value in row.items() if column.startswith("accepted_")]
        line += f", decoded tau {row['decoded_tau']:.2f} ± {row['decoded_tau_error']:.2f}"
        line += f", accepted by draft position: {' '.join(accepted)}"
    else:
        line += f", tau about {row['tau']:.2f}"  # were every token the start of a block
    return line + (f", {note}" if note else "")


def time_left(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    whole = round(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
