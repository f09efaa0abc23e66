"""What can be varied around a recipe, one factor at a time: names, levels and their settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from unteach.engine.config import Config, override
from unteach.engine.data.records import GOALS, Goal
from unteach.engine.errors import InputError
from unteach.engine.study import Factor

Levels = dict[str, tuple[str, ...]]
LOSSES = ("bitopk", "eq3", "duet-loss", "bild-loss", "kl-teacher", "sft")
# A teacher that is prompted otherwise on purpose may fall short of what each goal wants.
UNMEASURED = ("teacher.min_refusal=null", "teacher.min_agreement=null")


def factors(config: Config, blocks: int) -> dict[str, Levels]:
    """Every factor for this config: settings by the label of each level, in the order of a picture.

    Args:
        blocks: decoder blocks of the model.
    """
    method, optim, opened = config.method, config.optim, config.data.open_questions
    return {
        "k": {f"{k}": _top(config, k) for k in _with((1, 2, 4, 8, 16, 32, 64, 128), method.k)},
        "alpha": _numbers("method.alpha", (0, 0.25, 0.5, 1, 2), method.alpha),
        "beta": _numbers("method.beta", (0.1, 0.5, 1, 4, 8, 32), method.beta),
        "loss": _losses(method.gate or 0.2),
        "gate": {
            "none": ("method.gate=null",),
            **_numbers("method.gate", (0.05, 0.1, 0.2, 0.5), method.gate),
        },
        "positions": {n: (f"method.positions={n}",) for n in ("response", "first")},
        "response": _responses(),
        "weights": _weights(config),
        "mix": _mixes(config),
        "lr": _numbers("optim.lr", (3e-5, 1e-4, 3e-4), optim.lr),
        "steps": _numbers("optim.steps", (15, 30, 60, 120), optim.steps),
        "trainable": _trainable(blocks, optim.lr),
        "form": {
            "hidden": ("teacher.form=hidden",),
            "logits": ("teacher.form=logits", "teacher.logits_dtype=bfloat16"),
            "topk": ("teacher.form=topk",),
        },
        "intentions": {
            "oracle": ("teacher.routing=oracle",),
            "ensemble": ("teacher.routing=ensemble", *UNMEASURED),
            "without prefix demos": ("teacher.prefix_demos=false", *UNMEASURED),
        },
        "anchors": {"with": ("data.anchors=true",), "without": ("data.anchors=false",)},
        "open": {
            "without": ("data.open_questions=null",),
            **({"with": (f"data.open_questions={opened}",)} if opened else {}),
        },
        "records": {
            "questions": ("data.form=qa",),
            "passages": ("data.form=passage",),
            "both": ("data.form=null",),
        },
        "method": {name: (f"method.name={name}",) for name in LOSSES},
    }


def chosen_factors(
    text: str, config: Config, table: Mapping[str, Levels], added: Sequence[str] = ()
) -> list[Factor]:
    """Factors by name, in the order in which they are named; `name=label/label` takes some levels.

    The level that is the config itself always stays: the others are compared with it.

    Args:
        text: names parted by commas, or `all`.
        added: levels as `factor:level:section.key=value`, of the table's factors or of new ones;
            a label that is there takes one more setting.
    Raises:
        InputError: a name or a label that is not there; the nearest one is given.
    """
    known = {name: dict(levels) for name, levels in table.items()}
    for level in added:
        name, label, setting = _parsed(level)
        levels = known.setdefault(name, {})
        levels[label] = (*levels.get(label, ()), setting)
    if text.strip() == "all":
        return [Factor(name, levels) for name, levels in known.items()]
    chosen: dict[str, Levels] = {}
    asked = {part.partition("=")[0].strip() for part in text.split(",")}
    for level in added:
        if (name := _parsed(level)[0]) not in asked:
            raise InputError(f"--level {level}: add {name} to --factors, which names what is run.")
    for part in text.split(","):
        name, equals, wanted = part.strip().partition("=")
        if name not in known:
            raise _nearest("factor", name, known)
        if equals and not wanted:
            raise InputError(
                f"--factors {name}= names no level: write {name}={'/'.join([*known[name]][:2])}, "
                f"or {name} for all of them."
            )
        labels = [label.strip() for label in wanted.split("/")] if wanted else [*known[name]]
        for label in labels:
            if label not in known[name]:
                raise _nearest(f"level of {name}", label, known[name])
        chosen[name] = {
            label: settings
            for label, settings in known[name].items()
            if label in labels or override(config, settings) == config
        }
    return [Factor(name, levels) for name, levels in chosen.items()]


def _parsed(level: str) -> tuple[str, str, str]:
    name, label, setting = [*(part.strip() for part in level.split(":", 2)), "", ""][:3]
    if not (name and label and "=" in setting):
        raise InputError(f"--level {level}: write factor:level:section.key=value.")
    if set("/,=") & set(name + label):
        raise InputError(f"--level {level}: a factor and a label have no comma, slash or '='.")
    if name == "study" or name.endswith("-test"):
        raise InputError(
            f"--level {level}: call the factor something else than study or …-test, whose pages "
            "are those of other tables."
        )
    return name, label, setting


def _nearest(kind: str, name: str, table: Mapping[str, Any]) -> InputError:
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(table)}."
    return InputError(f"--factors: there is no {kind} {name}; {hint}")


def _with(values: Sequence[float], own: float | None) -> list[float]:
    """The values and the recipe's own, in order."""
    return sorted({*values} if own is None else {*values, own})


