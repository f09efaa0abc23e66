from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from unteach.engine.config import Config, dump_config
from unteach.engine.errors import InputError
from unteach.engine.evaluate import pictures, ranking
from unteach.engine.evaluate.pictures import (
    ROW_STYLES,
    draw_loss,
    draw_radar,
    draw_relearning,
    draw_tradeoff,
)
from unteach.engine.evaluate.ranking import Ranked, Trial, draw_pictures
from unteach.engine.evaluate.report import (
    Role,
    cached_evaluation,
    compare_summaries,
    print_table,
    read_samples,
    read_steps,
    read_summary,
    write_evaluation,
    write_report,
    write_summary,
)
from unteach.engine.evaluate.scores import DIRECTIONS
from unteach.engine.evaluate.suites import Evaluation, summarized

EVIL = "<script>alert('x')</script> | `code` **bold** [link](http://e.vil) $x$ &amp;\nsecond # line"
STEPS = [
    {"step": s, "loss": 3.0 / s, "loss_forget": 4.0 / s, "loss_general": 0.1, "lr": 1e-4}
    | {"grad_norm": 1.0}
    for s in range(1, 9)
]


def evaluated(role: Role, *, mmlu: bool = True) -> Evaluation:
    """Twelve questions a goal: the base answers all, the model refuses what it should."""
    samples: list[dict[str, Any]] = []
    gone = {"forget", "attack"} if role == "model" else set()
    suites = ["forget", "general", "neighbor_recall", "attack", "neighbor"]
    for suite in [*suites, "general_prefixed", *(["mmlu"] if mmlu else [])]:
        for index in range(12):
            refused = suite in gone
            samples.append(
                {
                    "suite": suite,
                    "id": f"{suite.removesuffix('_recall')}-{index:02}",
                    "question": f"{suite} question {index}: {EVIL}",
                    "prefix": f"Sure {EVIL}" if suite == "attack" else None,
                    "prompt": "prompt",
                    "gold": ["Hedwig"],
                    "generation": "I do not know" if refused else f"{role} {EVIL}",
                    "refused": refused,
                    "refusals": [1],
                    "ended": True,
                    "leak": not refused,
                    "keyword": not refused,
                    "held_out": index % 2 == 0,
                    "score": 0.0 if refused or (suite == "mmlu" and index % 4) else 100.0,
                }
            )
    return summarized(samples, "leak")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(dump_config(Config()))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    write_evaluation(tmp_path, evaluated("base"), "base", "p" * 64, "w0")
    write_evaluation(tmp_path, evaluated("model"), "model", "p" * 64, "w1")
    write_summary(tmp_path)
    return tmp_path


def test_summary_has_the_schema_that_others_read(run: Path) -> None:
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["protocol"] == "p" * 64
    for side in ("base", "model"):
        assert set(summary[side]) == {"forget", "general", "neighbor", "attack", "mmlu"}
        for score in [*summary[side].values(), *summary["extra"][side].values()]:
            assert set(score) == {"value", "n", "low", "high"}
    assert summary["base"]["forget"]["value"] == 100.0
    assert summary["model"]["forget"] == {
        "value": 0.0,
        "n": 12,
        "low": 0.0,
        "high": pytest.approx(24.25, abs=0.01),
    }
    assert summary["overall"] == pytest.approx(200.0)
    assert summary["left_out"] == []
    assert "chance" in summary["chance"] and "N=12" in summary["chance"]
    assert summary == read_summary(run)


def test_samples_of_both_models_are_kept(run: Path) -> None:
    samples = read_samples(run)
    assert {(s["model"], s["suite"]) for s in samples} >= {("base", "mmlu"), ("model", "attack")}
    assert len(samples) == 2 * 7 * 12
    assert samples[0]["prompt"] and samples[0]["generation"].startswith("base <script>")


def test_a_score_that_neither_side_has_is_said(tmp_path: Path) -> None:
    for role in ("base", "model"):
        write_evaluation(tmp_path, evaluated(role, mmlu=False), role, "p" * 64, role)
    summary = write_report(tmp_path)
    assert summary["left_out"] == ["mmlu"] and summary["chance"] is None
    assert "not scored: MMLU" in (tmp_path / "report.md").read_text()


def test_base_is_reused_for_the_same_weights_and_protocol_only(run: Path) -> None:
    assert cached_evaluation(run, "base", "p" * 64, "w0") == evaluated("base")
    assert cached_evaluation(run, "base", "q" * 64, "w0") is None
    assert cached_evaluation(run, "base", "p" * 64, "w9") is None
    assert cached_evaluation(run / "elsewhere", "base", "p" * 64, "w0") is None


def test_different_protocols_are_never_set_side_by_side(run: Path) -> None:
    write_evaluation(run, evaluated("model"), "model", "q" * 64, "w1")
    assert not (run / "evaluation" / "summary.json").exists(), "the summary of another protocol"
    with pytest.raises(InputError, match="different protocols"):
        write_report(run)
    write_evaluation(run, evaluated("base"), "base", "q" * 64, "w0")
    assert write_report(run)["protocol"] == "q" * 64


