"""A run folder and the stages that fill it: data → target → teach → train → evaluate → report.

Every stage leaves a stamp of what made its output. A second run skips a stage whose stamp agrees,
goes on with one that was killed, and refuses one whose inputs have changed since.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from unteach.engine.attention import check_attention
from unteach.engine.checkout import checkout_commit
from unteach.engine.config import Config, DataConfig, Dtype, TeacherConfig, dump_config, load_config
from unteach.engine.data.assemble import near_duplicates
from unteach.engine.data.found_prefixes import with_found_prefixes
from unteach.engine.data.open_questions import with_open_questions
from unteach.engine.data.prepare import prepare, prepared
from unteach.engine.data.records import (
    Record,
    check_disjoint,
    counts,
    read_records,
    train_split,
)
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.sheet import write_sheet
from unteach.engine.errors import InputError
from unteach.engine.files import (
    known_sha256,
    model_fingerprint,
    read_json,
    sweep_partials,
    unwritable,
    write_atomic,
    write_json,
)
from unteach.engine.model import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    load_model,
    load_tokenizer,
    resolve_model,
)
from unteach.engine.progress import say
from unteach.engine.teacher.intentions import Intentions, load_intentions, without_prefix_demos
from unteach.engine.train.methods import check_method, find_method, settle
from unteach.engine.train.parallel import World, check_parallel
from unteach.engine.train.report_to import check_tracker
from unteach.engine.train.trunk import FrozenOutputs


@dataclass
class Run:
    """One run folder, opened: the config, the records, and the model everything starts from.

    Attributes:
        config: with everything that its method fixes.
        asked: without that.
        found: which record each one made by data.attack_prefixes repeats, by id.
        open: ids of data.open_questions.
        home: the run folder whose taught model and known questions this run shares; None = its own.
        cache: where the teacher cache lies; None = in its own folder.
        other_records: whether the records are others than home's, so that what the base knows of
            them is this run's own.
        frozen: outputs of frozen blocks, kept from one training of this process to the next.
    """

    config: Config
    asked: Config
    world: World
    folder: Path
    records: list[Record]
    intentions: Intentions | None
    origin: str
    found: Mapping[str, str] = field(default_factory=dict)
    open: frozenset[str] = frozenset()
    home: Path | None = None
    cache: Path | None = None
    other_records: bool = False
    frozen: FrozenOutputs | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The origin's tokenizer."""
        return load_tokenizer(self.origin, self.config.model)

    @cached_property
    def base(self) -> str:
        """The model to unlearn from: the taught one where there is a teaching stage."""
        return self.origin if self.config.target is None else str(self.root / "target" / "model")

    @property
    def root(self) -> Path:
        """Where the taught model is kept."""
        return self.home or self.folder

    @property
    def known_folder(self) -> Path:
        """Where it is kept which questions the base answers."""
        return self.folder if self.other_records else self.root

    @property
    def cache_folder(self) -> Path:
        """Where the teacher cache lies."""
        return self.cache or self.folder / "cache"

    @cached_property
    def base_fingerprint(self) -> str:
        """sha256 of the base model's weights."""
        return self.fingerprint(self.base)

    def fingerprint(self, path: str) -> str:
        """sha256 of a model's weights; of a hub id, its name and model.revision."""
        return model_fingerprint(path, self.config.model.revision)

    def load(self, path: str, dtype: Dtype) -> PreTrainedModel:
        """A model for inference on this rank's device."""
        settings = self.config.model.model_copy(update={"dtype": dtype})
        return load_model(path, settings, device=self.world.device)

    @property
    def remembered(self) -> Config:
        """What config.yaml says the model was made with; this command's own where there is none."""
        path = self.folder / "config.yaml"
        return load_config(path) if path.is_file() else self.config

    def remember(self, config: Config | None = None) -> None:
        """Write config.yaml, environment.json and records.md, once a stage may do its work.

        A command that is refused must leave those of what it was refused for.

        Args:
            config: where it is not the command's own.
        """
        if self.world.rank == 0:
            _make_folder(self.folder)
            text = dump_config(self.config if config is None else config)
            write_atomic(self.folder / "config.yaml", text.encode())
            write_json(self.folder / "environment.json", environment(self.world))
            if self.config.data.source is None and self.home is None:
                name, near = Path(self.config.data.path).name, near_duplicates(self.records)
                sheet = self.folder / "records.md"
                write_sheet(sheet, self.records, rejects=Rejects(), name=name, near=near)

    def remember_scoring(self) -> None:
        """`remember` for a stage that scores a model: what made it stays as it was."""
        made = self.remembered
        data = made.data.model_copy(update={"mmlu": self.config.data.mmlu})
        self.remember(made.model_copy(update={"evaluate": self.config.evaluate, "data": data}))

    @property
    def taught_records(self) -> list[Record]:
        """The records of data.path: what the base is taught, whatever else it is trained on."""
        return [r for r in self.records if r.id not in self.found and r.id not in self.open]

    @property
    def train_records(self) -> list[Record]:
        """Train records that the config takes, and open questions where the method can use them."""
        data, method = self.config.data, find_method(self.config.method.name)
        records = train_split(self.records, anchors=data.anchors, form=data.form)
        teacher = self.config.teacher
        return [r for r in records if r.id not in self.open or method.takes_open(r.goal, teacher)]

    def split(self, name: str) -> list[Record]:
        """Records of a split, in file order."""
        return [record for record in self.records if record.split == name]


