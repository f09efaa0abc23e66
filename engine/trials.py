"""Trainings that are made, scored and written down one by one: `unteach compare`, `unteach study`.

A trial is the recipe with a few settings, a seed and the questions it is scored on. All trials of
a run folder share the taught model, and those that would make the same teacher cache share that.
Each ends as one line of rows.jsonl with the digest of everything that made it: the same trial is
never made twice, by whatever settings it was asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from unteach.engine.config import Config, DataConfig, override
from unteach.engine.data.records import (
    GOALS,
    Record,
    check_disjoint,
    read_records,
)
from unteach.engine.data.settings import SourceSettings
from unteach.engine.data.tokens import tokenizer_fingerprint
from unteach.engine.errors import InputError
from unteach.engine.evaluate.extraction import SEARCHED
from unteach.engine.evaluate.headings import is_stress
from unteach.engine.evaluate.ranking import Cost, Trial
from unteach.engine.evaluate.report import read_steps
from unteach.engine.evaluate.scores import DIRECTIONS, Score, overall
from unteach.engine.evaluate.stress import any_stress, check_stresses, stressed
from unteach.engine.evaluate.suites import (
    Evaluation,
    check_questions,
    evaluate,
    protocol_hash,
    read_mmlu,
    tested_records,
)
from unteach.engine.evaluate.told import NOTHING, Told
from unteach.engine.evaluate.tuning import Tuning, tuning_records, tuning_split
from unteach.engine.files import alone_in
from unteach.engine.progress import say
from unteach.engine.run import (
    Run,
    configured_intentions,
    digest,
    records_fingerprint,
    with_additions,
)
from unteach.engine.stages import train_stage, training_cache
from unteach.engine.teacher.manifest import SHARED
from unteach.engine.train.checkpoint import remove_checkpoints
from unteach.engine.train.log import reset_peak
from unteach.engine.train.methods import check_method, find_method, settle
from unteach.engine.train.trunk import FrozenOutputs
from unteach.engine.trial_rows import append_trial, drop_torn_line, read_trials

Split = Literal["tune", "test"]
Prompted = Literal["base", "oracle", "ensemble"]
# What a trial may set: the rest makes the base or the scores, which all trials share.
SECTIONS = ("data", "teacher", "method", "optim", "parallel")


class Trials:
    """The trials of one folder: what they are made of, and the lines there are.

    Args:
        name: of the folder inside the run's, and of the command in what is printed.
        stress: the questions beside whose scores stands what `evaluate` asks for, on the base and
            on every training; None for neither.
    """

    def __init__(self, run: Run, name: str, *, stress: Split | None = None) -> None:
        run = replace(run, frozen=FrozenOutputs())
        self.run, self.world, self.name, self.stress = run, run.world, name, stress
        self.folder = run.folder / name
        self.path = self.folder / "rows.jsonl"
        self.words = tokenizer_fingerprint(run.tokenizer)
        mmlu = read_mmlu(Path(run.config.data.mmlu)) if run.config.data.mmlu else None
        tune = tuning_records(run.records)
        goals = tuple(g for g in run.config.evaluate.goals if any(r.goal == g for r in tune))
        settings = run.config.evaluate.model_copy(update={"goals": goals})
        self.tuning = Tuning(tuning_split(run.records), len(tested_records(settings, tune)))
        self.tests = {
            "test": (run.config, run.records, mmlu),
            "tune": (run.config.model_copy(update={"evaluate": settings}), tune, None),
        }
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self.path)
        self.world.wait()
        read_trials(self.path)  # refuses a line that is no row before anything is made

    def check_split(self, split: Split) -> None:
        """Refuse questions and stresses that cannot be scored, before the first training begins."""
        config, records, mmlu = self.tests[split]
        check_questions(config.evaluate, records, mmlu)
        self._protocol(split)  # reads every file that the scores hang on
        if self.stress != split:
            return
        if not any_stress(config):
            raise InputError(
                "--stress measures what the evaluate section asks for, which is nothing: --set "
                "evaluate.few_shot=4, evaluate.quantized=[8,4] or evaluate.relearn_steps=10."
            )
        if split == "tune" and self.tuning.split == "train":
            raise InputError(
                "--stress asks what was never trained on, and no record is of split `tune`: give "
                "--split test."
            )
        check_stresses(config, self.stressed_records(split))

    def stressed_records(self, split: Split) -> list[Record]:
        """What stresses train on and what they ask, which are the questions of the split."""
        records = self.tests[split][1]
        trained = [r for r in self.run.records if r.split == "train"] if split == "tune" else []
        return [*trained, *records]

    def prompted(self, name: Prompted, split: Split) -> Trial:
        """The model as it is (`base`), or behind intentions: scored without training."""
        told = NOTHING if name == "base" else Told(name, self.run.intentions)
        prompts = told.intentions.model_dump(mode="json") if told.intentions else None
        inputs = digest([self.run.base_fingerprint, self._protocol(split), told.routing, prompts])
        stress = self.stress == split and name == "base"
        if self._line(inputs, stress) is None:
            title = f"{name}, {split}"
            scored = self._scored(self.run.base, title, split, told, stress)
            line = None if scored is None else self._row(name, split, inputs, scored)
            self._append(line, title)
        return self._expect(inputs, stress)

    def trained(self, settings: Sequence[str], seed: int, split: Split, title: str) -> Trial:
        """The recipe with these settings, trained with a seed and scored; its weights stay."""
        cell = self.cell(settings, seed)
        inputs = self._inputs(cell, split)
        stress = self.stress == split
        if self._line(inputs, stress) is None:
            self.prompted("base", split)
            fresh = reset_peak(self.world.device)
            train_stage(cell, training_cache(cell))
            title = f"{title}, seed {seed}, {split}"
            scored = self._scored(str(cell.folder / "model"), title, split, NOTHING, stress)
            line = None
            if scored is not None:
                line = replace(
                    self._row(cell.config.method.name, split, inputs, scored),
                    lr=cell.config.optim.lr,
                    seed=seed,
                    settings=list(settings),
                    cost=cost_of(cell.folder / "train.jsonl", peak_known=fresh),
                )
            self._append(line, title)
        return self._expect(inputs, stress)

    def remove_weights(self, settings: Sequence[str], seed: int) -> None:
        """A training's log and its line stay, its weights and checkpoints do not.

        What says that they are whole goes first: a kill halfway leaves nothing that is refused.
        """
        if self.world.rank == 0:
            folder = self.cell(settings, seed).folder
            (folder / "stamps" / "train.json").unlink(missing_ok=True)
            remove_checkpoints(folder / "checkpoints")
            if (folder / "model").is_dir():
                shutil.rmtree(folder / "model")
            (folder / "seeds.bin").unlink(missing_ok=True)
        self.world.wait()

    def cell(self, settings: Sequence[str], seed: int) -> Run:
        """The run of one training: its own folder, everything made before it shared."""
        cell = self.opened(settings, seed)
        made = digest([self.run.base_fingerprint, _made_of(cell)])[:8]
        name = f"{cell.config.method.name}-lr-{cell.config.optim.lr:g}-{made}-seed-{seed}"
        lesson = digest(_lesson(cell))
        shared = self.run.cache_folder if lesson == digest(_lesson(self.run)) else None
        return replace(
            cell,
            config=_in_folder(cell.config, self.folder / name),
            asked=_in_folder(cell.asked, self.folder / name),
            folder=self.folder / name,
            cache=shared or self.folder / SHARED / lesson,
        )

    def opened(self, settings: Sequence[str], seed: int) -> Run:
        """The run of these settings and this seed, before it has a folder.

        Raises:
            InputError: a setting that no trial may have, or one that cannot be used.
        """
        own, asked = self.run.asked, override(self.run.asked, settings)
        others = [n for n in type(asked).model_fields if getattr(asked, n) != getattr(own, n)]
        if asked.data.mmlu != own.data.mmlu:
            others.append("data.mmlu")
        for name in others:
            if name not in SECTIONS:
                raise InputError(
                    f"A trial cannot set {name} ({', '.join(settings)}): all trials share the "
                    "base and the scores; give --set to the whole command in another run.folder."
                )
        asked = asked.model_copy(
            update={"run": asked.run.model_copy(update={"seed": seed, "log_every": 1})}
        )
        records, found, opened = with_additions(asked.data, self._records(asked.data))
        return replace(
            self.run,
            config=settle(asked),
            asked=asked,
            records=records,
            found=found,
            open=opened,
            intentions=configured_intentions(asked.teacher),
            home=self.run.folder,
            other_records=self._reads_others(asked.data),
        )

    def check(self, settings: Sequence[str]) -> str:
        """Refuse a training that cannot end well, before the first begins.

        Returns:
            A digest of what makes it, the base aside: settings that make the same have the same.
        """
        cell = self.opened(settings, self.run.config.run.seed)
        check_method(cell.asked, cell.taught_records)
        return digest(_made_of(cell))

    def _records(self, data: DataConfig) -> list[Record]:
        """The run's own records, or those to train on of another file."""
        if not self._reads_others(data):
            return self.run.taught_records
        if data.source is not None:
            raise InputError(
                f"A trial cannot read source {data.source}: name a file of QA records with "
                "data.path, and set data.source=null."
            )
        records = [r for r in read_records(Path(data.path)) if r.split == "train"]
        check_disjoint([*records, *(r for r in self.run.records if r.split != "train")])
        return records

    def _reads_others(self, data: DataConfig) -> bool:
        """Whether these settings name another source of records than the run's."""
        own = self.run.asked.data
        return any(getattr(data, n) != getattr(own, n) for n in SourceSettings.model_fields)

    def _inputs(self, cell: Run, split: Split) -> str:
        return digest([self.run.base_fingerprint, self._protocol(split), _made_of(cell)])

    def _protocol(self, split: Split) -> str:
        config, records, mmlu = self.tests[split]
        return protocol_hash(config, records, mmlu, self.words)

    def _scored(
        self, path: str, title: str, split: Split, told: Told, stress: bool
    ) -> Evaluation | None:
        """Scores in float32, on rank 0; the others have none."""
        if self.world.rank != 0:
            return None
        config, records, mmlu = self.tests[split]
        load, words = partial(self.run.load, path, "float32"), self.run.tokenizer
        found = evaluate(config, load(), words, records, mmlu=mmlu, title=title, told=told)
        silent = InputError(
            f"{config.evaluate.judge_url} judged no attack of {title}: see that the judge "
            "answers, then give the same command again."
        )
        if found.unjudged and "attack" not in found.scores:
            raise silent
        if stress:
            found = stressed(config, load, words, self.stressed_records(split), found)
            if config.evaluate.searched_prefixes is not None and SEARCHED not in found.extra:
                raise silent
        return found

    def _row(self, name: str, split: Split, inputs: str, scored: Evaluation) -> Trial:
        """The line of what was scored; nothing is known of a training yet."""
        total = 0.0
        if name != "base":
            base = self.prompted("base", split)
            known = {n: Score(**score) for n, score in base.scores.items()}
            total = overall(scored.scores, known).value
        return Trial(
            method=name,
            lr=None,
            seed=None,
            split=split,
            inputs=inputs,
            protocol=self._protocol(split),
            overall=total,
            scores={n: asdict(score) for n, score in scored.scores.items()},
            extra={n: asdict(score) for n, score in scored.extra.items()},
            cost=None,
            questions=question_scores(scored),
        )

    def _line(self, inputs: str, stress: bool = False) -> Trial | None:
        """The finished line of these very inputs, or None; every rank reads the same file.

        Args:
            stress: only one that holds stress scores will do.
        """
        lines = [line for line in read_trials(self.path) if line.inputs == inputs]
        found = [line for line in lines if not stress or any(map(is_stress, line.extra))]
        return found[0] if found else None

    def _expect(self, inputs: str, stress: bool = False) -> Trial:
        line = self._line(inputs, stress)
        assert line is not None
        return line

    def _append(self, line: Trial | None, title: str) -> None:
        if line is not None:
            append_trial(self.path, line)
            say(f"{self.name}: {title}: Overall {line.overall:+.1f}")
        self.world.wait()


