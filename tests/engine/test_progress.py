"""The bar that people watch on a terminal."""

from __future__ import annotations

import re

import pytest

from unteach.engine.progress import progress


def test_a_terminal_shows_the_rate_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "160"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    with progress("train", 4, unit="steps") as advance:
        for _ in range(4):
            advance(1, "loss 1")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert re.search(r"4/4 steps \d+\.\d/s \d:\d\d:\d\d \d:\d\d:\d\d loss 1", shown), shown
