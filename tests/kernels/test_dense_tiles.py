from __future__ import annotations

import pytest
import torch

from tests.kernels import test_linear_kl, test_linear_logprob
from unteach.kernels import dense_tiles
from unteach.kernels.linear_kl import linear_kl
from unteach.kernels.linear_logprob import linear_logprob

SHAPE = {"softcap": 3.0, "scale": 0.6}


# what a GPU takes; and tiles that neither rows nor ids divide, every row block ending in a part
@pytest.mark.parametrize("tile", [None, (7, 401)])
def test_the_size_of_a_tile_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int] | None
) -> None:
    """Both ops against float64, with the tiles that no CPU takes by itself."""
    taken = tile or dense_tiles._tile(5003, torch.device("cuda"))
    assert taken != dense_tiles._tile(5003, torch.device("cpu"))
    monkeypatch.setattr(dense_tiles, "_tile", lambda vocab, device: taken)
    test_linear_logprob.test_value_and_gradients_match_the_oracle(
        linear_logprob, torch.float32, SHAPE, 52, 3, 5003
    )
    test_linear_kl.test_value_and_gradients_match_the_oracle(
        linear_kl, torch.float32, SHAPE, 52, 3, 4, 5003, 5003, None
    )
