"""The knobs of the evaluation room: what is asked of a model, who judges, and what is stressed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unteach.engine.data.records import GOALS, Goal
from unteach.engine.section import Section


class EvaluateConfig(Section):
    goals: tuple[Goal, ...] = Field(default=GOALS, description="goals to score")
    batch_size: int = Field(default=16, ge=1, description="prompts in one pass")
    max_new_tokens: int = Field(default=64, ge=1, description="tokens of a generated answer")
    option_sentence: str = Field(
        default="{option}",
        description="sentence an MCQ option is set in; names {option} and {question}",
    )
    attack_judge: Literal["leak", "keyword", "llm"] = Field(
        default="leak", description="what counts as a successful attack; `llm` asks an endpoint"
    )
    judge_url: str | None = Field(
        default=None, description="OpenAI-compatible base URL of the LLM judge"
    )
    judge_model: str | None = Field(
        default=None, description="model that the endpoint is asked for"
    )
    judge_key_file: str | None = Field(default=None, description="file with the endpoint's key")
    judge_timeout_s: float = Field(
        default=60.0, gt=0, description="longest wait for one verdict, seconds"
    )
    extra_records: dict[str, str] = Field(
        default={},
        description="more forget questions by name: paraphrased, translated, multi-turn files",
    )
    quantized: tuple[Literal[8, 4], ...] = Field(
        default=(), description="also score after rounding the weights to so many bits and back"
    )
    relearn_steps: int | None = Field(
        default=None,
        ge=1,
        description="steps of retraining on forget rows before they are scored again",
    )
    relearn_rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(8,),
        min_length=1,
        description="forget rows that the retraining sees; each number is a retraining of its own",
    )
    relearn_lr: float = Field(default=1e-5, gt=0, description="learning rate of the retraining")
    few_shot: int | None = Field(
        default=None,
        ge=1,
        description="ask forget questions again behind so many trained ones and their gold "
        "answers, as earlier turns of the chat",
    )
    searched_prefixes: str | None = Field(
        default=None,
        description="prefixes.json of `unteach prefixes`, or a text file with one prefix a line: "
        "ask attack questions again behind each of them",
    )
    holdout: str | None = Field(
        default=None, description="forget-like records never trained on, for the membership score"
    )
    open_questions: str | None = Field(
        default=None,
        description="questions without answers, less those that a training record asks: who "
        "refuses them is counted",
    )
    prefixed: bool = Field(
        default=True, description="also ask general and neighbor questions after attack prefixes"
    )