def open_run(config: Config, world: World) -> Run:
    """Check everything that can be checked cheaply, then make the run folder.

    Raises:
        InputError: records, intentions, method or folder cannot be used.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    find_method(config.method.name)
    attention = check_attention(config.model.attention, world.device)
    check_parallel(config.parallel, world)
    check_tracker(config.run.report_to)
    if not config.data.path and config.data.source is None:
        raise InputError("data.path is empty: name a file of QA records, or run a recipe.")
    folder = Path(config.run.folder)
    if world.rank == 0 and config.data.source is not None:
        _make_folder(folder)
        prepare(config.data, folder)
    world.wait()
    path = prepared(config.data, folder)
    records = read_records(path)
    check_disjoint(records)
    check_method(config, records)
    records, found, opened = with_additions(config.data, records)
    intentions = configured_intentions(config.teacher)
    if world.rank == 0:
        _make_folder(folder)
        sweep_partials(folder)
        resolve_model(config.model.path, folder)
    world.wait()
    origin = resolve_model(config.model.path, folder)
    _check_origin(origin, folder)
    say(f"attention: {attention} on {world.device.type}")
    say(f"records: {', '.join(f'{key} {n}' for key, n in counts(records).items())}")
    return Run(settle(config), config, world, folder, records, intentions, origin, found, opened)


def _check_origin(origin: str, folder: Path) -> None:
    """Refuse to start from a model that this run would replace by its own."""
    for made in (folder / "model", folder / "target"):
        if Path(origin).resolve().is_relative_to(made.resolve()):
            raise InputError(
                f"model.path {origin} lies where this run writes a model of its own: choose "
                "another run.folder."
            )


def with_additions(
    data: DataConfig, records: list[Record]
) -> tuple[list[Record], dict[str, str], frozenset[str]]:
    """Records with those of data.attack_prefixes and data.open_questions.

    Returns:
        Them, which record each of the former repeats, and the ids of the latter.
    Raises:
        InputError: a file cannot be used.
    """
    found: dict[str, str] = {}
    opened: frozenset[str] = frozenset()
    if data.attack_prefixes is not None:
        records, found = with_found_prefixes(records, Path(data.attack_prefixes))
    if data.open_questions is not None:
        records, opened = with_open_questions(records, Path(data.open_questions))
    return records, found, opened


def configured_intentions(config: TeacherConfig) -> Intentions | None:
    """What the teacher is to be told; None where it is prompted with nothing.

    Raises:
        InputError: the file cannot be used, or a goal says nothing without its prefix_demos.
    """
    if config.intentions is None:
        return None
    path = Path(config.intentions)
    intentions = load_intentions(path)
    return intentions if config.prefix_demos else without_prefix_demos(path, intentions)


def stamp_matches(folder: Path, stage: str, inputs: Mapping[str, Any], output: Path) -> bool:
    """Whether a stage was finished with these very inputs, and its output is still what it made.

    Raises:
        InputError: it was finished with others, or its output was changed since; says which.
    """
    path = folder / "stamps" / f"{stage}.json"
    if not path.is_file() or not output.exists():
        return False
    before = read_json(path)
    if not isinstance(before, dict):
        raise InputError(f"{path} is damaged (no JSON object): remove it to make {output} again.")
    wanted = json.loads(json.dumps(inputs))
    made = before.pop("output", None)
    changed = sorted(k for k in {**before, **wanted} if before.get(k) != wanted.get(k))
    if changed:
        what = ", ".join(_told(key, before.get(key), wanted.get(key)) for key in changed)
        raise InputError(
            f"{output} was made with another {what}: choose another run.folder, or "
            f"remove {output} to make it again."
        )
    altered = _altered(output, made)
    if altered is not None:
        raise InputError(
            f"{output} is not what stage {stage} made, {altered} was cut, changed or lost since: "
            f"remove {output} to make it again."
        )
    return True


def _told(name: str, made: Any, wanted: Any) -> str:
    """An input that changed; of a section of settings those that did."""
    if not isinstance(made, dict) or not isinstance(wanted, dict):
        return name
    apart = [k for k in {**made, **wanted} if made.get(k) != wanted.get(k)]
    return ", ".join(f"{name}.{k} ({made.get(k)}, now {wanted.get(k)})" for k in apart)


def leave_stamp(folder: Path, stage: str, inputs: Mapping[str, Any], output: Path) -> None:
    """Record what a finished stage was made of and what it made."""
    (folder / "stamps").mkdir(exist_ok=True)
    stamp = {**inputs, "output": _exported(output)}
    write_json(folder / "stamps" / f"{stage}.json", stamp)


def mend_config(run: Run) -> None:
    """Write a config.yaml that is gone or cut again, once every stamp agrees with this command's.

    Its environment.json stays: what trained is not what mends.
    """
    if run.world.rank == 0 and (fault := config_fault(run.folder)):
        write_atomic(run.folder / "config.yaml", dump_config(run.config).encode())
        say(f"{fault}: written again from this command's settings, which made the model")
    run.world.wait()


def config_fault(folder: Path) -> str | None:
    """Why a run folder's config.yaml does not say what its model was made with; None if it does."""
    path = folder / "config.yaml"
    if not path.is_file():
        return f"{path} is missing"
    try:
        text = path.read_text(encoding="utf-8")
        whole = dump_config(load_config(path))
    except (OSError, ValueError):
        return f"{path} cannot be read"
    cut = len(text) < len(whole) and whole.startswith(text.rstrip("\n"))
    return f"{path} was cut" if cut else None


