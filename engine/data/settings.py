"""The knobs of the data room: which rows are read, who writes, and how text becomes records."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unteach.engine.section import Section

SourceName = Literal[
    "muse-books",
    "muse-news",
    "wmdp-cyber",
    "wmdp-bio",
    "wmdp-corpora",
    "rwku",
    "tofu",
    "mmlu",
    "wikipedia",
    "nq-open",
    "local",
]


class SourceSettings(Section):
    """What `data` says about rows that are no QA records yet; DataConfig adds the rest."""

    path: str = Field(
        default="",
        description="QA records, one JSON object a line; with data.source its rows on this machine "
        "(a file, a folder) or a hub id, empty = the source's own hub id",
    )
    source: SourceName | None = Field(
        default=None,
        description="benchmark whose rows are made into records; None = data.path has records",
    )
    subset: str | None = Field(
        default=None,
        description="part of the source: a TOFU forget split, an RWKU or MMLU subject, a MUSE or "
        "WMDP text config; None = the source's default",
    )
    revision: str | None = Field(
        default=None,
        description="git commit, branch or tag of a hub data set; None = the newest. The commit "
        "that it is at first is written into data/revision.json, and a rerun reads no other",
    )
    streaming: bool = Field(
        default=False, description="read hub rows as they come instead of into the datasets cache"
    )
    limit: int | None = Field(
        default=None, ge=1, description="most rows read of each part; None = all"
    )
    columns: dict[str, str] = Field(
        default={}, description="record field to column name, where a local file calls it otherwise"
    )
    beside: tuple[str, ...] = Field(
        default=(),
        description="files of QA records that give the goals which the source has no rows for",
    )
    test_share: float = Field(
        default=0.4,
        gt=0,
        lt=1,
        description="share of each goal's questions held out where rows say none",
    )


class WriterConfig(Section):
    """The LLM that writes questions; `none` writes nothing and keeps passages as they are."""

    kind: Literal["none", "endpoint", "local"] = Field(
        default="none",
        description="`endpoint` (any OpenAI-compatible server) or `local` (transformers)",
    )
    url: str = Field(default="http://localhost:8000/v1", description="base URL of the endpoint")
    model: str = Field(
        default="embedded", description="name on the endpoint, or a path as in model.path"
    )
    key_variable: str = Field(
        default="UNTEACH_WRITER_KEY",
        description="environment variable that holds the endpoint's key",
    )
    concurrency: int = Field(default=8, ge=1, description="requests under way at once")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="rate limit; None = off"
    )
    timeout_s: float = Field(default=120.0, gt=0, description="seconds to wait for one reply")
    retries: int = Field(
        default=5, ge=0, description="further tries after a busy or silent endpoint"
    )
    backoff_s: float = Field(
        default=1.0, gt=0, description="first wait, seconds; doubles up to a minute"
    )
    max_calls: int | None = Field(
        default=None, ge=1, description="budget of requests; None = no end"
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="budget of tokens, prompts and replies together; None = no end",
    )
    max_new_tokens: int = Field(default=1024, ge=1, description="tokens of one reply")
    temperature: float = Field(
        default=0.0, ge=0, description="sampling temperature of the endpoint"
    )


class StandardizeConfig(Section):
    """Raw text into records: what to forget, what to keep, how much to write."""

    forget: str | None = Field(default=None, description="file or folder of text on the topic")
    general: str | None = Field(default=None, description="file or folder of broad text")
    topic: str = Field(default="", description="what is to be forgotten, in a few words")
    terms: tuple[str, ...] = Field(
        default=(),
        description="words that give the topic away besides its name; neighbours have none",
    )
    prompts: str | None = Field(
        default=None,
        description="folder whose files stand in for the shipped prompts of the same name; `plain` "
        "= those for a small model, which replies in lines instead of JSON",
    )
    chunk_words: int = Field(default=180, ge=20, description="most words of a passage")
    pairs: int = Field(default=4, ge=1, description="questions asked for a passage")
    neighbors: int = Field(default=12, ge=0, description="concepts beside the topic")
    anchors: int = Field(default=1, ge=0, description="anchors of each kind for a forget question")
    max_chunks: int | None = Field(default=None, ge=1, description="most passages read; None = all")
    test_share: float = Field(
        default=0.3, gt=0, lt=1, description="share of passages held out for tests"
    )
    gap_records: int | None = Field(
        default=None,
        ge=8,
        description="records of each goal for the domain gap in model.path; None = not measured",
    )
