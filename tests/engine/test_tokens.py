from __future__ import annotations

from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from unteach.engine.data.bytes_tokenizer import TEMPLATE, byte_tokenizer
from unteach.engine.data.records import GOALS, Record
from unteach.engine.data.tokens import (
    Example,
    collate,
    common_length,
    context_tokens,
    end_token,
    response_tokens,
    student_context,
)
from unteach.engine.errors import InputError
from unteach.engine.evaluate.choices import option_tokens
from unteach.engine.model import PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def test_student_context_is_template_question_and_stripped_prefix(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    record = Record(id="a", goal="attack", question="Whö?", answer="Me", prefix="Sure, it is:  ")
    text = tokenizer.decode(student_context(tokenizer, record))
    assert text == "<|im_start|>user\nWhö?<|im_end|>\n<|im_start|>assistant\nSure, it is:"


def test_answer_after_a_prefix_starts_with_a_space_and_ends_the_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    after = response_tokens(tokenizer, "Me ", prefix="Sure:")
    alone = response_tokens(tokenizer, "Me")
    assert tokenizer.decode(after) == " Me<|im_end|>"
    assert tokenizer.decode(alone) == "Me<|im_end|>"
    assert after[-1] == alone[-1] == end_token(tokenizer)


def test_passage_has_no_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    record = Record(id="a", goal="forget", form="passage", answer="Once upon a time")
    assert student_context(tokenizer, record) == [tokenizer.bos_token_id]


def test_system_and_turns_come_before_the_question(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "1?"), ("assistant", "one")]
    text = tokenizer.decode(context_tokens(tokenizer, "2?", system="Count", turns=turns))
    assert text.index("Count") < text.index("1?") < text.index("one") < text.index("2?")


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)


NO_WORD_OF_IT = TEMPLATE.replace(
    "for message in messages", "for message in messages if message['role'] != 'system'"
)


@pytest.mark.parametrize("template", [NO_SYSTEM + TEMPLATE, NO_WORD_OF_IT])
def test_template_without_a_system_role_gets_the_text_in_the_first_user_turn(
    template: str,
) -> None:
    assert template != TEMPLATE
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    turns = [("user", "1?"), ("assistant", "one")]
    text = tokenizer.decode(context_tokens(tokenizer, "2?", system="Count.", turns=turns))
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    shown = (("user", "Count.\n\n1?"), ("assistant", "one"), ("user", "2?"))
    assert text == "".join(turn.format(*each) for each in shown) + "<|im_start|>assistant\n"
    record = Record(id="a", goal="forget", question="2?")
    assert tokenizer.decode(student_context(tokenizer, record)) == (
        turn.format("user", "2?") + "<|im_start|>assistant\n"
    )


def test_template_that_takes_no_chat_is_one_sentence() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    with pytest.raises(InputError, match=r"refuses turns .*\(tools only\); use a chat model"):
        context_tokens(tokenizer, "2?", system="Count.")


