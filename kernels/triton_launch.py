"""Where Triton kernels can run, and the block sizes they run with.

Block sizes are looked up by architecture in named tables, never tuned at run time: ranks of one job
must not disagree. No result depends on them, only speed and, for sums of gradients, rounding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The running lists of the search live in registers: twice K keys of 8 bytes a row.
MAX_K = 128
# Ids of a teacher's list: a row's union lies in registers too.
MAX_LISTED = 1024
# Smallest running list: a margin for ids that rounding may have put on the wrong side of the K-th.
MIN_KEPT = 16


@dataclass(frozen=True)
class Tile:
    """Block sizes of a tile kernel; `block_d` counts 16-bit numbers."""

    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int

    def depth(self, itemsize: int) -> int:
        """Columns of a step along D, so that wider numbers take the same shared memory."""
        return max(16, self.block_d * 2 // max(2, itemsize))


# By the width of the running list. Chosen for registers without spills by benchmarks/aot.py; not
# measured on a GPU yet.
EXTRACT_TILES: dict[str, dict[int, Tile]] = {
    "interpreter": {256: Tile(16, 128, 64, 4, 1)},
    "sm_80": {
        64: Tile(64, 128, 64, 8, 3),
        128: Tile(32, 128, 64, 8, 3),
        256: Tile(16, 128, 64, 8, 3),
    },
    "sm_90": {
        64: Tile(64, 128, 64, 8, 3),
        128: Tile(32, 128, 64, 8, 3),
        256: Tile(16, 128, 64, 8, 3),
    },
    "sm_100": {
        64: Tile(64, 128, 64, 8, 3),
        128: Tile(32, 128, 64, 8, 3),
        256: Tile(16, 128, 64, 8, 3),
    },
}
# The seeded pass keeps no list, so its tiles may be as large as the matrix product likes them. Not
# measured on a GPU yet.
APPEND_TILES: dict[str, Tile] = {
    "interpreter": Tile(16, 128, 64, 4, 1),
    "sm_80": Tile(128, 128, 32, 8, 4),
    "sm_90": Tile(128, 128, 64, 8, 4),
    "sm_100": Tile(128, 128, 64, 8, 4),
}
# Steps along D of the tiles above: a width must be a multiple of it.
WIDTH_STEP = 64
# Where a product cannot take 16-byte loads and tensor cores: float32, or a width that is no
# multiple of a step. Larger tiles spill there. Not measured on a GPU yet.
PLAIN_EXTRACT_TILES = {64: Tile(64, 64, 64, 8, 3), 256: Tile(32, 64, 64, 8, 3)}
PLAIN_APPEND_TILE = Tile(64, 128, 64, 8, 3)
# Where the seeded pass takes its logits from: `product`, a library's matrix products into a small
# workspace that a filter reads once, or `fused`, one kernel without a workspace. 32-bit and odd
# shapes always take `fused`. Not measured on a GPU yet; a product is the safer guess, because a
# Triton product without TMA is known to reach half to two thirds of the library's.
DENSE_PASS = {"interpreter": "fused", "sm_80": "product", "sm_90": "product", "sm_100": "product"}
# Rows and ids of one product: 2048 · 4096 float32 logits are 32 MiB, so that most of them are still
# in an L2 of 40 to 126 MB when the filter reads them.
PRODUCT_ROWS = 2048
PRODUCT_IDS = 4096
FILTER_WARPS = 8
# The exhaustive search: ids of a step, warps, smallest list; smaller ones spill on sm_90.
EXHAUSTIVE_BLOCK = 32
EXHAUSTIVE_KEPT = 32
EXHAUSTIVE_WARPS = 8
# Gathered rows of a step, and columns of a program, in sparse gradients.
GATHER_BLOCK = 16
GRAD_COLUMNS = 1024
# Elements of a program of the optimiser: 16 bytes of bf16 a thread.
ADAMW_BLOCK = 1024


def have_triton() -> bool:
    """Whether triton is installed."""
    return _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of any device."""
    if not have_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """The row of the tables that serves a device."""
    if interpreting():
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def extract_tile(architecture: str, kept: int, *, plain: bool = False) -> Tile:
    """Block sizes for running lists of `kept` keys."""
    plain = plain and architecture != "interpreter"
    table = PLAIN_EXTRACT_TILES if plain else EXTRACT_TILES[architecture]
    return table[min(width for width in table if width >= kept)]


def append_tile(architecture: str, *, plain: bool = False) -> Tile:
    """Block sizes of the seeded pass."""
    return (
        PLAIN_APPEND_TILE if plain and architecture != "interpreter" else APPEND_TILES[architecture]
    )


def dense_pass(architecture: str, *, plain: bool = False) -> str:
    """`product` or `fused`: how the seeded pass comes by the student's logits."""
    return "fused" if plain and architecture != "interpreter" else DENSE_PASS[architecture]


def kept_width(k: int) -> int:
    """Keys of a running list: a power of two, at least 2K."""
    return max(MIN_KEPT, next_power(2 * k))


def next_power(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def split_count(blocks: int, tiles: int) -> int:
    """Parts of the vocabulary, so that few rows still fill the machine; a power of two."""
    wanted = next_power(max(1, 512 // max(1, blocks)))
    return max(1, min(16, wanted, next_power(tiles + 1) // 2))


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