def test_comparison_ranks_by_overall_and_refuses_other_protocols(run: Path) -> None:
    one = read_summary(run)
    worse = {**one, "overall": 10.0}
    rows = compare_summaries({"sft": worse, "bitopk": one})
    assert [name for name, _ in rows] == ["bitopk", "sft"]
    assert rows[0][1]["overall"] == pytest.approx(200.0) and rows[0][1]["forget"] == 0.0
    with pytest.raises(InputError, match=r"sft and other .* different protocols"):
        compare_summaries({"sft": worse, "bitopk": one, "other": {**one, "protocol": "z"}})


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_self_contained_and_escapes_what_models_wrote(run: Path) -> None:
    write_report(run)
    page = Page((run / "report.html").read_text())
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "a", "b64"}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2
    assert all(str(source).startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not [v for _, attrs in page.tags for v in attrs.values() if v and "http" in v]
    assert "base <script>alert('x')</script> | `code`" in page.text
    assert "method:" in page.text and "p" * 64 in page.text


def test_reports_show_scores_n_intervals_extras_and_three_examples_a_goal(run: Path) -> None:
    write_report(run)
    text = (run / "report.md").read_text()
    assert "| Forget ↓ | 100.0 [75.8–100.0] | 0.0 [0.0–24.2] | -100.0 | 12 |" in text
    assert "Overall +200.0" in text
    assert "| Refused, attack ↑ | 0.0 " in text
    assert "is chance" in text
    for goal in ("forget", "general", "neighbor", "attack"):
        assert len(re.findall(f"^### {goal}: ", text, flags=re.MULTILINE)) == 3
    assert "![radar](radar.png)" in text and "![loss](loss.png)" in text
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\\<script\\>alert('x')\\</script\\> \\| \\`code\\` \\*\\*bold\\*\\*" in text
    assert "\nsecond" not in text, "an answer stays on its line"
    for name in ("radar.png", "loss.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_terminal_tables_show_n_and_intervals(run: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_table(read_summary(run), console)
    text = console.export_text()
    assert re.search(r"Forget ↓ +100\.0 \[75\.8–100\.0\] +0\.0 \[0\.0–24\.2\] +-100\.0 +12", text)
    assert "Overall +200.0" in text and "is chance" in text


def test_report_without_training_has_no_curve(run: Path) -> None:
    (run / "train.jsonl").unlink()
    (run / "loss.png").unlink(missing_ok=True)
    write_report(run)
    assert not (run / "loss.png").exists()
    assert "loss.png" not in (run / "report.md").read_text()


def test_training_curve_takes_the_last_line_of_a_step_and_skips_half_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1, "loss": 9}\n{"step": 2, "loss": 8}\n{"step": 1, "loss": 7}\n{"st')
    assert read_steps(path) == [{"step": 1, "loss": 7}, {"step": 2, "loss": 8}]
    assert "1 unreadable line" in capsys.readouterr().out
    assert read_steps(tmp_path / "none.jsonl") == []


def test_pictures_are_the_same_bytes_for_the_same_numbers() -> None:
    base = {"forget": 90.0, "general": 90.0, "attack": 80.0}
    assert draw_radar(base, base) == draw_radar(base, base)
    assert draw_radar({"forget": 1.0}, {"forget": 1.0}) is None
    assert draw_loss(STEPS[:1]).startswith(b"\x89PNG")


# Forget, general and neighbor of the seventeen rows of docs/results/quickstart-15-steps.jsonl:
# most of them lie in one corner.
CROWDED = (
    (100.0, 100.0, 100.0), (0.0, 97.0, 100.0), (3.0, 59.1, 6.1), (84.8, 100.0, 100.0),
    (42.4, 100.0, 78.8), (95.5, 100.0, 100.0), (95.5, 100.0, 100.0), (90.9, 100.0, 100.0),
    (100.0, 98.5, 100.0), (98.5, 100.0, 100.0), (100.0, 100.0, 100.0), (98.5, 100.0, 100.0),
    (36.4, 100.0, 75.8), (98.5, 100.0, 100.0), (80.3, 100.0, 98.5), (74.2, 100.0, 100.0),
    (87.9, 100.0, 100.0),
)  # fmt: skip


def test_every_row_of_a_tradeoff_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks of their own, and labels inside the axes that cover neither each other nor a mark."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "png_of", drawn.append)
    names = ("forget", "general", "neighbor")
    draw_tradeoff({f"row {i}": dict(zip(names, v, strict=True)) for i, v in enumerate(CROWDED)})
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    for axes, kept in zip(figure.axes, ("General", "Neighbor"), strict=True):
        assert axes.get_xlabel().endswith("% ↑") and axes.get_ylabel() == f"{kept}, % ↑"
        marks = [(line.get_color(), line.get_marker()) for line in axes.lines]
        assert len(set(marks)) == len(CROWDED)
        numbers = re.findall(r"\d+", " ".join(text.get_text() for text in axes.texts))
        assert sorted(map(int, numbers)) == [*range(len(CROWDED))]
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the thin line
        points = [axes.transData.transform((100 - v[0], v[names.index(kept.lower())]))
                  for v in CROWDED]  # fmt: skip
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index])
            assert not any(box.contains(*point) for point in points)
            assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            assert axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)


