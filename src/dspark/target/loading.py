"""From a name to a Target: the embedded pair, a local folder, or a hub id."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.check import check_parity
from dspark.target.deterministic import make_deterministic
from dspark.target.target import Target
from dspark.target.unreadable import UNREADABLE, explained, not_a_model

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EMBEDDED = ("tiny",)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_FOR_ALL_FILES = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only")  # the tokenizer's too


def load_target(
    path_or_id: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    check: bool = True,
    deterministic: bool = False,
    **from_pretrained: Any,
) -> Target:
    """Load a causal LM over a slot cache: `tiny`, a folder, or a hub id.

    dtype   float32, bfloat16, float16 or None for the checkpoint's own
    device  None: cuda where there is one, else cpu
    check   compare a short forward with the plain model and refuse the family where they differ
    deterministic  logits with the same bits alone, in a draft and beside other requests, at some cost; chains only,
                   uncompiled
    Everything else goes to transformers' from_pretrained (revision, quantization_config, ...); code from the hub runs
    only with trust_remote_code=True.

    Raises CheckpointError where there is no such model or it cannot be read, UnsupportedModel where it does not run over
    the slot cache, and InvalidConfiguration for options that it cannot have.
    """
    if not isinstance(path_or_id, str | os.PathLike):
        raise InvalidConfiguration(
            f"a target is loaded from a folder or a hub id, and not from a {type(path_or_id).__name__}: save a model that is "
            "in memory with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)"
        )
    name = os.fspath(path_or_id)
    source = resolve(name)
    wanted = _dtype(dtype)
    place = _device(device)
    for_files = {key: from_pretrained[key] for key in _FOR_ALL_FILES if key in from_pretrained}
    model = _load_model(name, source, wanted, from_pretrained)
    places = {str(parameter.device) for parameter in model.parameters()}
    if "device_map" not in from_pretrained and places != {str(place)}:  # quantised ones are there, and refuse to move
        model.to(place)
    elif len(places) > 1:
        raise InvalidConfiguration(
            f"the layers of {name} lie on {', '.join(sorted(places))}, and all must lie on one device: give device='cuda:0' "
            "or the like in place of device_map, with a dtype or quantization_config that makes it fit"
        )
    if place.type == "cpu":
        _keep_freed_memory()
    tokenizer = load_tokenizer(name, source, for_files)
    if tokenizer is None:
        _log.warning("%s has no tokenizer: prompts must be token ids", name)
    plain = model.config._attn_implementation
    target = Target(model, tokenizer, name)
    if check:
        check_parity(target, plain)
        target.fit_cache()
    if deterministic:
        make_deterministic(target)
    return target


def embedded_pair_folder(name: str) -> Path:
    """The folder of an embedded pair (target/, dspark/, dflash/, eagle3/, draft/), in a clone or in an installed wheel."""
    here = Path(__file__).resolve()
    candidates = [here.parents[3] / "pairs" / name, here.parents[1] / "pairs" / name]
    for folder in candidates:
        if (folder / "target" / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"the embedded pair {name!r} is not in this installation: looked in {' and '.join(map(str, candidates))}; "
        "reinstall the package, or name the folder of a model"
    )


def resolve(name: str) -> str:
    """A folder that exists, or a hub id. What can only be a path and does not exist never reaches the network."""
    if name in _EMBEDDED:
        return str(embedded_pair_folder(name) / "target")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise not_a_model(name, path)
        return str(path)
    if path.exists():
        raise not_a_model(name, path)
    first = path.parts[0] if path.parts else ""
    if not _HUB_ID.fullmatch(name) or (len(path.parts) > 1 and Path(first).is_dir()):
        raise CheckpointError(
            f"{name} does not exist; expected a model's folder, a hub id (organisation/name), or {', '.join(_EMBEDDED)}"
        )
    return name


def _keep_freed_memory() -> None:
    """Let the buffers of one layer be the next layer's instead of going back to the kernel (glibc only).

    Without this, 32 requests of 300 tokens cost 9,400 page faults per forward, which was half of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: its maximum
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD: keep up to 512 MiB at the top of the heap


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    raise InvalidConfiguration(
        f"dtype must be one of {', '.join(_DTYPES)} (or None for the checkpoint's own); got {dtype}"
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; or one that this torch was not built for
        reason = str(error).splitlines()[0]
        raise InvalidConfiguration(f"the device {device} cannot be used here ({reason}); cpu always can") from error


def _load_model(name: str, source: str, dtype: torch.dtype | str, options: dict[str, Any]) -> Any:
    try:
        if not Path(source).is_dir():
            _ask_hub(source, options)
        model, loading = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise explained(name, source, error, options) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InvalidConfiguration(
            f"{name} takes no such option: {error}. What load_target does not know goes to transformers' from_pretrained; "
            "to quantise, give it a quantization_config"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the tensors of {type(model).__name__}, among them "
            f"{', '.join(missing[:3])}; the checkpoint is incomplete or not a causal language model. A drafter is named as "
            "the drafter, beside the target that it was trained for (`dspark info` says what a folder is)"
        )
    return model


def _ask_hub(source: str, options: dict[str, Any]) -> None:
    """One question, of a second where the network is down; from_pretrained asks for many files and repeats each."""
    wanted = {key: options[key] for key in _FOR_ALL_FILES if key in options and key != "trust_remote_code"}
    snapshot_download(source, allow_patterns=["config.json"], **wanted)


def load_tokenizer(name: str, source: str, options: dict[str, Any]) -> Any:
    """The tokenizer, or None where the folder has none: token ids still work."""
    path = Path(source)
    if path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except UNREADABLE as error:
        raise CheckpointError(
            f"the tokenizer of {name} could not be read ({type(error).__name__}: {error}); expected tokenizer.json "
            "beside the weights, or no tokenizer at all (prompts are token ids then)"
        ) from error