def alone_at(run: Run, name: str) -> AbstractContextManager[None]:
    """Keep other processes out of a folder of trials, where they would take weights from us."""
    return alone_in(run.folder, name) if run.world.rank == 0 else nullcontext()


def question_scores(scored: Evaluation) -> dict[str, list[float | None]]:
    """What each question of each score is worth, in the order in which they were asked."""
    found: dict[str, list[float | None]] = {n: [] for n in DIRECTIONS if n in scored.scores}
    searched: dict[str, float | None] = {}
    for sample in scored.samples:
        suite, score = sample["suite"], sample["score"]
        if suite == SEARCHED:  # asked once behind each prefix; its score is the worst of them
            known = searched.get(sample["id"])
            searched[sample["id"]] = max((s for s in (known, score) if s is not None), default=None)
        elif suite in found or is_stress(suite):
            found.setdefault(suite, []).append(score)
    return {**found, SEARCHED: [*searched.values()]} if searched else found


def cost_of(log: Path, *, peak_known: bool) -> Cost:
    """What a training took, by its log; the lines of a killed one and its resumption add up."""
    steps = read_steps(log)
    return Cost(
        seconds=sum(step["seconds"] for step in steps),
        tokens=sum(step["tokens"] for step in steps),
        peak_mib=max(step["peak_mib"] for step in steps) if peak_known else None,
    )


def _in_folder(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})


def _taught(cell: Run) -> list[Record]:
    """Records that the cell's method trains on, before the base was asked what it knows."""
    goals = find_method(cell.config.method.name).goals
    return [record for record in cell.train_records if record.goal in goals]


def _lesson(cell: Run) -> list[object]:
    """Everything beside the base that a teacher cache depends on."""
    return [
        cell.config.teacher.model_dump(mode="json", exclude={"intentions"}),  # its text is below
        cell.config.data.known_only,
        cell.intentions.model_dump(mode="json") if cell.intentions else None,
        records_fingerprint(_taught(cell)),
    ]


def _made_of(cell: Run) -> list[object]:
    """Everything beside the base that a training's weights depend on."""
    config = cell.config
    return [
        *_lesson(cell),
        config.method.model_dump(mode="json"),
        config.optim.model_dump(mode="json"),
        [[goal, config.data.mix.get(goal, 0)] for goal in GOALS],
        [config.data.pack_tokens, config.model.dtype, config.parallel.dtype, config.run.seed],
    ]
