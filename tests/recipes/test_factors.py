"""The factor table: every level is a config, and the recipe stands in every factor."""

from __future__ import annotations

import re

import pytest

from unteach.engine.config import Config, override
from unteach.engine.errors import InputError
from unteach.engine.train.methods import settle
from unteach.recipes.benchmarks import muse_books
from unteach.recipes.factors import chosen_factors, factors
from unteach.recipes.quickstart import quickstart
from unteach.recipes.tiny import tiny
from unteach.recipes.wizards import wizards


@pytest.mark.parametrize(
    ("config", "blocks"),
    [(quickstart(), 30), (wizards(), 30), (tiny(), 2), (muse_books(), 28)],
)
def test_every_level_is_another_config_and_one_is_the_recipe(config: Config, blocks: int) -> None:
    for name, levels in factors(config, blocks).items():
        made = [settle(override(config, settings)) for settings in levels.values()]
        distinct = [each for place, each in enumerate(made) if each not in made[:place]]
        # A block is the least that trains, and tiny has two of them.
        assert len(distinct) == len(made) - (name == "trainable" and blocks < 4), name
        if name != "trainable":
            assert made.count(settle(config)) == 1, name


def test_the_cache_holds_as_many_ids_as_k_asks_for() -> None:
    tops = {
        label: override(quickstart(), settings).teacher.top
        for label, settings in factors(quickstart(), 30)["k"].items()
    }
    assert tops == {**dict.fromkeys(("1", "2", "4", "8", "16", "32", "64"), 64), "128": 128}


def test_trainable_levels_name_upper_blocks() -> None:
    levels = factors(quickstart(), 30)["trainable"]

    def trained(label: str) -> list[int]:
        pattern = override(quickstart(), levels[label]).optim.trainable
        names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(30)]
        return [index for index, name in enumerate(names) if re.fullmatch(pattern, name)]

    assert trained("all blocks") == list(range(30))
    assert trained("last half") == list(range(15, 30))
    assert trained("last quarter") == list(range(23, 30))


def test_factors_and_levels_are_chosen_by_name() -> None:
    table = factors(tiny(), 2)
    (first, second) = chosen_factors("alpha, k=8/2", tiny(), table)
    assert (first.name, second.name) == ("alpha", "k")
    assert list(first.levels) == ["0", "0.25", "0.5", "1", "2"]
    assert list(second.levels) == ["2", "4", "8"], "the recipe's own 4 stays"
    assert [factor.name for factor in chosen_factors("all", tiny(), table)] == list(table)
    added = ["format:raw:data.path=raw.jsonl", "format:raw:data.known_only=false"]
    (own,) = chosen_factors("format", tiny(), table, added)
    assert own.levels == {"raw": ("data.path=raw.jsonl", "data.known_only=false")}
    with pytest.raises(InputError, match="did you mean alpha"):
        chosen_factors("alfa", tiny(), table)
    with pytest.raises(InputError, match="--factors k= names no level: write k=1/2, or k for all"):
        chosen_factors("alpha,k=", tiny(), table)
    with pytest.raises(InputError, match=r"--level format:x:method\.k=2: add format to --factors"):
        chosen_factors("k", tiny(), table, ["format:x:method.k=2"])
    with pytest.raises(InputError, match="no comma, slash"):
        chosen_factors("k", tiny(), table, ["a/b:c:method.k=2"])
    for name in ("study", "study-test"):
        with pytest.raises(InputError, match="call the factor something else than study"):
            chosen_factors(name, tiny(), table, [f"{name}:two:method.k=2"])
