"""Everything that can be wrong with a run is found here, from config files alone, before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from dspark.checkpoints.folder import open_checkpoint
from dspark.checkpoints.prompt_format import fingerprint, template_fingerprint, tokenizer_fingerprint
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.losses import LossWeights
from dspark.target.loading import resolve
from dspark.train.kinds import make_config, shape_of
from dspark.train.settings import from_table, read_toml
from dspark.train.student import Recipe, TrainSettings
from dspark.train.texts import Text, TextsInfo, read_infos, read_texts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """The recipe's [run] table, and what flags override: where things are. Paths are relative to where one stands."""

    target: str | None = None
    data: str | None = None
    out: str | None = None
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Plan:
    """A run that fits together. prints: of tokenizer, template and system prompt; they go into the drafter's config."""

    target: str
    recipes: tuple[Recipe, ...]
    texts: list[Text]
    out: Path
    run: RunSettings
    prints: dict[str, str]

    @property
    def settings(self) -> TrainSettings:
        """Batches and steps are the first recipe's."""
        return self.recipes[0].settings


def make_plan(paths: Sequence[Path], run: Mapping[str, Any], train: Mapping[str, Any]) -> Plan:
    """Read recipes and check them against target and texts. run, train: what flags override; None leaves the recipe's."""
    tables = [read_toml(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if unknown := sorted(set(table) - {"run", "drafter", "train", "loss", "sources", "regenerate"}):
            raise InvalidConfiguration(f"{path} has a table [{unknown[0]}]; expected [run], [drafter], [train], [loss]")
    settings = _override(from_table(tables[0].get("run", {}), RunSettings, f"{paths[0]} [run]"), run)
    for name in ("target", "data", "out"):
        if getattr(settings, name) is None:
            raise InvalidConfiguration(f"expected {name}: give --{name}, or set it in the [run] table of {paths[0]}")
    if len({path.stem for path in paths}) != len(paths):
        raise InvalidConfiguration("drafters are named after their recipe files, and two have one name: rename one")
    target, out = str(settings.target), Path(str(settings.out))
    config, tokenizer = _config_and_tokenizer(target)
    shape = shape_of(config)
    recipes = tuple(
        _recipe(path, table, train, shape, tokenizer, out) for path, table in zip(paths, tables, strict=True)
    )
    layers = {tuple(recipe.config.target_layer_ids) for recipe in recipes}
    if len(layers) != 1:
        raise InvalidConfiguration(f"drafters trained together must want the same target layers; got {sorted(layers)}")
    prints = _prints(Path(str(settings.data)), target, tokenizer, shape["vocab_size"])
    for recipe in recipes:
        _refuse_misfit(recipe, shape, prints)
    texts = read_texts(Path(str(settings.data)), max_length=recipes[0].settings.max_length)
    if (largest := max(int(text.token_ids.max()) for text in texts)) >= shape["vocab_size"]:
        raise InvalidConfiguration(
            f"{settings.data} has the token id {largest}, and {target} knows {shape['vocab_size']} tokens: the texts "
            "were made for another target; make them again"
        )
    return Plan(target, recipes, texts, out, settings, prints)


def _recipe(
    path: Path, table: Mapping[str, Any], train: Mapping[str, Any], shape: Mapping[str, Any], tokenizer: Any, out: Path
) -> Recipe:
    if "drafter" not in table or "train" not in table:
        raise InvalidConfiguration(f"expected the tables [drafter] and [train] in {path}; it has {', '.join(table)}")
    values = {**table["train"], **{name: value for name, value in train.items() if value is not None}}
    if train.get("start_from"):  # the flag wins over the recipe's own way to begin
        values |= {"start_from_target": False, "start_head_from_texts": False}
    settings = from_table(values, TrainSettings, f"{path} [train]")
    weights = from_table(table.get("loss", {}), LossWeights, f"{path} [loss]")
    architecture, config = make_config(table["drafter"], shape, tokenizer, f"{path} [drafter]")
    return Recipe(path.stem, architecture, config, settings, weights, out / path.stem)


def _override(settings: RunSettings, flags: Mapping[str, Any]) -> RunSettings:
    return replace(settings, **{name: str(value) for name, value in flags.items() if value is not None})


def _config_and_tokenizer(target: str) -> tuple[Any, Any]:
    source = resolve(target)
    try:
        config = AutoConfig.from_pretrained(source).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"config.json of {target} could not be read ({type(error).__name__}: {error})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s has no tokenizer that can be read (%s): its texts cannot be checked against it", target, error)
        tokenizer = None
    return config, tokenizer


def _prints(data: Path, target: str, tokenizer: Any, vocab_size: int) -> dict[str, str]:
    """What the texts were made with; refuses other tokens, warns of other templates."""
    infos = read_infos(data) if data.is_dir() else []
    if tokenizer is None:
        return {}
    own = {"tokenizer_sha256": tokenizer_fingerprint(tokenizer), "template_sha256": template_fingerprint(tokenizer)}
    for info in infos:
        if (info.vocab_size, info.tokenizer) != (vocab_size, own["tokenizer_sha256"]):
            raise InvalidConfiguration(
                f"{data} was made for {info.target}, whose tokenizer is not that of {target}: make the texts again "
                f"with --target {target}, or train for {info.target}"
            )
        if info.made_by == "regenerate" and Path(info.target).name != Path(target).name:
            _log.warning("%s has answers of %s: a drafter learns best from those of its own target", data, info.target)
        if info.template != own["template_sha256"]:
            _log.warning(
                "%s was rendered with another chat template than %s has now: the drafter will be served on prompts "
                "unlike those it learned from",
                data,
                target,
            )
    own["system_prompt_sha256"] = _system_prompt(data, infos)
    return own


def _system_prompt(data: Path, infos: Sequence[TextsInfo]) -> str:
    prompts = {info.system_prompt for info in infos}
    if len(prompts) > 1:
        _log.warning("%s has texts with %d different system prompts; serve with one of them", data, len(prompts))
    return prompts.pop() if len(prompts) == 1 else "unknown" if not prompts else "several"


def _refuse_misfit(recipe: Recipe, shape: Mapping[str, Any], prints: Mapping[str, str]) -> None:
    """A drafter of another width, vocabulary or tokenizer than the target's."""
    where = f"the drafter of {recipe.name}.toml"
    for name, what in (("hidden_size", "wide"), ("vocab_size", "tokens large")):
        if getattr(recipe.config, name) != shape[name]:
            raise InvalidConfiguration(
                f"{where} does not fit the target: it is {getattr(recipe.config, name)} {what} and the target "
                f"{shape[name]}: leave {name} out of the recipe"
            )
    source = recipe.settings.start_from
    if source is None:
        return
    before = open_checkpoint(source).config
    for name in ("hidden_size", "vocab_size"):
        if name in before and before[name] != shape[name]:
            raise CheckpointError(
                f"start_from: {source} does not fit the target: its {name} is {before[name]} and the target's "
                f"{shape[name]}. Start from a drafter of this target"
            )
    told = before.get("tokenizer_sha256")
    if told is not None and prints and told != prints["tokenizer_sha256"]:
        raise CheckpointError(f"start_from: {source} was trained with another tokenizer than the target's")


def identity(plan: Plan, num_processes: int) -> str:
    """What must be the same for a run to go on; how long it runs and how often it reports may change."""
    free = {"steps", "save_seconds", "log_every", "validate_every", "validation_prompts", "validation_tokens"}
    recipes = [
        [
            r.name,
            r.architecture,
            vars(r.config),
            {k: v for k, v in vars(r.settings).items() if k not in free},
            vars(r.weights),
        ]
        for r in plan.recipes
    ]
    return fingerprint([recipes, [len(text) for text in plan.texts], num_processes])
