"""The teacher cache's manifest: what made the cache, what is in it, and how to tell both.

It is the cache's only list of contents: a shard that it does not name does not exist.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unteach.engine.config import Config, Dtype
from unteach.engine.data.records import Goal, Record
from unteach.engine.data.tokens import tokenizer_fingerprint
from unteach.engine.errors import InputError
from unteach.engine.files import write_atomic
from unteach.engine.model import Head, PreTrainedTokenizerBase
from unteach.engine.teacher.intentions import Intentions, fingerprint

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
SHARED = "caches"  # the folder of caches that trials share, each under a name of its own
Form = Literal["hidden", "logits", "topk"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Fingerprints(_Part):
    """sha256 of everything that a cache is made of, and the settings that shape its rows.

    Batch size and thresholds are not among them: they may change between two runs of one build.
    """

    weights: str
    tokenizer: str
    chat_template: str
    intentions: str
    records: str
    settings: dict[str, Any]

    def changed(self, other: Fingerprints) -> list[str]:
        """What is different in `other`, in words."""
        names = {
            "weights": "teacher weights",
            "tokenizer": "tokenizer",
            "chat_template": "chat template",
            "intentions": "intentions",
            "records": "records",
        }
        words = [
            word for name, word in names.items() if getattr(self, name) != getattr(other, name)
        ]
        for name in sorted({*self.settings, *other.settings}):
            before, after = self.settings.get(name), other.settings.get(name)
            if before != after:
                words.append(f"teacher.{name} ({before} before, {after} asked for)")
        return words


class Entry(_Part):
    """One record's rows.

    Attributes:
        first_row: row of the whole cache that predicts the first response token.
        answer: the supervised response as text.
        reasoning: what the teacher thought before it, marker included.
        own_marker: whether it came to the marker by itself.
        agreed: rows whose label is the prompted teacher's first choice.
    """

    id: str
    goal: Goal
    first_row: Count
    rows: Count
    answer: str
    reasoning: str | None = None
    own_marker: bool = True
    agreed: Count


class HeadFile(_Part):
    """head.safetensors, and the rule by which it makes logits."""

    sha256: Digest
    bytes: Size
    bias: bool
    vocab: Size
    softcap: float | None
    scale: float

    def rule(self) -> Head:
        """As the kernels take it."""
        return Head(vocab=self.vocab, softcap=self.softcap, scale=self.scale)


class Shard(_Part):
    """One file of rows; `index` is its place in the cache's order."""

    index: Count
    sha256: Digest
    bytes: Size
    rows: Count
    records: tuple[Entry, ...]

    @property
    def file(self) -> str:
        """Its name in the cache's folder."""
        return f"rows-{self.index:05d}.safetensors"


class Manifest(_Part):
    """Everything about a cache but its tensors.

    Attributes:
        approximate: what the rows say of the teacher is rounded (bf16 logits) or cut (topk).
        dtype: of hidden states and head: the teacher's compute dtype.
        top: M, teacher ids a row.
        seeds: S, ids a row of the same weights without the intention.
        width: E. head_rows: V, padding rows of the head included.
        shards_total: shards of the finished cache.
    """

    schema_version: Literal[1] = 1
    complete: bool = False
    form: Form
    approximate: bool
    dtype: Dtype
    logits_dtype: Dtype
    top: Size
    seeds: Size
    width: Size
    head_rows: Size
    head: HeadFile | None = None
    records: Count = 0
    rows: Count = 0
    shard_records: Size
    shards_total: Count
    fingerprints: Fingerprints
    shards: tuple[Shard, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        first_row = 0
        seen: set[str] = set()
        for place, shard in enumerate(self.shards):
            if place and shard.index <= self.shards[place - 1].index:
                raise ValueError("shards: not in order")
            for entry in shard.records:
                if entry.first_row != first_row or entry.id in seen:
                    raise ValueError(f"shards: {entry.id!r} is listed twice or out of place")
                seen.add(entry.id)
                first_row += entry.rows
            if shard.rows != sum(entry.rows for entry in shard.records):
                raise ValueError(f"shards: {shard.file} has not the rows of its records")
        if (self.rows, self.records) != (first_row, len(seen)):
            raise ValueError("rows and records: not those of the shards")
        if self.complete and (self.head is None or len(self.shards) != self.shards_total):
            raise ValueError("complete: set, though the head or a shard is missing")
        return self

    def with_shards(self, shards: Sequence[Shard], *, complete: bool = False) -> Manifest:
        """A copy that lists these shards, with every record's first row counted anew."""
        ordered = []
        first_row = records = 0
        for shard in sorted(shards, key=lambda each: each.index):
            entries = []
            for entry in shard.records:
                entries.append(entry.model_copy(update={"first_row": first_row}))
                first_row += entry.rows
            records += len(entries)
            ordered.append(shard.model_copy(update={"records": tuple(entries)}))
        update = {
            "shards": tuple(ordered),
            "rows": first_row,
            "records": records,
            "complete": complete,
        }
        return self.model_copy(update=update)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a shard holds: safetensors dtype and trailing shape of each tensor by name."""
        names = {"float32": "F32", "bfloat16": "BF16"}
        parts = {
            "labels": ("I32", ()),
            "reference_logp": ("F32", ()),
            "student_ids": ("I32", (self.seeds,)),
            "top_ids": ("I32", (self.top,)),
        }
        if self.form != "logits":
            parts["top_logits"] = ("F32", (self.top,))
        if self.form == "hidden":
            parts["hidden"] = (names[self.dtype], (self.width,))
        if self.form == "logits":
            parts["logits"] = (names[self.logits_dtype], (self.head_rows,))
        return parts


def cache_fingerprints(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    intentions: Intentions | None,
    weights_fingerprint: str,
) -> Fingerprints:
    """What a cache of these inputs is made of.

    Of a record only the fields that reach the teacher count: new MCQ options leave a cache valid.
    """
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    teacher = config.teacher.model_dump(mode="json")
    shaping = ["routing", "response", "refusal", "form", "logits_dtype", "top", "dtype"]
    shaping += ["max_new_tokens", "shard_records"]
    fields = {"id", "goal", "question", "answer", "prefix", "form"}
    return Fingerprints(
        weights=weights_fingerprint,
        tokenizer=tokenizer_fingerprint(bare),
        chat_template=_digest(tokenizer.chat_template),
        intentions=fingerprint(intentions, config.teacher.routing),
        records=_digest([record.model_dump(mode="json", include=fields) for record in records]),
        settings={name: teacher[name] for name in shaping},
    )


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a cache folder; None where there is none.

    Raises:
        InputError: it is there and cannot be used.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_bytes())
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: "
                f"{remedy(folder)}."
            )
        return Manifest.model_validate_json(json.dumps(tree))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({_reason(error)}): {remedy(folder)}.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step; one line a shard keeps it readable and small."""
    tree = manifest.model_dump(mode="json")
    shards = ",\n".join(json.dumps(shard, ensure_ascii=False) for shard in tree.pop("shards"))
    text = json.dumps(tree, indent=1, ensure_ascii=False).removesuffix("\n}")
    write_atomic(folder / MANIFEST, f'{text},\n "shards": [\n{shards}\n]}}\n'.encode())


def remedy(folder: Path) -> str:
    """What makes a damaged cache whole; those that trials share are no command's own."""
    if folder.parent.name == SHARED:
        return f"remove {folder} and it is made again"
    return "`unteach teach --rebuild` makes it again"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return (str(error).splitlines() or [type(error).__name__])[0]
