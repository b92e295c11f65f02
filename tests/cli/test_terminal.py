"""What is counted and marked around the text."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cli.command import PAIR
from dspark.cli.against_plain import Difference, first_difference
from dspark.cli.main import main
from dspark.cli.terminal import acceptance_by_position, print_json, quiet_drift, speculation_summary, wants_colour
from dspark.engine.marks import DraftMarks
from dspark.engine.text import Detokenizer, StopStrings
from dspark.types import Delta, Round

TOKENIZER = AutoTokenizer.from_pretrained(PAIR / "target")


def test_acceptance_counts_only_positions_that_were_reached() -> None:
    # drafted 3 each: all accepted; none; one of the two that were read; nothing read
    rounds = [Round(3, 3, 3), Round(3, 3, 0), Round(3, 2, 1), Round(3, 0, 0)]
    assert acceptance_by_position(rounds) == [(2, 3), (1, 2), (1, 1)]
    assert "accepted/reached by draft position: 2/3 1/2 1/1" in speculation_summary(2.0, rounds)


def test_positions_of_trees_are_depths() -> None:
    # of 15 tokens read two on one path were right, then one more was wrong, or none was read; or all at depth 1 were wrong
    rounds = [Round(15, 15, 2, False), Round(15, 15, 2, True), Round(15, 15, 0, False)]
    assert acceptance_by_position(rounds) == [(2, 3), (2, 2), (0, 1)]


def test_plain_decoding_has_no_positions() -> None:
    assert acceptance_by_position([Round(0, 0, 0)] * 3) == []
    assert speculation_summary(1.0, [Round(0, 0, 0)] * 3) == "tau 1.00 over 3 target passes"


@given(st.text("ab 😀é", max_size=40), st.lists(st.integers(1, 5), min_size=1), st.booleans())
def test_marks_follow_the_text_of_their_tokens(text: str, sizes: list[int], has_stop: bool) -> None:
    token_ids = TOKENIZER(text)["input_ids"]
    is_drafted = [position % 3 != 0 for position in range(len(token_ids))]
    detokenizer, marks = Detokenizer(TOKENIZER), DraftMarks(TOKENIZER)
    stop_strings = StopStrings(["b a"] if has_stop else [])
    runs: list[tuple[str, bool]] = []
    shown, start, turn = "", 0, 0
    while start < len(token_ids):
        end = start + sizes[turn % len(sizes)]
        piece = stop_strings.push(detokenizer.push(token_ids[start:end]))
        delta_runs = list(marks.split(Delta(piece, token_ids[start:end], is_drafted[start:end])))
        assert "".join(run for run, _ in delta_runs) == piece
        runs, shown, start, turn = runs + delta_runs, shown + piece, end, turn + 1
    by_token, one_by_one = [], Detokenizer(TOKENIZER)
    for token_id, drafted in zip(token_ids, is_drafted, strict=True):
        by_token += [(character, drafted) for character in one_by_one.push([token_id])]
    assert [(character, drafted) for run, drafted in runs for character in run] == by_token[: len(shown)]


def test_json_has_no_word_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": float("-inf"), "d": Path("x"), "e": None, "f": 2}})
    assert capsys.readouterr().out == '{"a": [null, [null, 1.5]], "b": {"c": null, "d": "x", "e": null, "f": 2}}\n'


@pytest.mark.parametrize(
    ("is_terminal", "no_color", "variable", "expected"),
    [(True, False, "", True), (False, False, "", False), (True, True, "", False), (True, False, "1", False)],
)
def test_colour_is_for_people_who_want_it(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, no_color: bool, variable: str, expected: bool
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(stream, no_color) is expected


def test_the_first_difference_is_found_also_where_one_ends() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 3, 4], [1, 2, 4]) == Difference(1, 3, 2)
    assert first_difference([1], [1, 2]) == Difference(1, None, 2)
    assert first_difference([1, 2], [1]) == Difference(1, 2, None)


@pytest.mark.parametrize(
    ("verb", "flag"),
    [("compare none ngram", "--save"), ("profile", "--sps"), ("profile", "--output"), ("verify-lossless", "--keep")],
)
def test_results_that_could_not_be_written_are_refused_first(
    verb: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, reason in ((tmp_path / "nowhere" / "x.json", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit) as end:
            main([*verb.split(), flag, str(name)])
        assert end.value.code == 2 and reason in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise PermissionError(13, "Permission denied", "secret.json")

    monkeypatch.setattr("dspark.cli.info.run", run)
    assert main(["info", "tiny"]) == 2
    assert capsys.readouterr().err == "dspark: error: secret.json: Permission denied\n"


def test_drift_is_quiet_only_while_it_means_nothing() -> None:
    log = logging.getLogger("dspark.budget.beliefs")
    with quiet_drift():
        assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.WARNING)