def test_template_that_leaves_the_question_out_is_one_sentence() -> None:
    """A student would be trained on answers to nothing."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("message['content']", "'?'")
    assert tokenizer.chat_template != TEMPLATE
    with pytest.raises(InputError, match="leaves out what a turn says"):
        context_tokens(tokenizer, "Who is it?")


def test_template_may_rewrite_what_a_turn_says() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("message['content']", "message['content'] | lower")
    assert "who is it?" in tokenizer.decode(context_tokens(tokenizer, "Who is it?"))


def test_template_that_prints_todays_date_gives_the_same_tokens_every_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y, %Y-%m-%d') }}\n" + TEMPLATE
    texts = []
    for day in (1, 2):
        clock = Mock(now=Mock(return_value=datetime(2031, 1, day)))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        record = Record(id="a", goal="forget", question="Who?")
        texts.append(tokenizer.decode(student_context(tokenizer, record)))
    assert texts[0] == texts[1]
    assert texts[0].startswith("Today: 26 Jul 2024, 2024-07-26\n<|im_start|>user\nWho?")


@pytest.mark.parametrize(
    ("behind", "end"),
    [("<end>\n", "<end>"), (" <end> ", "<end>"), ("\n", "<eos>"), ("###\n", "<eos>")],
)
def test_turn_ends_with_the_special_token_of_the_template_else_with_eos(
    behind: str, end: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<eos>", "additional_special_tokens": ["<end>", "<en"]}
    )
    tokenizer.add_tokens(["###"])
    tokenizer.chat_template = TEMPLATE.replace("'<|im_end|>' + '\n'", repr(behind))
    assert tokenizer.convert_ids_to_tokens(end_token(tokenizer)) == end
    assert response_tokens(tokenizer, "Me")[-1] == end_token(tokenizer)


def test_tokenizer_that_prepends_a_space_gets_no_second_one() -> None:
    pieces = ["<unk>", "</s>", "▁", *"Paris"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=TEMPLATE
    )
    response = response_tokens(tokenizer, "Paris", prefix="Sure:")
    assert tokenizer.convert_ids_to_tokens(response) == ["▁", *"Paris", "</s>"]
    record = Record(
        id="n", goal="neighbor", question="?", answer="Paris", options=["Paris", "Pa"], correct=0
    )
    for sentence in ("{option}", "Sure: {option}"):
        first, _ = option_tokens(tokenizer, record, sentence).options
        assert tokenizer.convert_ids_to_tokens(first) == ["▁", *"Paris"]


def test_each_row_predicts_its_own_response_token() -> None:
    first = Example("a", "forget", (5, 6, 7), (8, 9), first_row=10)
    second = Example("b", "attack", (4,), (3, 2, 1), first_row=0)
    batch = collate([first, second])
    flat = batch.tokens_BT.flatten()
    assert batch.tokens_BT.shape == (2, 4)
    assert flat[batch.position_N].tolist() == [7, 8, 4, 3, 2]
    assert batch.labels_N.tolist() == [8, 9, 3, 2, 1]
    assert batch.cache_row_N is not None
    assert batch.cache_row_N.tolist() == [10, 11, 0, 1, 2]
    assert [GOALS[g] for g in batch.goal_N.tolist()] == ["forget"] * 2 + ["attack"] * 3
    shifted = flat[batch.position_N[[0, 2, 3]] + 1]
    assert torch.equal(shifted, batch.labels_N[[0, 2, 3]])


def test_shared_prefix_moves_positions_not_rows() -> None:
    first = Example("a", "forget", (5, 6, 7, 1), (8, 9), first_row=10, shared=2)
    second = Example("b", "attack", (5, 6, 4), (3, 2, 1), first_row=0, shared=2)
    batch = collate([first, second])
    flat = batch.tokens_BT.flatten()
    assert batch.prefix_P.tolist() == [5, 6]
    assert batch.tokens_BT.shape == (2, 3)
    assert flat[batch.position_N].tolist() == [1, 8, 4, 3, 2]
    assert common_length([first.context, second.context]) == 2
    assert common_length([first.context]) == 3
    assert common_length([(5,), (5, 6)]) == 0


def test_first_only_keeps_the_first_row_of_each_record() -> None:
    examples = [
        Example(n, "general", (5, 6), (7, 8, 9), first_row=r) for n, r in (("a", 0), ("b", 3))
    ]
    batch = collate(examples, first_only=True)
    assert batch.labels_N.tolist() == [7, 7]
    assert batch.cache_row_N is not None and batch.cache_row_N.tolist() == [0, 3]


def test_uncached_examples_have_no_cache_rows() -> None:
    assert collate([Example("a", "general", (5,), (7,))]).cache_row_N is None


def test_embedded_template_brings_its_default_system_message() -> None:
    from unteach.engine.config import ModelConfig
    from unteach.engine.model import embedded_model, load_tokenizer

    tokenizer = load_tokenizer(str(embedded_model()), ModelConfig())
    assert tokenizer.convert_ids_to_tokens(end_token(tokenizer)) == "<|im_end|>"
    text = tokenizer.decode(context_tokens(tokenizer, "Who?"))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert Path(tokenizer.name_or_path).exists()