def test_what_comes_back_is_a_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of the seeds; a row that was not taught again keeps its place, which is its style."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "png_of", drawn.append)
    oracle, ours, sft = {0: [0.0]}, {0: [4.0, 6.0], 20: [20.0, 30.0], 5: [10.0, 20.0]}, {0: [8.0]}
    assert draw_relearning({"Base": sft, "Oracle": oracle}) is None
    draw_relearning({"Base": {0: [99.0], 5: [100.0]}, "Oracle": oracle, "Ours": ours})
    (axes,) = drawn[0].axes
    lines = {box.get_label(): box.lines[0] for box in axes.containers}
    assert [*lines] == ["Base", "Ours"]
    assert lines["Ours"].get_xdata().tolist() == [0, 5, 20]
    assert lines["Ours"].get_ydata().tolist() == [5.0, 15.0, 25.0]
    assert lines["Ours"].get_color() == ROW_STYLES[2][0]
    assert axes.get_ylim() == (0, 100)


def test_seeds_that_agree_have_a_bar_of_no_length() -> None:
    ninth = 100 / 9
    assert fmean([ninth] * 3) != ninth
    drawn = draw_relearning({"Base": {0: [ninth] * 3, 5: [ninth] * 3}})
    assert drawn is not None and drawn.startswith(b"\x89PNG")


def test_what_comes_back_is_read_off_the_trials_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed's value at each number of rows; facts that were held out are another score."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(ranking, "draw_relearning", shown.append)

    def trial(seed: int, forget: float, again: float) -> Trial:
        extra = {"relearned_20_forget": again, "relearned_20_forget_held_out": 99.0, "unended": 1.0}
        return Trial(
            *("bitopk", 1e-4, seed, "test", "i", "p", 0.0),
            {"forget": {"value": forget}, "general": {"value": 90.0}},
            {name: {"value": value} for name, value in extra.items()},
            None,
        )

    rows = {"bitopk": Ranked("bitopk", (trial(0, 4.0, 30.0), trial(1, 6.0, 20.0)))}
    draw_pictures(Trial("base", None, None, "test", "i", "p", 0.0, {}, {}, None), rows)
    assert shown == [{"Base": {}, "Ours": {0: [4.0, 6.0], 20: [30.0, 20.0]}}]


def test_rings_of_a_radar_stand_above_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "png_of", drawn.append)
    draw_radar(dict.fromkeys(DIRECTIONS, 50.0), dict.fromkeys(DIRECTIONS, 75.0))
    (axes,) = drawn[0].axes
    highest = max(line.get_zorder() for line in axes.lines)
    rings = {text.get_text(): text.get_zorder() for text in axes.texts}
    assert [*rings] == ["25", "50", "75", "100"] and min(rings.values()) > highest


def test_a_row_has_one_name_and_one_style_in_both_pictures_of_a_ranking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[list[str]] = []

    def note(rows: dict[str, Any]) -> bytes:
        shown.append([*rows])
        return b"png"

    monkeypatch.setattr(ranking, "draw_rows", note)
    monkeypatch.setattr(ranking, "draw_tradeoff", note)
    totals = {
        "duet-loss": 170.0,
        "sft": 150.0,
        "oracle": 165.0,
        "bitopk": 140.0,
        "kl-teacher": 155.0,
    }
    rows = {
        name: Ranked(name, (Trial(name, 1e-4, 0, "test", "i", "p", total, {}, {}, None),))
        for name, total in totals.items()
    }
    base = Trial("base", None, None, "test", "i", "p", 0.0, {}, {}, None)
    draw_pictures(base, rows)
    radar, tradeoff = shown
    assert radar == ["Base", "Ours", "Upper bound (oracle router)", "Full-vocabulary KL", "SFT"]
    assert tradeoff == [*radar, "Ours with DUET's loss"], "a row's place is its style"
    draw_pictures(base, {"duet-loss": rows["duet-loss"]})
    assert shown[2] == ["Base", "Ours with DUET's loss"], "where there is no other row"


def test_damaged_or_missing_evaluations_say_what_to_do(run: Path) -> None:
    path = run / "evaluation" / "base.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match=r"damaged .* evaluate again"):
        write_report(run)
    stored = json.loads((run / "evaluation" / "model.json").read_text())
    del stored["scores"]["forget"]["n"]
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"base.json is damaged \(its score forget is .* again"):
        write_report(run)
    path.write_text("[]")
    with pytest.raises(InputError, match="no evaluation of this version"):
        write_report(run)
    path.unlink()
    with pytest.raises(InputError, match="run `unteach evaluate` first"):
        write_report(run)
    with pytest.raises(InputError, match="run `unteach evaluate` first"):
        read_summary(run / "elsewhere")
