"""Does forgetting last? Scores after a little retraining, after rounding of the weights, behind
examples and searched prefixes, on other wordings, against a guess at what was trained on, and how
far it reaches. Each is measured only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unteach.engine.config import Config, MethodConfig
from unteach.engine.data.found_prefixes import read_prefixes
from unteach.engine.data.records import Goal, Record, read_records
from unteach.engine.data.rejects import Rejects
from unteach.engine.data.tokens import Example, collate, response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.evaluate.choices import label_logps
from unteach.engine.evaluate.extraction import (
    Found,
    Load,
    example_pool,
    examples_for,
    few_shot,
    held_questions,
    searched_attack,
)
from unteach.engine.evaluate.generate import searched_prefixes
from unteach.engine.evaluate.reach import read_unseen, unseen_questions
from unteach.engine.evaluate.scores import Score, auc, is_held_out, mean, trained_facts
from unteach.engine.evaluate.suites import (
    Evaluation,
    Rows,
    Sample,
    check_questions,
    check_tests,
    evaluate,
    read_mmlu,
    tested_records,
    trained_forget,
)
from unteach.engine.inference import batch_hidden
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase, head_of
from unteach.engine.progress import say
from unteach.engine.train.supervise import split_step, supervised_loss

GROUP = 64  # weights that share a scale at 4 bits
MIN_K = 0.2  # share of a text's least likely tokens


def stressed(
    config: Config,
    load: Load,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    found: Evaluation,
) -> Evaluation:
    """The evaluation with every stress score that the config asks for beside its own.

    Args:
        load: the model as it was evaluated, afresh each time: stresses change it.
    Raises:
        InputError: a records file that cannot be used.
    """
    extra, samples = dict(found.extra), list(found.samples)
    measures = (_rounded, _relearned, few_shot, searched_attack, _other_files, _membership)
    for measure in (*measures, unseen_questions):
        scores, asked = measure(config, load, tokenizer, records)
        extra |= scores
        samples += asked
    unasked = not_measured(config)
    if unasked:
        say(f"evaluate: not measured: {', '.join(unasked)}")
    return replace(found, extra=extra, samples=samples)


def check_evaluation(config: Config, records: Sequence[Record]) -> Rows | None:
    """Refuse what an evaluation cannot use, before anything is loaded or trained.

    Returns:
        The MMLU rows; None where they are not scored.
    Raises:
        InputError: a file, a record, a judge or a stress that cannot be used.
    """
    mmlu = read_mmlu(Path(config.data.mmlu)) if config.data.mmlu else None
    check_questions(config.evaluate, records, mmlu)
    check_stresses(config, records)
    return mmlu


def check_stresses(config: Config, records: Sequence[Record]) -> None:
    """Refuse a stress that cannot be measured, before anything is loaded.

    Raises:
        InputError: a file that cannot be used, or too few records to retrain on or to show.
    """
    settings = config.evaluate
    for name, path in settings.extra_records.items():
        key = f"evaluate.extra_records.{name}"
        asked = extra_records(key, path)
        try:
            _check_goal("forget", config, asked)
        except InputError as error:
            raise InputError(f"{key}: {path}: {error}") from error
    if settings.quantized and not settings.goals:
        raise InputError(
            "evaluate.quantized asks the questions of evaluate.goals, and there are none: name a "
            "goal that has some, or unset evaluate.quantized."
        )
    if settings.holdout is not None:
        extra_records("evaluate.holdout", settings.holdout)
    read_unseen(settings.open_questions, records)
    if settings.relearn_steps or settings.holdout is not None:
        trained_records(records)
    for count in settings.relearn_rows if settings.relearn_steps else ():
        relearned_records(count, records)
    if settings.few_shot or settings.relearn_steps:
        _check_goal("forget", config, records)
    if settings.few_shot:
        pool = example_pool(records)
        for record in held_questions(records, "forget"):
            examples_for(record, pool, settings.few_shot)
    if settings.searched_prefixes is not None:
        _check_goal("attack", config, records)
        kept, rejects = len(searched_prefixes(settings, records)), Rejects()
        found = read_prefixes(Path(settings.searched_prefixes), rejects=rejects)
        if trained := len(found) - kept:
            say(f"evaluate: {trained} searched prefixes left out: training records have them")
        if rejects.counts:
            say(f"evaluate: searched prefixes left out: {rejects}")


def _check_goal(goal: Goal, config: Config, records: Sequence[Record]) -> None:
    settings = config.evaluate.model_copy(update={"goals": (goal,)})
    check_tests(settings, tested_records(settings, records), records)


def not_measured(config: Config) -> list[str]:
    """What of the stresses the config leaves out, in words."""
    return [name for name, asked in _stresses(config).items() if not asked]


def any_stress(config: Config) -> bool:
    """Whether the config asks for a stress at all."""
    return any(_stresses(config).values())


def _stresses(config: Config) -> dict[str, bool]:
    settings = config.evaluate
    return {
        "other wordings (evaluate.extra_records)": bool(settings.extra_records),
        "relearning (evaluate.relearn_steps)": settings.relearn_steps is not None,
        "answered examples (evaluate.few_shot)": settings.few_shot is not None,
        "searched prefixes (evaluate.searched_prefixes)": settings.searched_prefixes is not None,
        "quantisation (evaluate.quantized)": bool(settings.quantized),
        "membership (evaluate.holdout)": settings.holdout is not None,
        "unseen questions (evaluate.open_questions)": settings.open_questions is not None,
    }


def _rounded(
    config: Config, load: Load, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Found:
    found: dict[str, Score] = {}
    for bits in config.evaluate.quantized:
        model = load()
        quantize_(model, bits)
        title = f"int{bits}"
        scores = evaluate(config, model, tokenizer, records, mmlu=None, title=title).scores
        found |= {f"{title}_{name}": score for name, score in scores.items()}
    return found, []


def _relearned(
    config: Config, load: Load, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Found:
    """Forget questions after a retraining on each number of rows, each from the model as it was.

    Beside all of them stand those whose fact the retraining did not see.
    """
    found: dict[str, Score] = {}
    samples: list[Sample] = []
    for count in config.evaluate.relearn_rows if config.evaluate.relearn_steps else ():
        seen = relearned_records(count, records)
        model, name = load(), f"relearned_{count}_forget"
        relearn_(config, model, tokenizer, seen)
        result = _forget_alone(config, model, tokenizer, records, f"relearned {count}")
        found[name] = result.scores["forget"]
        facts = trained_facts(seen)
        unseen = {r.id for r in held_questions(records, "forget") if is_held_out(r, facts)}
        values = [s["score"] / 100 for s in result.samples if s["id"] in unseen]
        if values:
            found[f"{name}_held_out"] = mean(values)
        samples += [{**sample, "suite": name} for sample in result.samples]
    return found, samples


def _other_files(
    config: Config, load: Load, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Found:
    found: dict[str, Score] = {}
    samples: list[Sample] = []
    for title, path in config.evaluate.extra_records.items():
        asked = extra_records(f"evaluate.extra_records.{title}", path)
        name = f"forget_file_{title}"
        result = _forget_alone(config, load(), tokenizer, asked, title)
        found[name] = result.scores["forget"]
        samples += [{**sample, "suite": name} for sample in result.samples]
    return found, samples


def _membership(
    config: Config, load: Load, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> Found:
    if config.evaluate.holdout is None:
        return {}, []
    outside = extra_records("evaluate.holdout", config.evaluate.holdout)
    model = load()
    members = min_k_scores(model, tokenizer, trained_records(records))
    return {"min_k_auc": auc(members, min_k_scores(model, tokenizer, outside))}, []


def _forget_alone(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    title: str,
) -> Evaluation:
    settings = config.evaluate.model_copy(update={"goals": ("forget",), "prefixed": False})
    alone = config.model_copy(update={"evaluate": settings})
    return evaluate(alone, model, tokenizer, records, mmlu=None, title=title)


@torch.no_grad()
def quantize_(model: PreTrainedModel, bits: int) -> None:
    """Round every linear layer's and expert's weight but a tied head to `bits` and back, in place.

    Symmetric, to nearest: at 8 bits a scale for each output row, at 4 for each 64 inputs of it.
    A router that is no linear layer stays as it is.
    """
    most = 2 ** (bits - 1) - 1
    tied = model.get_input_embeddings().weight
    for module in model.modules():
        for rows in _weight_rows(module):
            if rows is tied:
                continue
            size = rows.shape[-1] if bits == 8 else GROUP
            for first in range(0, rows.shape[-1], size):
                part = rows[..., first : first + size]
                scale = part.abs().amax(-1, keepdim=True) / most
                part.copy_((part / scale.clamp_min(1e-30)).round() * scale)


def _weight_rows(module: nn.Module) -> list[Tensor]:
    """[..., out, in] of what a module multiplies by: a linear layer, or experts in one tensor."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    if "Experts" not in type(module).__name__:
        return []
    stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    return [p.transpose(1, 2) for p in stacked] if _inputs_first(module) else list(stacked)


