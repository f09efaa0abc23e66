"""Compile every Triton kernel for every architecture, without a GPU, and hold it to a budget.

`python -m unteach.benchmarks.aot` builds one configuration per kernel and architecture, `--all`
every shipped one. Per build: registers a thread, bytes spilled, shared memory, tensor-core
instructions. A build fails that does not compile, asks for more shared memory than the
architecture has, spills on sm_90, or multiplies 16-bit tiles without tensor cores. Pointers and
strides are declared divisible by 16, as the launcher does for aligned tensors: without that the
figures mean nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unteach.kernels.triton_launch import (
    ADAMW_BLOCK,
    ARCHITECTURES,
    EXHAUSTIVE_BLOCK,
    EXHAUSTIVE_KEPT,
    EXHAUSTIVE_WARPS,
    FILTER_WARPS,
    GATHER_BLOCK,
    GRAD_COLUMNS,
    MAX_K,
    PRODUCT_IDS,
    Tile,
    append_tile,
    extract_tile,
    have_triton,
    interpreting,
    kept_width,
    next_power,
)

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
# Types of arguments by name; what is not listed is a 32-bit integer.
FLOATS = {"scale", "beta", "gate", "softcap"}
FLOATS |= {"lr", "kept", "rest1", "rest2", "log_beta1", "log_beta2", "eps"}
POINTERS = {
    "bias_ptr": "*fp32",
    "part_ptr": "*i64",
    "keys_ptr": "*i64",
    "raw_ptr": "*fp32",
    "z_ptr": "*fp32",
    "student_ptr": "*fp32",
    "teacher_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "live_ptr": "*u8",
    "factor_ptr": "*fp32",
    "loss_ptr": "*fp32",
    "slope_ptr": "*fp32",
    "slopes_ptr": "*fp32",
    "kept_ptr": "*fp32",
    "step_ptr": "*fp32",
    "found_ptr": "*fp32",
}
INPUTS = ("x_ptr", "w_ptr", "p_ptr", "g_ptr")
WRITTEN = ("grad_ptr", "m_ptr", "v_ptr")


@dataclass(frozen=True)
class Build:
    """One kernel with one set of constants for one architecture."""

    name: str
    kernel: Any
    architecture: str
    constants: dict[str, int | bool]
    dtype: str = "bf16"
    grad: str | None = None  # type of WRITTEN
    warps: int = 4
    stages: int = 3
    fusion: bool = True
    multiplies: bool = False
    odd: bool = False  # widths and strides that are no multiples of 16


@dataclass(frozen=True)
class Report:
    """What came out of a build."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_cores: int = 0
    faults: list[str] = field(default_factory=list)


def builds(architecture: str, everything: bool) -> Iterator[Build]:
    """What ships for an architecture; without `everything` one build a kernel."""
    ks = (MAX_K, 64, 32, 16, 1) if everything else (32,)
    for dtype in WIDTHS if everything else ("bf16",):
        for odd in (False, True) if everything else (False,):
            for k in ks:
                yield _extract(architecture, dtype, k, odd=odd)
            yield _append(architecture, dtype, odd=odd)
        for k in ks if everything else ():
            yield _extract(architecture, dtype, k, given=True)
        for kept in sorted({max(EXHAUSTIVE_KEPT, next_power(k)) for k in ks}):
            yield _exhaustive(architecture, dtype, kept)
        yield from _gathers(architecture, dtype)
    for k in ks:
        yield _merge(architecture, k, used=False)
        if everything:
            yield _merge(architecture, k, used=True)
    yield from _rows(architecture, everything)
    yield from _updates(architecture, everything)


