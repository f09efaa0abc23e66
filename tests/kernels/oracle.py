"""Every op and every gradient from its equation, float64 NumPy, row by row, id by id.

Shares nothing with the package: no torch, no autograd, no vectorised sets. Slow and plain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Linear:
    """One side's logits: raw = scale h·w + b, z = softcap tanh(raw / softcap)."""

    hidden: Array
    head: Array
    bias: Array | None = None
    scale: float = 1.0
    softcap: float | None = None

    def raw(self) -> Array:
        raw = self.scale * np.einsum("nd,vd->nv", self.hidden, self.head)
        return raw if self.bias is None else raw + self.bias

    def final(self) -> Array:
        return self.cap(self.raw())

    def cap(self, raw: Array) -> Array:
        return raw if self.softcap is None else self.softcap * np.tanh(raw / self.softcap)

    def cap_slope(self, raw: Array) -> Array:
        if self.softcap is None:
            return np.ones_like(raw)
        return 1 / np.cosh(raw / self.softcap) ** 2

    def gradients(self, dz: Array) -> tuple[Array, Array, Array]:
        """dL/dhidden, dL/dhead, dL/dbias from a dense dL/dz."""
        draw = dz * self.cap_slope(self.raw())
        return self.scale * draw @ self.head, self.scale * draw.T @ self.hidden, draw.sum(0)


def top_ids(row: Array, k: int, vocab: int) -> list[int]:
    """The K largest, ties to the smaller id."""
    ids = np.arange(vocab)
    order: list[int] = np.lexsort((ids, -row[:vocab]))[:k].tolist()
    return order


@dataclass
class Answers:
    """A teacher: its set per row, and its final logit at the ids it can speak of."""

    sets: list[list[int]]
    logits: list[dict[int, float]]


@dataclass
class Result:
    loss: float
    rows: Array
    student: list[list[int]]
    coverage: Array
    hidden: Array = field(default_factory=lambda: np.zeros(0))
    head: Array = field(default_factory=lambda: np.zeros(0))
    bias: Array = field(default_factory=lambda: np.zeros(0))


def full_teacher(raw: Array, final: Array, k: int, vocab: int) -> Answers:
    """Knows every id; selects by the value before the soft cap."""
    sets = [top_ids(row, k, vocab) for row in raw]
    return Answers(sets, [dict(enumerate(row)) for row in final])


def listed_teacher(
    ids: NDArray[np.int64], logits: Array, k: int, vocab: int, beside: Array | None
) -> Answers:
    """Knows a list (the first of equal ids speaks), and what stands `beside` it, if anything."""
    sets, answers = [], []
    for n, row in enumerate(ids):
        known = {} if beside is None else dict(enumerate(beside[n]))
        seen: set[int] = set()
        for slot, token in enumerate(row.tolist()):
            if 0 <= token < vocab and token not in seen:
                seen.add(token)
                known[token] = logits[n, slot]
        sets.append(sorted({t for t in row[:k].tolist() if 0 <= t < vocab}))
        answers.append(known)
    return Answers(sets, answers)


def smooth_l1(d: float, beta: float) -> float:
    return 0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta


def smooth_l1_slope(d: float, beta: float) -> float:
    if beta == 0:
        return float(np.sign(d))
    return max(-1.0, min(1.0, d / beta))


def softmax(z: dict[int, float]) -> dict[int, float]:
    top = max(z.values())
    total = sum(math.exp(x - top) for x in z.values())
    return {i: math.exp(x - top) / total for i, x in z.items()}


def bitopk(
    student: Linear,
    teacher: Answers,
    *,
    k: int,
    alpha: float,
    beta: float,
    vocab: int,
    weight: Array | None = None,
    normalizer: float | None = None,
    center: bool = False,
    gate: float | None = None,
) -> Result:
    """Eq. 3 with centring and gate, and its gradients."""
    raw, z = student.raw(), student.final()
    n = raw.shape[0]
    weight = np.ones(n) if weight is None else weight
    normalizer = float(n) if normalizer is None else normalizer
    rows, dz, coverage, chosen = np.zeros(n), np.zeros_like(z), np.ones(n), []
    for r in range(n):
        chosen.append(top_ids(raw[r], k, vocab) if alpha else [])
        if weight[r] == 0:
            continue
        answers = teacher.logits[r]
        ours = [i for i in chosen[r] if i in answers]
        if alpha:
            coverage[r] = len(ours) / k
        theirs = teacher.sets[r]
        union = sorted({*theirs, *ours})
        if not union:
            continue
        z_s, z_t = {i: z[r, i] for i in union}, {i: answers[i] for i in union}
        factor = 1.0
        if gate is not None:
            p_s, p_t = softmax(z_s), softmax(z_t)
            factor = min(1.0, 0.5 * sum(abs(p_s[i] - p_t[i]) for i in union) / gate)
        if center:
            mean_s, mean_t = sum(z_s.values()) / len(union), sum(z_t.values()) / len(union)
            z_s = {i: x - mean_s for i, x in z_s.items()}
            z_t = {i: x - mean_t for i, x in z_t.items()}
        slope = dict.fromkeys(union, 0.0)
        for ids, times in ((theirs, 1.0), (ours, alpha)):
            for i in ids:
                rows[r] += factor * times * smooth_l1(z_s[i] - z_t[i], beta)
                slope[i] += factor * times * smooth_l1_slope(z_s[i] - z_t[i], beta)
        mean = sum(slope.values()) / len(union) if center else 0.0
        for i in union:
            dz[r, i] = (slope[i] - mean) * weight[r] / normalizer
    loss = float((weight * rows).sum() / normalizer) if n else 0.0
    return Result(loss, rows, chosen, coverage, *student.gradients(dz))


def logprob(student: Linear, labels: list[int], upstream: Array) -> tuple[Array, Array]:
    """log p(label), and dL/dz for upstream gradients of each row."""
    z = student.final()
    logp, dz = np.zeros(len(labels)), np.zeros_like(z)
    for r, label in enumerate(labels):
        if not 0 <= label < z.shape[1]:
            continue
        total = np.logaddexp.reduce(z[r])
        logp[r] = z[r, label] - total
        dz[r] = -upstream[r] * np.exp(z[r] - total)
        dz[r, label] += upstream[r]
    return logp, dz


def kl(student: Linear, reference: Linear, vocab: int, upstream: Array) -> tuple[Array, Array]:
    """KL(reference || student), and dL/dz of the student."""
    z_s, z_r = student.final(), reference.final()
    value, dz = np.zeros(z_s.shape[0]), np.zeros_like(z_s)
    for r in range(z_s.shape[0]):
        logp_s = z_s[r, :vocab] - np.logaddexp.reduce(z_s[r, :vocab])
        logp_r = z_r[r, :vocab] - np.logaddexp.reduce(z_r[r, :vocab])
        value[r] = (np.exp(logp_r) * (logp_r - logp_s)).sum()
        dz[r, :vocab] = upstream[r] * (np.exp(logp_s) - np.exp(logp_r))
    return value, dz
