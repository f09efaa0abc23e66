"""Does forgetting last? Scores after a little retraining, after rounding of the weights, on other
wordings, and against a guess at what was trained on. Each is measured only where it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from unteach.engine.config import Config, MethodConfig
from unteach.engine.data.records import Record, read_records
from unteach.engine.data.tokens import Example, collate, response_tokens, student_context
from unteach.engine.errors import InputError
from unteach.engine.evaluate.choices import label_logps
from unteach.engine.evaluate.scores import Z_95, Score
from unteach.engine.evaluate.suites import Evaluation, evaluate
from unteach.engine.inference import batch_hidden
from unteach.engine.model import PreTrainedModel, PreTrainedTokenizerBase, head_of
from unteach.engine.progress import say
from unteach.engine.train.supervise import split_step, supervised_loss

GROUP = 64  # weights that share a scale at 4 bits
MIN_K = 0.2  # share of a text's least likely tokens


def stressed(
    config: Config,
    load: Callable[[], PreTrainedModel],
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
    settings = config.evaluate
    extra, samples = dict(found.extra), list(found.samples)
    for bits in settings.quantized:
        model = load()
        quantize_(model, bits)
        title = f"int{bits}"
        scores = evaluate(config, model, tokenizer, records, mmlu=None, title=title).scores
        extra |= {f"int{bits}_{name}": score for name, score in scores.items()}
    alone = settings.model_copy(update={"goals": ("forget",), "prefixed": False})
    forget = config.model_copy(update={"evaluate": alone})
    if settings.relearn_steps:
        model = load()
        relearn_(config, model, tokenizer, relearned_records(config, records))
        scores = evaluate(forget, model, tokenizer, records, mmlu=None, title="relearned").scores
        extra["relearned_forget"] = scores["forget"]
    for name, path in settings.extra_records.items():
        asked = extra_records(name, path)
        result = evaluate(forget, load(), tokenizer, asked, mmlu=None, title=name)
        extra[f"forget_file_{name}"] = result.scores["forget"]
        samples += [{**sample, "suite": f"forget_file_{name}"} for sample in result.samples]
    if settings.holdout is not None:
        outside = extra_records("holdout", settings.holdout)
        model = load()
        members = min_k_scores(model, tokenizer, trained_records(records))
        extra["min_k_auc"] = auc(members, min_k_scores(model, tokenizer, outside))
    unasked = not_measured(config)
    if unasked:
        say(f"evaluate: not measured: {', '.join(unasked)}")
    return replace(found, extra=extra, samples=samples)


def check_stresses(config: Config, records: Sequence[Record]) -> None:
    """Refuse a stress that cannot be measured, before anything is loaded.

    Raises:
        InputError: a records file that cannot be used, or no forget record to retrain on.
    """
    settings = config.evaluate
    for name, path in settings.extra_records.items():
        extra_records(name, path)
    if settings.holdout is not None:
        extra_records("holdout", settings.holdout)
    if settings.relearn_steps or settings.holdout is not None:
        trained_records(records)


def not_measured(config: Config) -> list[str]:
    """What of the stresses the config leaves out, in words."""
    settings = config.evaluate
    named = {
        "other wordings (evaluate.extra_records)": bool(settings.extra_records),
        "relearning (evaluate.relearn_steps)": settings.relearn_steps is not None,
        "quantisation (evaluate.quantized)": bool(settings.quantized),
        "membership (evaluate.holdout)": settings.holdout is not None,
    }
    return [name for name, measured in named.items() if not measured]


@torch.no_grad()
def quantize_(model: PreTrainedModel, bits: int) -> None:
    """Round every linear weight but a tied head to `bits` and back, in place.

    Symmetric, to nearest: at 8 bits a scale for each output row, at 4 for each 64 inputs of it.
    """
    most = 2 ** (bits - 1) - 1
    tied = model.get_input_embeddings().weight
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.weight is tied:
            continue
        weight = module.weight
        size = weight.shape[1] if bits == 8 else GROUP
        for first in range(0, weight.shape[1], size):
            part = weight[:, first : first + size]
            scale = part.abs().amax(1, keepdim=True) / most
            part.copy_((part / scale.clamp_min(1e-30)).round() * scale)


def relearned_records(config: Config, records: Sequence[Record]) -> list[Record]:
    """The first `relearn_rows` forget questions that were trained on, with their gold answers."""
    return trained_records(records)[: config.evaluate.relearn_rows]


def trained_records(records: Sequence[Record]) -> list[Record]:
    """Forget questions of the train split with a gold answer.

    Raises:
        InputError: there is none.
    """
    chosen = [r for r in records if r.split == "train" and r.goal == "forget" and r.form == "qa"]
    chosen = [record for record in chosen if record.answer]
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
    """A few steps of full fine-tuning on gold answers, all records in every step, in place."""
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
    head, batch = head_of(model, tokenizer), collate(examples)
    for _ in range(settings.relearn_steps or 0):
        optimizer.zero_grad()
        supervised_loss(model, batch, part, method, head, None, None).loss.backward()
        optimizer.step()


def extra_records(name: str, path: str) -> list[Record]:
    """Questions of a file of their own, whatever split it calls them.

    Raises:
        InputError: the file cannot be read, or holds anything but forget questions with an answer.
    """
    records = read_records(Path(path))
    for record in records:
        if record.goal != "forget" or record.form != "qa" or not record.golds:
            raise InputError(
                f"{path} ({name}): record {record.id!r} is no forget question with a gold answer."
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


def auc(members: Sequence[float], others: Sequence[float]) -> Score:
    """How often a member scores above a stranger, ties by half; 50 = cannot be told apart.

    The interval is Hanley and McNeil's (1982).
    """
    wins = math.fsum((m > o) + 0.5 * (m == o) for m in members for o in others)
    n, m = len(members), len(others)
    a = wins / (n * m)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a)) / (n * m)
    half = Z_95 * math.sqrt(max(variance, 0.0))
    return Score(100 * a, n + m, 100 * max(a - half, 0.0), 100 * min(a + half, 1.0))
