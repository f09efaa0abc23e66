"""What can be run: every recipe by name."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterator

from unteach.engine.config import Config, keys
from unteach.engine.errors import InputError
from unteach.recipes.benchmarks import muse_books, rwku, tofu, wmdp_cyber
from unteach.recipes.quickstart import quickstart
from unteach.recipes.tiny import tiny
from unteach.recipes.wizards import wizards

RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart,
    "tiny": tiny,
    "wizards": wizards,
    "muse-books": muse_books,
    "wmdp-cyber": wmdp_cyber,
    "rwku": rwku,
    "tofu": tofu,
}


def find_recipe(name: str) -> Config:
    """The config of a recipe.

    Raises:
        InputError: no such recipe; the nearest name is given.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(RECIPES)}."
        raise InputError(f"There is no recipe {name}; {hint}")
    return RECIPES[name]()


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (inspect.getdoc(RECIPES[name]) or "").splitlines()[0]


def described_settings(name: str) -> Iterator[str]:
    """Every setting of a recipe as `section.key=value`, as --set takes it, and what it is.

    Raises:
        InputError: no such recipe.
    """
    values = find_recipe(name).model_dump(mode="json")
    yield from (f"{section}=null" for section, value in values.items() if value is None)
    for full, field in keys().items():
        section, key = full.split(".")
        if values[section] is not None:
            value = values[section][key]
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{full}={text}  # {field.description}"