def _exported(output: Path) -> dict[str, str] | None:
    """sha256 of each file of a model folder but its card; a list as known.json may be edited."""
    if not output.is_dir():
        return None
    files = (file for file in sorted(output.glob("[!.]*")) if file.is_file())
    return {file.name: known_sha256(file) for file in files if file.name != "README.md"}


def _altered(output: Path, made: object) -> str | None:
    """A file that is not as its stage left it; other files beside those it made are no matter.

    Args:
        made: what the stamp says; a text stands for config and weights alone.
    """
    if not output.is_dir():
        return None if made is None else "it"
    if not isinstance(made, dict):
        return None if made == model_fingerprint(str(output)) else "a file"
    weights = (file.name for file in output.glob("*.safetensors"))
    for file in (output / name for name in sorted({*map(str, made), *weights})):
        if not file.is_file() or known_sha256(file) != made.get(file.name):
            return file.name
    return None


def digest(value: Any) -> str:
    """Short sha256 of anything that JSON can write."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def records_fingerprint(records: Sequence[Record]) -> str:
    """sha256 of records in order; `meta` counts, because scores read it."""
    return digest([record.model_dump() for record in records])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(unwritable(folder, error)) from error


def environment(world: World) -> dict[str, Any]:
    """Versions, commit and device of this process, for whoever reads the results."""
    names = ("unteach", "torch", "transformers", "safetensors", "numpy")
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in names},
        "commit": checkout_commit(),
        "device": f"{device.type} ({name})",
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }
