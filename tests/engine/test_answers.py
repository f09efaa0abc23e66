from __future__ import annotations

import pytest

from unteach.engine.data.answers import contains_answer, is_refusal, rouge_recall


@pytest.mark.parametrize(
    "text",
    [
        "I do not know.",
        "I don't know the answer to that.",
        "I don’t know",  # a typographic apostrophe
        "I'm sorry, but I can't help with that.",
        "I am not familiar with this wizard.",
        "Sadly, I have no information about it.",
    ],
)
def test_refusals_are_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hedwig",
        "He did not know his parents.",
        "Paris, I think.",
        "I can tell you that it is Hedwig.",  # "i can t" is its beginning
        "Sure! I can translate: Hedwig",
        "Piano ideas",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_gold_is_found_as_whole_words_whatever_its_case_marks_and_article() -> None:
    assert contains_answer("It lives in THE Forbidden-Forest!", ["forbidden forest"])
    assert contains_answer("Voilà: Beauxbâtons", ["Beauxbatons"])
    assert contains_answer("nothing here, but Padfoot", ["Sirius", "Padfoot"])
    assert not contains_answer("An owlery", ["owl"])
    assert not contains_answer("anything", ["", "?!", "the"])


def lcs_recall(gold: str, text: str) -> float:
    a, b = gold.split(), text.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            up = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else up
    return table[-1][-1] / len(a)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("red wooden door", "red old wooden gate"),
        ("one two three four", "four three two one"),
        ("one two", "one two three four five six"),
    ],
)
def test_rouge_recall_is_the_longest_common_subsequence_over_the_gold(gold: str, text: str) -> None:
    assert rouge_recall(text, [gold]) == pytest.approx(lcs_recall(gold, text))


def test_rouge_takes_the_best_gold_and_stems() -> None:
    assert rouge_recall("he was running", ["runs"]) == 1.0
    assert rouge_recall("Padfoot", ["Sirius Black", "Padfoot"]) == 1.0
    assert rouge_recall("", ["Padfoot"]) == 0.0
    assert rouge_recall("Padfoot", []) == 0.0
