"""What every public op asks of its arguments, said once, before any work starts.

Only shapes, dtypes, devices and plain numbers are looked at: the contents of a tensor on a GPU
cannot be read without a host sync, so the ops define what odd contents mean instead.
"""

import operator

import torch
from torch import Tensor

from unteach.kernels.triton_launch import have_triton, interpreting

BACKENDS = ("torch", "triton")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def choose_backend(
    backend: str, *operands: Tensor | None, without_triton: str | None = None
) -> str:
    """Name the code path that serves this call.

    Args:
        operands: the tensors that a kernel would read; where one of them is float64, or not on a
            GPU, the call is not for `triton`.
        without_triton: why the op has no `triton` path for these arguments; None where it has.
    """
    if backend not in ("auto", *BACKENDS):
        known = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
    if backend == "torch":
        return backend
    present = [x for x in operands if x is not None]
    if backend == "auto" and not all(x.is_cuda for x in present):
        return "torch"
    reason = without_triton or _no_triton(present)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot serve this call: {reason}; 'torch' can")
    return "torch"


def _no_triton(operands: list[Tensor]) -> str | None:
    """Why the kernels cannot run on these tensors."""
    if not have_triton():
        return "triton is not installed"
    if any(x.dtype == torch.float64 for x in operands):
        return "an operand is float64"
    on_gpu = all(x.is_cuda for x in operands)
    if not on_gpu and not interpreting():
        return "it needs tensors on a CUDA device, or TRITON_INTERPRET=1 before the first import"
    return None


def check_linear(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    *,
    names: tuple[str, str, str] = ("hidden_ND", "head_VD", "bias_V"),
) -> None:
    """Check one (hidden, head, bias) triple that makes logits."""
    name, head_name, bias_name = names
    for label, matrix in ((name, hidden_ND), (head_name, head_VD)):
        if matrix.dim() != 2 or matrix.shape[1] < 1:
            raise ValueError(
                f"{label} must have two dimensions and at least one column, "
                f"got shape {tuple(matrix.shape)}"
            )
        if matrix.dtype not in FLOATS:
            raise ValueError(f"{label} must be bf16, fp16, fp32 or fp64, got {matrix.dtype}")
    if hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"{name} has width {hidden_ND.shape[1]} but {head_name} has width "
            f"{head_VD.shape[1]}: they must agree"
        )
    if hidden_ND.dtype != head_VD.dtype:
        raise ValueError(
            f"{name} is {hidden_ND.dtype} but {head_name} is {head_VD.dtype}: cast one of them"
        )
    check_device(head_name, head_VD, hidden_ND.device)
    if bias_V is not None:
        check_vector(bias_name, bias_V, head_VD.shape[0], hidden_ND.device)


def check_vector(name: str, vector: Tensor, length: int, device: torch.device) -> None:
    """Check a floating vector with one entry per row or per token id."""
    if tuple(vector.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(vector.shape)}")
    if vector.dtype not in FLOATS:
        raise ValueError(f"{name} must be bf16, fp16, fp32 or fp64, got {vector.dtype}")
    check_device(name, vector, device)


def check_ids(
    name: str, ids: Tensor, rows: int, device: torch.device, *, dimensions: int = 2
) -> None:
    """Check token ids: one row of ids (or one label) per hidden row, of any integer type."""
    if ids.dim() != dimensions or ids.shape[0] != rows:
        raise ValueError(
            f"{name} must have {dimensions} dimension(s) and {rows} rows, "
            f"got shape {tuple(ids.shape)}"
        )
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {ids.dtype}")
    check_device(name, ids, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that a tensor lives where the hidden states live."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} like the hidden states")


def check_logit_rule(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Check the model's own scale and soft cap; return them as Triton takes them.

    A scalar of NumPy or of a tensor library passes for a float everywhere but in a kernel's launch.
    """
    check_number("scale", scale)
    check_number("softcap", softcap, optional=True)
    return float(scale), None if softcap is None else float(softcap)


def check_number(
    name: str, value: float | None, *, zero: bool = False, optional: bool = False
) -> None:
    """Check that a plain number is above 0, or 0 or None where that means something.

    A number that float32 rounds to 0 or inf, or whose inverse does, would end in NaN.
    """
    if (optional and value is None) or (zero and value == 0):
        return
    if value is None or not _SMALLEST <= value <= _LARGEST:
        also = "None or " * optional + "0 or " * zero
        raise ValueError(
            f"{name} must be {also}a finite number above 0 that float32 holds "
            f"({_SMALLEST:.3g} to {_LARGEST:.3g}), got {value!r}"
        )


def check_vocab(vocab: int | None, limit: int) -> int:
    """Return the number of selectable ids: `vocab`, or every id that all sides have."""
    if vocab is None:
        return limit
    whole = _integer(vocab)
    if whole is None or not 1 <= whole <= limit:
        raise ValueError(f"vocab must be None or an integer from 1 to {limit}, got {vocab!r}")
    return whole


def check_k(k: int, vocab: int) -> int:
    """Return K as a plain integer, if so many ids can be chosen among `vocab`."""
    whole = _integer(k)
    if whole is None or not 1 <= whole <= vocab:
        raise ValueError(f"k must be an integer from 1 to {vocab} (selectable ids), got {k!r}")
    return whole


def _integer(value: object) -> int | None:
    """The integer that `value` is, numpy's as well; a bool is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def valid_ids(ids: Tensor, vocab: int) -> Tensor:
    """Ids as int64, with -1 in place of every id that is not in [0, vocab)."""
    wide = ids.to(torch.int64)
    return wide.masked_fill((wide < 0) | (wide >= vocab), -1)
