"""Traces kept on disk: the target's states over every text, so that many runs need its forward only once.

Written in shards with a checksum each; a run that is stopped goes on with the shards that are whole. It costs
`bytes_per_token` for every token, which is why training makes states anew (online) unless it is asked not to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.checkpoints.prompt_format import fingerprint
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.train.files import replace_file
from dspark.train.texts import Text, pad
from dspark.train.traces import TargetStates

_log = logging.getLogger(__name__)
_MANIFEST = "traces.json"
_TOKENS_PER_SHARD = 65536
_ROOM = 1.05  # of the estimate, for headers and the file system


@dataclass(frozen=True)
class CacheSize:
    """What a cache of these texts takes: features and last state of every token, in the target's dtype."""

    num_tokens: int
    bytes_per_token: int

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token


def cache_size(texts: Sequence[Text], num_features: int, hidden_size: int, dtype: torch.dtype) -> CacheSize:
    """num_features: width of the wanted layers side by side."""
    return CacheSize(sum(map(len, texts)), (num_features + hidden_size) * dtype.itemsize)


class TraceCache:
    """Traces of a list of texts below a folder. Call it like the target's states, with texts it knows."""

    def __init__(self, folder: Path, texts: Sequence[Text], target: str, layer_ids: Sequence[int]) -> None:
        self.folder, self.texts = folder, texts
        whole = hashlib.sha256()
        for text in texts:
            whole.update(text.token_ids.numpy().tobytes())
        self.identity = fingerprint([target, list(layer_ids), whole.hexdigest()])
        self.place: dict[int, tuple[Path, int]] = {}  # id of a text -> its shard and where it starts there
        self.open_files: dict[Path, Any] = {}

    def _shards(self) -> list[list[Text]]:
        """Texts in their order, cut into shards of about equal size."""
        shards: list[list[Text]] = [[]]
        num_tokens = 0
        for text in self.texts:
            if num_tokens and num_tokens + len(text) > _TOKENS_PER_SHARD:
                shards.append([])
                num_tokens = 0
            shards[-1].append(text)
            num_tokens += len(text)
        return shards

    def fill(self, states: TargetStates, device: torch.device, say: Callable[[str], None]) -> None:
        """Write what is not there yet. Says how large it will be and refuses what does not fit on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self._done()
        config = states.model.config.get_text_config(decoder=True)
        dtype = states.model.get_input_embeddings().weight.dtype
        width = len(states.layer_ids) * config.hidden_size
        size = cache_size(self.texts, width, config.hidden_size, dtype)
        missing = [(n, shard) for n, shard in enumerate(self._shards()) if _name(n) not in done]
        needed = size.bytes_per_token * sum(len(text) for _, shard in missing for text in shard)
        free = shutil.disk_usage(self.folder).free
        say(
            f"traces: {size.num_tokens} tokens of {size.bytes_per_token} bytes are {_readable(size.num_bytes)}; "
            f"{_readable(needed)} to be written, {_readable(free)} free"
        )
        if needed * _ROOM > free:
            raise InvalidConfiguration(
                f"traces need {_readable(round(needed * _ROOM))} more in {self.folder}, and {_readable(free)} are free: "
                "choose another disk, fewer texts or feature layers, or train without --cache"
            )
        for number, shard in missing:
            done[_name(number)] = self._write(self.folder / _name(number), shard, states, device)
            with replace_file(self.folder / _MANIFEST) as partial:
                partial.write_text(json.dumps({"identity": self.identity, "sha256": done}, indent=2), encoding="utf-8")
        for number, shard in enumerate(self._shards()):
            start = 0
            for text in shard:
                self.place[id(text)] = (self.folder / _name(number), start)
                start += len(text)

    def _done(self) -> dict[str, str]:
        """{shard: checksum} of those that are whole; a cache of something else is refused."""
        path = self.folder / _MANIFEST
        if not path.exists():
            return {}
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["identity"] != self.identity:
            raise InvalidConfiguration(
                f"{self.folder} has traces of another target, other texts or other layers: choose another --cache"
            )
        whole = {}
        for name, checksum in manifest["sha256"].items():
            if (self.folder / name).exists() and _checksum(self.folder / name) == checksum:
                whole[name] = checksum
            else:
                _log.warning("%s is damaged or missing and will be made again", self.folder / name)
        return whole

    def _write(self, path: Path, shard: Sequence[Text], states: TargetStates, device: torch.device) -> str:
        features, last_hidden = [], []
        for text in shard:
            token_ids, _ = pad([text])
            own_features, own_hidden = states(token_ids.to(device))
            features.append(own_features[0].cpu())
            last_hidden.append(own_hidden[0].cpu())
        try:
            with replace_file(path) as partial:
                save_file({"features": torch.cat(features), "last_hidden": torch.cat(last_hidden)}, partial)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} could not be written ({error}): make room and start again") from error
        return _checksum(path)

    def __call__(self, texts: Sequence[Text], token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, S, F], last_hidden [B, S, H] of texts, padded with zeros."""
        rows = [self._read(text) for text in texts]
        pads = [torch.nn.utils.rnn.pad_sequence([row[i] for row in rows], batch_first=True) for i in (0, 1)]
        return pads[0].to(token_ids.device), pads[1].to(token_ids.device)

    def _read(self, text: Text) -> tuple[Tensor, Tensor]:
        path, start = self.place[id(text)]
        if path not in self.open_files:
            self.open_files[path] = safe_open(path, framework="pt")
        part = slice(start, start + len(text))
        file = self.open_files[path]
        return file.get_slice("features")[part], file.get_slice("last_hidden")[part]


def _name(number: int) -> str:
    return f"traces-{number:05d}.safetensors"


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _readable(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
