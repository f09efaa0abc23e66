"""The prompted teacher at work: what it answers, and what it thinks at every supervised row.

Two forward passes see the same response behind different contexts, the prompted and the plain one.
Row r of a record is the position that predicts response token r in both.

The head of a prompt that all records of one kind share is run once and kept. It is found from the
prompt alone, never from the records at hand, and batches stay within a shard: so a shard's bytes
depend on nothing but its own records, whoever makes it and whatever was made before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from unteach.engine.config import TeacherConfig
from unteach.engine.context_length import check_lengths
from unteach.engine.data.records import Goal, Record
from unteach.engine.data.tokens import (
    end_token,
    passage_tokens,
    response_tokens,
    student_context,
)
from unteach.engine.errors import InputError
from unteach.engine.inference import SharedPrefix, Tokens, batch_hidden, greedy, share_prefix
from unteach.engine.model import (
    DTYPES,
    Head,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    head_bias,
    head_of,
    head_weight,
)
from unteach.engine.progress import Advance
from unteach.engine.teacher.intentions import (
    Intention,
    Intentions,
    closed_reasoning,
    intention_for,
    intention_of,
    is_open,
    reasoned_context,
    teacher_context,
)
from unteach.engine.teacher.manifest import Entry, Manifest
from unteach.kernels.linear_logprob import linear_logprob
from unteach.kernels.linear_topk import linear_topk

LOGITS_TILE = 8192


class Thought(NamedTuple):
    """Reasoning that ends with its marker, and whether the teacher itself wrote the marker."""

    text: str
    own_marker: bool


@dataclass(frozen=True)
class Lesson:
    """A record with both of its contexts and the response that follows either."""

    record: Record
    prompted: Tokens
    plain: Tokens
    response: Tokens
    answer: str
    thought: Thought | None


class Kind(NamedTuple):
    """Records of one kind read the same prompt; goal None is the student's, without intention."""

    goal: Goal | None
    form: str
    prefixed: bool


