"""Render records into shards of texts, and account for every one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark.checkpoints.prompt_format import fingerprint, template_fingerprint, tokenizer_fingerprint
from dspark.errors import InvalidConfiguration
from dspark.train.records import Malformed, Record, files_of
from dspark.train.rendering import Renderer, Unusable
from dspark.train.texts import Text, TextsInfo, save_texts

_TEXTS_PER_SHARD = 4096


@dataclass
class Counts:
    """read = written + skipped."""

    read: int = 0
    written: int = 0
    tokens: int = 0
    learned: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def skipped(self) -> int:
        """Records left out, for whatever reason."""
        return self.reasons.total()

    def skipped_by_reason(self) -> list[tuple[str, int]]:
        """(reason, count), the most frequent first."""
        return self.reasons.most_common()


def prepare(
    records: Iterable[Record | Malformed],
    renderer: Renderer,
    out: Path,
    target: str,
    vocab_size: int,
    max_length: int = 4096,
    min_answer: int = 4,
) -> Counts:
    """Shards of texts in `out`, which must be new or empty; texts.json comes last, so a folder with it is whole."""
    if out.exists() and any(out.iterdir()):
        raise InvalidConfiguration(
            f"expected a new or empty folder for the texts; {out} has files in it: choose another"
        )
    out.mkdir(parents=True, exist_ok=True)
    counts, waiting, num_shards = Counts(), [], 0
    for record in records:
        counts.read += 1
        text = _rendered(record, renderer, max_length, min_answer)
        if isinstance(text, Unusable):
            counts.reasons[text.reason] += 1
            continue
        waiting.append(text)
        counts.written += 1
        counts.tokens += len(text)
        counts.learned += text.num_learned
        if len(waiting) == _TEXTS_PER_SHARD:
            save_texts(waiting, out / f"shard-{num_shards:05d}.safetensors")
            waiting, num_shards = [], num_shards + 1
    if waiting:
        save_texts(waiting, out / f"shard-{num_shards:05d}.safetensors")
    assert counts.read == counts.written + counts.skipped, f"{counts} does not add up"
    TextsInfo(
        target=target,
        vocab_size=vocab_size,
        tokenizer=tokenizer_fingerprint(renderer.tokenizer),
        template=template_fingerprint(renderer.tokenizer),
        system_prompt=fingerprint(renderer.system),
        made_by="prepare",
        settings={"max_length": max_length, "min_answer": min_answer, "system": renderer.system},
        counts={"read": counts.read, "written": counts.written, "skipped": counts.skipped, "tokens": counts.tokens},
    ).save(out)
    return counts


def _rendered(record: Record | Malformed, renderer: Renderer, max_length: int, min_answer: int) -> Text | Unusable:
    if isinstance(record, Malformed):
        return Unusable("malformed")
    text = renderer.render(record)
    if isinstance(text, Unusable):
        return text
    text = text.cut(max_length)
    return text if text.num_learned >= min_answer else Unusable("fewer answer tokens than --min-answer")


def input_of(inputs: Sequence[str]) -> dict[str, Any]:
    """What the input is, so that a run can tell whether it goes on with the same: names and sizes of its files."""
    files = {file.name: file.stat().st_size for file in files_of(inputs)}
    return {"files": len(files), "fingerprint": fingerprint([[Path(name).name for name in inputs], files])}
