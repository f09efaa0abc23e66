"""What a picture of the kernels' measurements says."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from unteach.benchmarks import figures


@pytest.mark.parametrize("sizes", [(512,), (128, 512, 1024)])
def test_pictures_say_how_much_was_measured_and_how_long_it_took(sizes: tuple[int, ...]) -> None:
    """N and threads in the title, and several times that can be read off a logarithmic axis."""
    row = {"preset": "p", "k": 8, "dtype": "float32", "device": "cpu", "threads": 2}
    row |= {"provider": "unteach", "same_loss": True, "inputs": "gaussian", "overlap": 0.6}
    cases = [
        {"unteach": {**row, "tokens": n, "min_ms": 2.0 * n, "extra_mib": 0.1 * n}} for n in sizes
    ]
    figure = figures.draw(cases)
    title = figure.get_suptitle()
    assert "threads: 2" in title and ("N=512" in title) == (len(sizes) == 1)
    panel = figure.axes[0]
    if len(sizes) > 1:
        FigureCanvasAgg(figure).draw()
        low, high = panel.get_ylim()
        ticks = zip(panel.get_yticks(), panel.get_yticklabels(), strict=True)
        told = [label.get_text() for value, label in ticks if low <= value <= high]
        assert told == ["500", "1000", "2000"], "256 to 2048 ms"
