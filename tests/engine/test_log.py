"""train.jsonl, its disk full, its lines damaged, its lines seldom."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from unteach.engine.errors import InputError
from unteach.engine.train.log import StepLog, StepSums
from unteach.engine.train.parallel import World

ALONE = World(0, 1, torch.device("cpu"), None)


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sums_of(tokens: int) -> StepSums:
    sums = StepSums(ALONE)
    sums.counts_2[0] = tokens
    return sums


def write(log: StepLog, step: int, sums: StepSums) -> dict[str, Any]:
    log.write(step, sums, 0.1, torch.tensor(1.0))
    line: dict[str, Any] = json.loads(log.path.read_bytes().splitlines()[-1])
    return line


def test_a_full_disk_keeps_the_log_and_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    log = StepLog(path, 0, ALONE)
    for step in (1, 2, 3):
        write(log, step, sums_of(5))
    before = path.read_bytes()
    with full_at(len(before)), pytest.raises(InputError, match=r"train\.jsonl cannot be written"):
        write(log, 4, sums_of(5))
    path.write_bytes(before)
    with full_at(100), pytest.raises(InputError, match=r"train\.jsonl cannot be written"):
        StepLog(path, 2, ALONE)
    assert path.read_bytes() == before
    StepLog(path, 2, ALONE)
    assert path.read_bytes().splitlines() == before.splitlines()[:2]


def test_a_damaged_last_line_is_dropped_and_another_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    for last in (b'{"step": 3, "lo', b"\0" * 30 + b"\n", b"[3]\n"):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + last)
        StepLog(path, 9, ALONE)
        assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n\xff\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"train\.jsonl, line 2: .*remove that line"):
        StepLog(path, 9, ALONE)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    text = '{"step": 1, "note": "one\u2028line"}\n{"step": 2}\n'
    path.write_text(text, encoding="utf-8")
    StepLog(path, 2, ALONE)
    assert path.read_text(encoding="utf-8") == text


def test_tokens_of_steps_between_two_lines_are_counted(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "train.jsonl", 0, ALONE)
    for every in (3, 2):
        for _ in range(every):
            sums = sums_of(100)
            log.count(sums)
        line = write(log, every, sums)
        assert line["tokens"] == every * 100
        assert line["tokens_per_second"] == pytest.approx(every * 100 / line["seconds"])