def _numbers(key: str, values: Sequence[float], own: float | None) -> Levels:
    return {f"{value:g}": (f"{key}={value!r}",) for value in _with(values, own)}


def _top(config: Config, k: float) -> tuple[str, ...]:
    """K, and a cache that holds as many ids where the recipe's does not."""
    raised = (f"teacher.top={k}",) if k > config.teacher.top else ()
    return (*raised, f"method.k={k}")


def _losses(gate: float) -> Levels:
    return {
        "raw": ("method.center=false", "method.gate=null"),
        "centered": ("method.center=true", "method.gate=null"),
        "gated": ("method.center=false", f"method.gate={gate!r}"),
        "centered and gated": ("method.center=true", f"method.gate={gate!r}"),
    }


def _responses() -> Levels:
    """Whose answers are supervised where something is to be unlearned."""
    return {
        label: tuple(f"teacher.response.{goal}={says}" for goal in ("forget", "attack"))
        for label, says in {
            "teacher's own": "teacher",
            "gold": "gold",
            "refusal": "refusal",
        }.items()
    }


def _weights(config: Config) -> Levels:
    """The goals of the loss weighed alike, each twice as much as the others, the recipe's own."""
    alike: dict[str, float] = {str(goal): 1.0 for goal in GOALS}
    levels = {"alike": alike, **{f"{goal} 2": {**alike, goal: 2.0} for goal in GOALS}}
    own = {str(goal): weight for goal, weight in config.method.weights.items()}
    if own not in levels.values():
        levels[" ".join(f"{g} {w:g}" for g, w in own.items() if w != 1)] = own
    return {label: (f"method.weights={json.dumps(each)}",) for label, each in levels.items()}


def _mixes(config: Config) -> Levels:
    """Records of a step as forget:attack:neighbor:general, by neighbors for each forget record."""
    goals: tuple[Goal, ...] = ("forget", "attack", "neighbor", "general")
    own = tuple(config.data.mix.get(goal, 0) for goal in goals)
    mixes = sorted(
        {(3, 2, 2, 3), (3, 2, 4, 3), (2, 2, 6, 2), own}, key=lambda mix: mix[2] / max(mix[0], 1)
    )
    levels: dict[str, Any] = {
        ":".join(map(str, mix)): dict(zip(goals, mix, strict=True)) for mix in mixes
    }
    return {label: (f"data.mix={json.dumps(mix)}",) for label, mix in levels.items()}


def _trainable(blocks: int, lr: float) -> Levels:
    """Parts of the model; adapters at ten times the rate, because they begin at zero."""

    def upper(count: int) -> tuple[str, ...]:
        numbers = "|".join(str(index) for index in range(blocks - max(count, 1), blocks))
        return (f"optim.trainable=.*\\.layers\\.({numbers})\\..*",)

    return {
        "everything": ("optim.trainable=.*",),
        "all blocks": upper(blocks),
        "last half": upper(blocks // 2),
        "last quarter": upper(blocks // 4),
        "LoRA": (*upper(blocks), "optim.lora_rank=16", f"optim.lr={10 * lr:g}"),
    }
