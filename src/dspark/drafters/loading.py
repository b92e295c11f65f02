"""From a name to a drafter: a built-in one, the embedded pair's, a checkpoint, or a function in a user's file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dspark.budget.calibration import calibration_in
from dspark.checkpoints.dialects import MODELS, dialect
from dspark.checkpoints.drafter import load_block_drafter, read_config
from dspark.checkpoints.folder import Checkpoint, open_checkpoint
from dspark.checkpoints.prompt_format import vocabulary_problems
from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.draft_model import DraftModelDrafter, SelfDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.drafters.gemma4_layer import Gemma4BlockConfig
from dspark.drafters.ngram import NGramDrafter
from dspark.drafters.none import NoDrafter
from dspark.drafters.tree import TreeDrafter
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.loading import embedded_pair_folder, load_target
from dspark.target.plan import View
from dspark.target.target import Target
from dspark.types import Drafter

EMBEDDED = ("dspark", "dflash", "eagle3", "draft")  # folders beside the embedded target


def load_drafter(name_path_or_id: str | os.PathLike[str], target: Target, **options: Any) -> Drafter:
    """The drafter of this name for this target; options are those of its class.

    `none`, `ngram`, `self`, `sparse`; for the embedded target `dspark`, `dflash`, `eagle3`, `draft`; the folder or hub id
    of a block drafter or of a smaller causal LM with the same tokens; `file.py:make`, where make(target, **options)
    gives a Drafter. All but `none` take `length`, the most tokens of a draft; models also take `tree` (the tokens of a tree)
    and `width` (its branches per node), and checkpoints `dtype`. An option that it does not take is refused with those it does.

    Raises CheckpointError where it does not fit the target, and InvalidConfiguration for a name that means nothing.
    """
    if not isinstance(name_path_or_id, str | os.PathLike):
        raise InvalidConfiguration(
            f"a drafter is loaded by its name ('none' for plain decoding), from a folder or a hub id; got a "
            f"{type(name_path_or_id).__name__}: an object with propose and release goes to Engine as it is"
        )
    name = os.fspath(name_path_or_id)
    if isinstance(target, str):
        raise InvalidConfiguration(f"a drafter is loaded for a target: load_drafter({name!r}, load_target({target!r}))")
    check_name(name, target.name)
    if name in _BUILT_IN:
        return _call(name, _BUILT_IN[name], target, options)
    if name in EMBEDDED:
        return _open(str(_embedded(name, target.name)), target, options)
    if _is_file(name):
        return _complete(name, _call(name, _from_file(name), target, options))
    return _open(name, target, options)


def check_name(name: str, target_name: str) -> None:
    """Raise InvalidConfiguration for a drafter's name that means nothing with this target, which need not be loaded yet."""
    if name in EMBEDDED:
        _embedded(name, target_name)
    elif _is_file(name):
        _path_and_function(name)
    elif name not in _BUILT_IN and "/" not in name and not Path(name).expanduser().exists():
        raise InvalidConfiguration(_unknown(name, target_name))


def _none(target: Target) -> Drafter:
    return NoDrafter()


def _ngram(target: Target, length: int = 7, longest: int = 3, shortest: int = 1) -> Drafter:
    return NGramDrafter(length, longest, shortest)


def _self(
    target: Target,
    num_layers: int | None = None,
    length: int = 4,
    window: int | None = None,
    sinks: int | None = None,
    tree: int | None = None,
    width: int = 4,
) -> Drafter:
    if window is None and sinks is not None:
        raise InvalidConfiguration(f"sinks={sinks} are kept beside a window: give window as well, or leave sinks out")
    view = None if window is None else _view(window, 4 if sinks is None else sinks)
    drafter = SelfDrafter(target, num_layers, length, view)
    return drafter if tree is None else TreeDrafter(drafter, tree, width)


def _sparse(
    target: Target,
    num_layers: int | None = None,
    length: int = 4,
    window: int = 512,
    sinks: int = 4,
    tree: int | None = None,
    width: int = 4,
) -> Drafter:
    """All layers, over a view of the cache."""
    num_layers = target.num_layers if num_layers is None else num_layers
    return _self(target, num_layers, length, window, sinks, tree, width)


def _view(window: int, sinks: int) -> View:
    if window < 1:
        raise InvalidConfiguration(
            f"window counts the last tokens that a draft token sees, itself included: 1 or more; got {window}"
        )
    if sinks < 0:
        raise InvalidConfiguration(f"sinks counts the first tokens that a draft token sees: 0 or more; got {sinks}")
    return View(sinks, window)


_BUILT_IN: dict[str, Callable[..., Drafter]] = {"none": _none, "ngram": _ngram, "self": _self, "sparse": _sparse}
WITHOUT_CHECKPOINT = tuple(_BUILT_IN)


def _open(name: str, target: Target, options: dict[str, Any]) -> Drafter:
    revision = options.pop("revision", None)
    checkpoint = open_checkpoint(name, revision)
    if dialect(checkpoint.config) is not None:
        make = _TRAINED[type(read_config(checkpoint))]
        return _call(name, make, target, {"checkpoint": checkpoint, **options})
    if checkpoint.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return _call(name, _draft_model, target, {"checkpoint": checkpoint, **options})
    raise CheckpointError(
        f"{name} is neither a trained drafter nor a causal language model: its config says {checkpoint.architecture}. "
        f"Expected {', '.join(MODELS)} or a ...ForCausalLM"
    )