def _extract(
    architecture: str, dtype: str, k: int, *, given: bool = False, odd: bool = False
) -> Build:
    from unteach.kernels.tile_topk import extract_kernel

    kept = kept_width(k)
    tile = extract_tile(architecture, kept, plain=not given and (odd or WIDTHS[dtype] > 2))
    constants = {"GIVEN": given, **_tile_constants(tile, dtype, odd), "KEPT": kept}
    name = f"extract k={k}" + " given" * given + " odd" * odd
    return _tiles(name, extract_kernel, architecture, dtype, tile, constants, odd, not given)


def _append(architecture: str, dtype: str, *, odd: bool) -> Build:
    from unteach.kernels.tile_topk import append_kernel

    tile = append_tile(architecture, plain=odd or WIDTHS[dtype] > 2)
    constants = {"GIVEN": False, **_tile_constants(tile, dtype, odd), "SLOTS": 64}
    name = "append" + " odd" * odd
    return _tiles(name, append_kernel, architecture, dtype, tile, constants, odd, True)


def _tile_constants(tile: Tile, dtype: str, odd: bool) -> dict[str, int | bool]:
    return {
        "HAS_BIAS": odd,
        "EVEN_D": not odd,
        "UPCAST": False,
        "SPLITS": 4,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.depth(WIDTHS[dtype]),
    }


def _tiles(
    name: str,
    kernel: Any,
    architecture: str,
    dtype: str,
    tile: Tile,
    constants: dict[str, int | bool],
    odd: bool,
    multiplies: bool,
) -> Build:
    return Build(
        name,
        kernel,
        architecture,
        constants,
        dtype,
        warps=tile.warps,
        stages=tile.stages,
        multiplies=multiplies,
        odd=odd,
    )


def _exhaustive(architecture: str, dtype: str, kept: int) -> Build:
    from unteach.kernels.tile_topk import exhaustive_kernel

    constants = {"HAS_BIAS": False, "SPLITS": 16, "KEPT": kept, "BLOCK_U": EXHAUSTIVE_BLOCK}
    name = f"exhaustive {kept} kept"
    warps = EXHAUSTIVE_WARPS
    return Build(name, exhaustive_kernel, architecture, constants, dtype, warps=warps, fusion=False)


def _gathers(architecture: str, dtype: str) -> Iterator[Build]:
    """Kernels that read rows of the head or of hidden states at chosen places."""
    from unteach.kernels import pair_dot, tile_grad

    yield Build(
        "pair_dot",
        pair_dot.pair_dot_kernel,
        architecture,
        {"HAS_BIAS": False, "BLOCK_U": pair_dot.BLOCK_U},
        dtype,
        warps=pair_dot.WARPS,
        fusion=False,
    )
    wide = {"BLOCK_D": GRAD_COLUMNS}
    for name, kernel, constants, grad in (
        ("hidden_grad", tile_grad.hidden_grad_kernel, {"BLOCK_U": GATHER_BLOCK, **wide}, "fp32"),
        ("head_units", tile_grad.head_units_kernel, {"BLOCK_P": GATHER_BLOCK, **wide}, dtype),
        ("head_join", tile_grad.head_join_kernel, wide, dtype),
    ):
        yield Build(name, kernel, architecture, {**constants}, dtype, grad)


def _merge(architecture: str, k: int, *, used: bool) -> Build:
    from unteach.kernels.tile_topk import merge_kernel

    slots, kept = 64 if used else kept_width(k), kept_width(k)
    constants = {"HAS_USED": used, "SPLITS": 4, "SLOTS": slots, "KEPT": kept}
    name = f"merge k={k}" + " used" * used
    return Build(name, merge_kernel, architecture, constants, warps=1 if 4 * slots <= 512 else 4)


def _rows(architecture: str, everything: bool) -> Iterator[Build]:
    """Kernels that take a row of float32 numbers each."""
    from unteach.kernels.tile_grad import row_loss_kernel
    from unteach.kernels.tile_topk import filter_kernel

    filtered = {"HAS_BIAS": False, "SLOTS": 256, "BLOCK_V": PRODUCT_IDS}
    yield Build("filter", filter_kernel, architecture, {**filtered}, warps=FILTER_WARPS)
    for rich, block in ((True, 128), (False, 1024)) if everything else ((True, 128),):
        options = {"L1": False, "CENTER": rich, "HAS_GATE": rich, "HAS_CAP": rich}
        constants = {**options, "BLOCK_U": block}
        yield Build(f"row_loss u={block}", row_loss_kernel, architecture, constants)


