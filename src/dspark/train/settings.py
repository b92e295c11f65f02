"""Recipes: TOML tables turned into frozen dataclasses. A key nobody knows is an error, never silently dropped."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dspark.errors import InvalidConfiguration
from dspark.train.data import Source

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

Settings = TypeVar("Settings")


def from_table(table: Mapping[str, Any], kind: type[Settings], where: str) -> Settings:
    """Build the dataclass from a table; lists become tuples, unknown keys are refused with a suggestion."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise InvalidConfiguration(f"unknown key {key!r} in {where}: {hint}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise InvalidConfiguration(f"{where}: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The whole file, as tables."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InvalidConfiguration(
            f"the recipe {path} cannot be read: {error.strerror}. Name a TOML file, or quick, which comes with dspark"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfiguration(f"the recipe {path} is not TOML: {error}") from error


def read_recipe(path: Path, table: str, kind: type[Settings], overrides: Mapping[str, Any] | None = None) -> Settings:
    """One table of a recipe. `[[sources]]` at the top of the file goes to every dataclass with a field of that name.

    overrides   values from flags; None leaves the recipe's own
    """
    recipe = read_toml(path)
    if table not in recipe:
        raise InvalidConfiguration(f"expected a table [{table}] in {path}; it has {', '.join(recipe) or 'none'}")
    values = dict(recipe[table])
    if any(field.name == "sources" for field in dataclasses.fields(kind)):  # type: ignore[arg-type]
        rows = recipe.get("sources", [])
        values["sources"] = [from_table(row, Source, f"{path} [[sources]]") for row in rows]
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    return from_table(values, kind, f"{path} [{table}]")