def _block(
    target: Target,
    checkpoint: Checkpoint,
    length: int | None = None,
    window: int | None = None,
    own_embeddings: bool = False,
    dtype: str | torch.dtype | None = None,
    tree: int | None = None,
    width: int = 4,
) -> Drafter:
    loaded = load_block_drafter(checkpoint, target, _dtype(dtype), own_embeddings=own_embeddings)
    assert isinstance(loaded.model, BlockModel)
    drafter = BlockDrafter(loaded.model, loaded.embed_tokens, loaded.lm_head, length, window)
    drafter.folder, drafter.calibration = checkpoint.path, calibration_in(checkpoint.path)
    return drafter if tree is None else TreeDrafter(drafter, tree, width)


def _eagle3(
    target: Target,
    checkpoint: Checkpoint,
    length: int | None = None,
    window: int | None = None,
    own_embeddings: bool = False,
    dtype: str | torch.dtype | None = None,
    tree: int | None = None,
    width: int = 4,
) -> Drafter:
    loaded = load_block_drafter(checkpoint, target, _dtype(dtype), own_embeddings=own_embeddings)
    assert isinstance(loaded.model, Eagle3Model)
    depth = loaded.model.config.ttt_length if length is None else length
    num_scratch = None if tree is None else max(1, width * (depth - 1))
    drafter = Eagle3Drafter(loaded.model, loaded.embed_tokens, loaded.lm_head, length, window, num_scratch)
    return drafter if tree is None else TreeDrafter(drafter, tree, width)


_TRAINED: dict[type, Callable[..., Drafter]] = {
    BlockConfig: _block,
    Gemma4BlockConfig: _block,
    Eagle3Config: _eagle3,
}


def _draft_model(
    target: Target,
    checkpoint: Checkpoint,
    length: int = 4,
    dtype: str | torch.dtype | None = None,
    tree: int | None = None,
    width: int = 4,
) -> Drafter:
    model = load_target(str(checkpoint.path), dtype or target.dtype, target.device)
    for problem in vocabulary_problems(model.vocab_size, model.tokenizer, target):
        raise CheckpointError(
            f"{checkpoint.name} cannot draft for {target.name}: {problem}. Choose a smaller model of the same family"
        )
    if model.vocab_size != target.vocab_size:
        model = _padded(model, target.vocab_size)
    drafter = DraftModelDrafter(model, length, None if tree is None else width * (length - 1))
    return drafter if tree is None else TreeDrafter(drafter, tree, width)


@torch.no_grad()
def _padded(model: Target, vocab_size: int) -> Target:
    """With embedding and head of as many rows as the target's. Where one has more than the other they stand for no token."""
    num_known = model.vocab_size
    model.model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table in (model.model.get_input_embeddings(), model.model.get_output_embeddings()):
        table.weight[num_known:] = table.weight[:num_known].mean(0)
    return Target(model.model, model.tokenizer, model.name, model.cache)


def _call(name: str, make: Callable[..., Drafter], target: Target, options: dict[str, Any]) -> Drafter:
    """make(target, **options), with the options checked first: an unknown one is named with those there are."""
    parameters = list(inspect.signature(make).parameters.values())[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [option for option in options if option not in accepted]
    if unknown and not takes_any:
        choices = [option for option in accepted if option != "checkpoint"]
        near = difflib.get_close_matches(unknown[0], choices, 1)
        raise InvalidConfiguration(
            f"the drafter {name} has no option {unknown[0]!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" It takes {', '.join(choices) or 'no options'}"
        )
    return make(target, **options)


def _embedded(name: str, target_name: str) -> Path:
    if target_name not in ("tiny",):
        raise InvalidConfiguration(
            f"the drafter {name!r} comes with the embedded target tiny, and the target is {target_name}; "
            "name the folder or hub id of a drafter"
        )
    folder = embedded_pair_folder(target_name) / name
    if not folder.is_dir():
        raise CheckpointError(
            f"the embedded drafter {name!r} is not in this installation: {folder} is missing; reinstall the package"
        )
    return folder


def _is_file(name: str) -> bool:
    return ".py:" in name or name.endswith(".py")


def _path_and_function(name: str) -> tuple[Path, str]:
    """What `path/to/file.py:make` is made of."""
    path_text, _, function = name.rpartition(":")
    if not function or not path_text.endswith(".py"):
        raise InvalidConfiguration(f"expected file.py:function, as in my_drafter.py:make; got {name!r}")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise InvalidConfiguration(
            f"{path_text} does not exist; expected a Python file with a function {function}(target)"
        )
    return path, function


def _from_file(name: str) -> Callable[..., Drafter]:
    """The function that `path/to/file.py:make` names."""
    path, function = _path_and_function(name)
    spec = importlib.util.spec_from_file_location(f"dspark_drafter_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise InvalidConfiguration(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    make = getattr(module, function, None)
    if not callable(make):
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise InvalidConfiguration(f"{path} has no function {function!r}; it has {', '.join(functions) or 'none'}")
    return make


def _complete(name: str, drafter: Any) -> Drafter:
    """What a user's function gave, once it has all that the engine asks of a drafter."""
    needed = ("propose", "release", "length", "feature_layers")
    if lacking := [attribute for attribute in needed if not hasattr(drafter, attribute)]:
        raise InvalidConfiguration(
            f"{name} gave {drafter!r}, which has no {', '.join(lacking)}; expected a drafter: docs/generate.md has one"
        )
    return drafter


def _unknown(name: str, target_name: str) -> str:
    names = [*_BUILT_IN, *(EMBEDDED if target_name == "tiny" else ())]
    near = difflib.get_close_matches(name, names, 1)
    return (
        f"no drafter is called {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" There are {', '.join(names)}, the folder or hub id (organisation/name) of a drafter, and file.py:function"
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InvalidConfiguration(f"dtype must be float32, bfloat16 or float16; got {dtype!r}")
    return getattr(torch, dtype)