class Teacher:
    """The frozen model behind its intentions."""

    def __init__(
        self,
        config: TeacherConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        intentions: Intentions | None,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.intentions = intentions
        self.rule: Head = head_of(model, tokenizer)
        self.weight_VE = head_weight(model).detach()
        bias = head_bias(model)
        self.bias_V = None if bias is None else bias.detach()
        self._prompts: dict[Kind, tuple[Tokens, SharedPrefix | None]] = {}

    def intention(self, goal: Goal | None) -> Intention | None:
        """What this goal's records are told."""
        if goal is None:
            return None
        return intention_for(self.intentions, goal, self.config.routing)

    def told(self, record: Record) -> Intention | None:
        """What this record's teacher is told."""
        return intention_of(self.config, self.intentions, record)

    def lessons(self, records: Sequence[Record], advance: Advance | None = None) -> list[Lesson]:
        """Contexts and responses of records: the teacher thinks and answers where it is asked to.

        An open question has the model's own answer, without any intention, to be kept as it is.

        Raises:
            InputError: a gold response is asked of a record that has no answer, or a record is
                longer than the model reads.
        """
        contexts = [teacher_context(self.tokenizer, r, self.told(r)) for r in records]
        check_lengths(self.model, zip((r.id for r in records), map(len, contexts), strict=True))
        thoughts = self._think(records, contexts)
        responses: list[Tokens] = [[] for _ in records]
        asked = [i for i, record in enumerate(records) if self.generates(record)]
        for i, record in enumerate(records):
            if not self.generates(record):
                responses[i] = self._given(record)
        if advance:
            advance(len(records) - len(asked))
        answers = self._greedy(
            [records[i] for i in asked],
            [contexts[i] for i in asked],
            self.config.max_new_tokens,
            advance,
        )
        end = end_token(self.tokenizer)
        for i, answer in zip(asked, answers, strict=True):
            # an answer that was cut off does not end here
            cut = len(answer) == self.config.max_new_tokens
            responses[i] = answer if cut else [*answer, end]
        return [
            Lesson(
                record=record,
                prompted=contexts[i],
                plain=student_context(self.tokenizer, record),
                response=responses[i],
                answer=self._text(responses[i]),
                thought=thoughts[i],
            )
            for i, record in enumerate(records)
        ]

    @torch.no_grad()
    def rows(
        self, lessons: Sequence[Lesson], manifest: Manifest, advance: Advance | None = None
    ) -> tuple[dict[str, Tensor], list[Entry]]:
        """A shard's tensors, and its records' entries with first rows counted from the shard."""
        labels_N = torch.tensor(
            [token for lesson in lessons for token in lesson.response],
            dtype=torch.int32,
            device=self.model.device,
        )
        hidden_NE = self.hidden(lessons, prompted=True, advance=advance)
        logits_NM, ids_NM = self._topk(hidden_NE, manifest.top, None)
        plain_NE = self.hidden(lessons, prompted=False, advance=advance, known_NE=hidden_NE)
        _, student_ids_NS = self._topk(plain_NE, manifest.seeds, ids_NM)
        reference_logp_N = linear_logprob(
            plain_NE,
            self.weight_VE,
            labels_N,
            bias_V=self.bias_V,
            softcap=self.rule.softcap,
            scale=self.rule.scale,
        )
        tensors = {
            "labels": labels_N,
            "reference_logp": reference_logp_N.float(),
            "student_ids": student_ids_NS.int(),
            "top_ids": ids_NM.int(),
        }
        if manifest.form != "logits":
            tensors["top_logits"] = logits_NM.float()
        if manifest.form == "hidden":
            tensors["hidden"] = hidden_NE
        if manifest.form == "logits":
            tensors["logits"] = self._logits(hidden_NE).to(DTYPES[manifest.logits_dtype])
        agreed_N = ids_NM[:, 0] == labels_N
        return tensors, list(_entries(lessons, agreed_N.tolist()))

    @torch.no_grad()
    def hidden(
        self,
        lessons: Sequence[Lesson],
        *,
        prompted: bool,
        advance: Advance | None = None,
        known_NE: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, E] at all supervised rows, lesson by lesson, in the compute dtype.

        Args:
            prompted: behind the intention, or as the student reads.
            known_NE: the prompted ones, taken over where both contexts are the same.
        """
        ends = list(accumulate(len(lesson.response) for lesson in lessons))
        shape = (ends[-1], self.weight_VE.shape[1])
        hidden_NE = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        todo = []
        for i, lesson in enumerate(lessons):
            if known_NE is not None and lesson.prompted == lesson.plain:
                rows = slice(ends[i] - len(lesson.response), ends[i])
                hidden_NE[rows] = known_NE[rows]
            else:
                todo.append(i)
        if advance:
            advance(len(lessons) - len(todo))
        contexts = [lessons[i].prompted if prompted else lessons[i].plain for i in todo]
        lines = [c + lessons[i].response[:-1] for c, i in zip(contexts, todo, strict=True)]
        records = [lessons[i].record for i in todo]
        check_lengths(self.model, zip((r.id for r in records), map(len, lines), strict=True))
        for shared, group in self._shared(records, contexts, prompted=prompted):
            order = sorted(group, key=lambda j: (len(lines[j]), lines[j]))
            for first in range(0, len(order), self.config.batch_size):
                chosen = order[first : first + self.config.batch_size]
                batch = batch_hidden(self.model, [lines[j] for j in chosen], shared)
                for j, own_TE in zip(chosen, batch, strict=True):
                    start = len(contexts[j]) - 1 - (shared.length if shared else 0)
                    count, end = len(lessons[todo[j]].response), ends[todo[j]]
                    hidden_NE[end - count : end] = own_TE[start : start + count]
                if advance:
                    advance(len(chosen))
        return hidden_NE

    def generates(self, record: Record) -> bool:
        """Whether the record's response is the teacher's own."""
        own = self.config.response[record.goal] == "teacher"
        return is_open(self.config, record) or (record.form == "qa" and own)

    def _given(self, record: Record) -> Tokens:
        if record.form == "passage":
            assert record.answer is not None
            return passage_tokens(self.tokenizer, record.answer)
        if self.config.response[record.goal] == "refusal":
            return response_tokens(self.tokenizer, self.config.refusal, prefix=record.prefix)
        if record.answer is None or record.unanswered:
            raise InputError(
                f"Record {record.id!r} has no answer, and teacher.response.{record.goal} is gold: "
                f"give it one, or set teacher.response.{record.goal}=teacher."
            )
        return response_tokens(self.tokenizer, record.answer, prefix=record.prefix)

    def _think(self, records: Sequence[Record], contexts: list[Tokens]) -> list[Thought | None]:
        """Let the records whose intention says so reason, and put that into their contexts."""
        thoughts: list[Thought | None] = [None] * len(records)
        limits: dict[int, list[int]] = {}
        for i, record in enumerate(records):
            intention = self.told(record)
            if record.form == "qa" and intention and intention.reasoning == "strip":
                limits.setdefault(intention.reasoning_tokens, []).append(i)
        for limit, chosen in sorted(limits.items()):
            texts = self._greedy([records[i] for i in chosen], [contexts[i] for i in chosen], limit)
            for i, tokens in zip(chosen, texts, strict=True):
                intention = self.told(records[i])
                assert intention is not None
                thought = Thought(*closed_reasoning(self._text(tokens), intention.marker))
                thoughts[i] = thought
                contexts[i] = reasoned_context(
                    self.tokenizer, contexts[i], thought.text, prefixed=bool(records[i].prefix)
                )
        return thoughts

    def _greedy(
        self,
        records: Sequence[Record],
        contexts: Sequence[Tokens],
        max_new_tokens: int,
        advance: Advance | None = None,
    ) -> list[Tokens]:
        answers: list[Tokens] = [[] for _ in records]
        for shared, group in self._shared(records, contexts, prompted=True):
            batch = greedy(
                self.model,
                [contexts[i] for i in group],
                end=end_token(self.tokenizer),
                vocab=self.rule.vocab,
                max_new_tokens=max_new_tokens,
                batch_size=self.config.batch_size,
                prefix=shared,
                advance=advance,
            )
            for i, answer in zip(group, batch, strict=True):
                answers[i] = answer
        return answers

    def _shared(
        self, records: Sequence[Record], contexts: Sequence[Tokens], *, prompted: bool
    ) -> Iterator[tuple[SharedPrefix | None, list[int]]]:
        """Indices of the contexts by the prompt that they begin with and go beyond."""
        groups: dict[tuple[Kind, bool], list[int]] = {}
        for i, (record, context) in enumerate(zip(records, contexts, strict=True)):
            goal = record.goal if prompted else None
            kind = Kind(goal, record.form, prompted and bool(record.prefix))
            start, _ = self._prompt(kind)
            begins = len(context) > len(start) and context[: len(start)] == start
            groups.setdefault((kind, begins), []).append(i)
        for (kind, begins), group in groups.items():
            yield self._prompt(kind)[1] if begins else None, group

    def _prompt(self, kind: Kind) -> tuple[Tokens, SharedPrefix | None]:
        """The tokens that every context of a kind begins with, and their keys and values."""
        if kind not in self._prompts:
            probes = [self._context(probe, kind.goal) for probe in _probes(kind)]
            shared = share_prefix(self.model, probes)
            self._prompts[kind] = (probes[0][: shared.length] if shared else [], shared)
        return self._prompts[kind]

    def _context(self, record: Record, goal: Goal | None) -> Tokens:
        return teacher_context(self.tokenizer, record, self.intention(goal))

    def _topk(self, hidden_NE: Tensor, k: int, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_topk(
            hidden_NE,
            self.weight_VE,
            k,
            vocab=self.rule.vocab,
            seeds_NS=seeds,
            bias_V=self.bias_V,
            softcap=self.rule.softcap,
            scale=self.rule.scale,
        )

    def _logits(self, hidden_NE: Tensor) -> Tensor:
        """Final logits [N, V], float32, for the `logits` form; the head is widened by tiles."""
        wide_NE = hidden_NE.float() * self.rule.scale
        shape = (hidden_NE.shape[0], self.weight_VE.shape[0])
        logits_NV = torch.zeros(shape, device=hidden_NE.device)
        for first in range(0, shape[1], LOGITS_TILE):
            tile = slice(first, first + LOGITS_TILE)
            logits_NV[:, tile] = wide_NE @ self.weight_VE[tile].float().T
        if self.bias_V is not None:
            logits_NV += self.bias_V.float()
        if self.rule.softcap is not None:
            logits_NV.div_(self.rule.softcap).tanh_().mul_(self.rule.softcap)
        return logits_NV

    def _text(self, tokens: Tokens) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def _probes(kind: Kind) -> list[Record]:
    """Two records of a kind that differ from their first word on."""
    goal = kind.goal or "general"
    if kind.form == "passage":
        return [Record(id=text, goal=goal, answer=text, form="passage") for text in "a0"]
    prefix = "a" if kind.prefixed else None
    return [Record(id=text, goal=goal, question=text, prefix=prefix) for text in "a0"]


def _entries(lessons: Sequence[Lesson], agreed_N: Sequence[bool]) -> Iterator[Entry]:
    first = 0
    for lesson in lessons:
        rows = len(lesson.response)
        yield Entry(
            id=lesson.record.id,
            goal=lesson.record.goal,
            first_row=first,
            rows=rows,
            answer=lesson.answer.strip(),
            reasoning=lesson.thought.text if lesson.thought else None,
            own_marker=lesson.thought.own_marker if lesson.thought else True,
            agreed=sum(agreed_N[first : first + rows]),
        )
        first += rows