def _inputs_first(module: nn.Module) -> bool:
    """Whether experts are kept as [E, in, out]: transformers says so of all but Llama 4's."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    by_shape = up is not None and down is not None and up.shape[2] == 2 * down.shape[1]
    return bool(getattr(module, "is_transposed", by_shape))


def relearned_records(count: int, records: Sequence[Record]) -> list[Record]:
    """The first so many forget questions that were trained on, with their gold answers.

    Raises:
        InputError: there are fewer.
    """
    chosen = trained_records(records)
    if len(chosen) < count:
        raise InputError(
            f"evaluate.relearn_rows asks for {count} forget rows, and {len(chosen)} are trained "
            "on: ask for fewer."
        )
    return chosen[:count]


def trained_records(records: Sequence[Record]) -> list[Record]:
    """Forget questions of the train split with a gold answer.

    Raises:
        InputError: there is none.
    """
    chosen = trained_forget(records)
    if not chosen:
        raise InputError(
            "No forget record of split `train` has a gold answer: unset evaluate.relearn_steps "
            "and evaluate.holdout, or add `answer`."
        )
    return chosen


def relearn_(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
) -> None:
    """A few steps of full fine-tuning on gold answers, all records in every step, in place.

    Raises:
        InputError: the rate is too high, so that nothing of the model is left.
    """
    settings = config.evaluate
    method = MethodConfig(name="sft")
    examples = [
        Example(
            record.id,
            record.goal,
            tuple(student_context(tokenizer, record)),
            tuple(response_tokens(tokenizer, record.answer or "", prefix=record.prefix)),
        )
        for record in records
    ]
    (part,) = split_step(examples, method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.relearn_lr, weight_decay=0.0)
    head, finite = head_of(model, tokenizer), True
    batch = collate(examples).to(model.device)
    for _ in range(settings.relearn_steps or 0):
        optimizer.zero_grad()
        loss = supervised_loss(model, batch, part, method, head, None, None).loss
        loss.backward()
        optimizer.step()
        finite &= bool(torch.isfinite(loss))
    if not finite or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise InputError(
            f"Relearning at evaluate.relearn_lr={settings.relearn_lr:g} made weights of NaN or "
            "inf, which say nothing: lower evaluate.relearn_lr."
        )


def extra_records(key: str, path: str) -> list[Record]:
    """Questions of a file of their own, whatever split it calls them.

    Args:
        key: of the config, which names the file.
    Raises:
        InputError: the file cannot be read, or holds anything but forget questions with an answer.
    """
    try:
        records = read_records(Path(path))
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    for record in records:
        if record.goal != "forget" or record.form != "qa" or not record.golds:
            raise InputError(
                f"{key}: {path}: record {record.id!r} is no forget question with a gold answer."
            )
    return [record.model_copy(update={"split": "test"}) for record in records]


@torch.no_grad()
def min_k_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> list[float]:
    """Min-K%: mean log-probability of the least likely fifth of each gold answer's tokens."""
    scores = []
    for record in records:
        context = student_context(tokenizer, record)
        labels = response_tokens(tokenizer, record.golds[0], prefix=record.prefix)
        (hidden_TD,) = batch_hidden(model, [[*context, *labels[:-1]]])
        (logps,) = label_logps(model, tokenizer, [hidden_TD[len(context) - 1 :]], [labels])
        least = sorted(logps)[: max(1, int(len(logps) * MIN_K))]
        scores.append(math.fsum(least) / len(least))
    return scores