def _updates(architecture: str, everything: bool) -> Iterator[Build]:
    """The optimiser: parameters and moments of 16 and of 32 bits."""
    from unteach.kernels.adamw_triton import adamw_kernel

    for dtype in ("bf16", "fp32") if everything else ("bf16",):
        for state in ("bf16", "fp32") if everything else ("bf16",):
            rounds = {"ROUND_P": dtype == "bf16", "ROUND_STATE": state == "bf16"}
            constants = {"HAS_FOUND": True, **rounds, "BLOCK": ADAMW_BLOCK}
            name = f"adamw, moments {state}"
            yield Build(name, adamw_kernel, architecture, constants, dtype, grad=state)


def build(one: Build) -> Report:
    """Compile and look into the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = one.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in one.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _type(name, one)
        aligned = name == "D" or name.startswith("stride_")
        if name.endswith("_ptr") or (aligned and not one.odd):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(one.kernel, signature, constexprs=one.constants, attrs=attributes)
    target = GPUTarget("cuda", int(one.architecture[3:]), 32)
    options = {
        "num_warps": one.warps,
        "num_stages": one.stages,
        "enable_fp_fusion": one.fusion,
    }
    try:
        made = triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever a compiler raises is this build's failure
        return Report(faults=[f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"])
    registers, spilled, assembly = _inspect(made.asm["cubin"])
    report = Report(registers, spilled, made.metadata.shared, len(TENSOR_CORES.findall(assembly)))
    if report.shared > SHARED_LIMIT[one.architecture]:
        report.faults.append(f"shared memory over {SHARED_LIMIT[one.architecture]}")
    if report.spilled and one.architecture == "sm_90":
        report.faults.append("spills")
    if one.multiplies and WIDTHS[one.dtype] == 2 and not report.tensor_cores:
        report.faults.append("no tensor cores")
    return report


def _type(name: str, one: Build) -> str:
    if name in FLOATS:
        return "fp32"
    if name in INPUTS:
        return f"*{one.dtype}"
    if name in WRITTEN:
        return f"*{one.grad}"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*i32")
    return "i32"


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the assembly, by the tools of the triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", path)
        assembly = _output(tools / "nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), assembly


def _output(*command: object) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    """Build, print a table, return how the process should end."""
    parser = argparse.ArgumentParser(prog="python -m unteach.benchmarks.aot", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every shipped configuration")
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    parser.add_argument("--kernel", help="only builds whose name contains this")
    chosen = parser.parse_args(arguments)
    if not have_triton():
        print("triton is not installed: pip install 'unteach[dev]'", file=sys.stderr)
        return 2
    if interpreting():
        print("TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    import triton

    passed = failed = 0
    print(f"triton {triton.__version__}")
    print(f"{'kernel':<24}{'dtype':<6}{'target':<8}{'regs':>5}{'spill':>7}{'shared':>8}{'mma':>5}")
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        for architecture in chosen.architecture or ARCHITECTURES:
            for one in builds(architecture, chosen.all):
                if chosen.kernel and chosen.kernel not in one.name:
                    continue
                report = build(one)
                passed, failed = passed + (not report.faults), failed + bool(report.faults)
                print(
                    f"{one.name:<24}{one.dtype:<6}{architecture:<8}{report.registers:>5}"
                    f"{report.spilled:>7}{report.shared:>8}{report.tensor_cores:>5}"
                    f"  {'; '.join(report.faults)}".rstrip(),
                    flush=True,
                )
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
