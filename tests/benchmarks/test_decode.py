"""The run as a whole: what is printed when, and what is left when it is cut short."""

import signal
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import decode, report
from benchmarks.contenders import PLAIN
from benchmarks.identity import until
from benchmarks.lineup import Lineup
from benchmarks.measure import Run
from benchmarks.prompts import EncodedPrompt

OPTIONS = SimpleNamespace(requests=[1, 2], per_domain=2, quick=False, tokens=3, repeats=2, until_end=False)
READ = [EncodedPrompt("math", (i,)) for i in range(6)]


class Scripted:
    """Writes the same as everyone; the call numbered `fails_at` is cut short by SIGTERM."""

    family, max_requests = "ours", 8

    def __init__(self, name, fails_at=None):
        self.name, self.is_speculative, self.fails_at, self.num_calls = name, name != PLAIN, fails_at, 0

    def run(self, prompts, num_tokens, temperature, seed):
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            decode.stop(signal.SIGTERM, None)
        return Run([[7] * num_tokens for _ in prompts], seconds=0.5)


def run(fails_at=None):
    done = []
    lineup = Lineup("nowhere", [Scripted(PLAIN), Scripted("ours: dspark", fails_at)])
    code = None
    try:
        decode.run(OPTIONS, lineup, READ, float("inf"), lambda _: None, done.append)
    except SystemExit as ending:
        code = ending.code
    return code, [(s.title, s.num_repeats, len(s.groups), len(s.samples)) for s in done], done


def test_each_section_is_handed_over_when_it_is_measured():
    code, titles, _ = run()
    assert code is None
    assert titles == [
        ("1 request, temperature 0", 2, 2, 8),
        ("1 request, temperature 1", 2, 2, 8),
        ("2 requests, temperature 0", 2, 3, 12),
    ]


# Calls of a section at one request: a warm-up, two prompts, the same two again.
@pytest.mark.parametrize(
    ("fails_at", "left"),
    [
        (1, []),  # nothing was measured
        (2, []),  # the first prompt was not read by everyone
        (3, [("1 request, temperature 0", 1, 1, 2)]),
        (5, [("1 request, temperature 0", 1, 2, 4)]),
        (9, [("1 request, temperature 0", 2, 2, 8), ("1 request, temperature 1", 1, 2, 4)]),
    ],
)
def test_cut_short_it_hands_over_what_everyone_did(fails_at, left):
    code, titles, done = run(fails_at)
    assert (code, titles) == (143, left)
    for section in done:
        assert {len(section.of(name)) for name in section.families} == {section.num_repeats * len(section.groups)}
        assert report.result(section).rows  # can be shown


def test_texts_that_time_does_not_suffice_to_look_up_are_counted(capsys):
    _, _, sections = run()
    for sample in sections[0].of("ours: dspark"):
        sample.run.token_ids = [[7, 7, 8]]
    asked = []

    def gap_of(*context):
        asked.append(context)
        return 0.0, 1.0

    found = [report.result(s) for s in sections]
    for in_time in (True, False):
        same = report.identities(sections, "bfloat16", until(float("inf") if in_time else 0.0, gap_of))
        judged = same[0][1]
        assert (judged.num_explained, judged.num_unjudged) == ((2, 0) if in_time else (0, 2))
        assert (judged.num_identical, judged.num_texts, judged.num_unexplained) == (0, 2, 0)
        report.show_verdicts(Console(width=200), found, same)
        assert ("2 not looked up" in capsys.readouterr().out) != in_time
    assert len(asked) == 2
