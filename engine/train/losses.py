"""The formulas of every method, free of engine state: tensors in, tensors out.

A `*_loss` is the published scalar with its own reduction. The `*_rows` beside it is the same
formula before the mean, one value a row: the engine weighs and sums those, so that neither ranks
nor micro-batches change a loss. For FLAT alone the mean of those is another number than the
published scalar: see `flat_loss`. The dtype that comes in is the dtype of the arithmetic.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

Divergence = Literal["tv", "kl", "js", "pearson"]


def sft_rows(logp_N: Tensor) -> Tensor:
    """Negative log-likelihood of each label, nats."""
    return -logp_N


def sft_loss(logp_N: Tensor) -> Tensor:
    """Cross-entropy: L = -mean_n log p(y_n).

    Args:
        logp_N: log-probability of each supervised label, nats.
    Returns:
        Scalar, mean over tokens.
    """
    return sft_rows(logp_N).mean()


def ga_rows(logp_N: Tensor) -> Tensor:
    """Log-likelihood of each label, to be driven down without end."""
    return logp_N


def ga_loss(logp_N: Tensor) -> Tensor:
    """Gradient ascent on the cross-entropy: L = mean_n log p(y_n), unbounded below.

    Args:
        logp_N: log-probability of each label to forget, nats.
    Returns:
        Scalar, mean over tokens.
    """
    return ga_rows(logp_N).mean()


def graddiff_loss(
    forget_logp_N: Tensor, retain_logp_N: Tensor, *, gamma: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Gradient difference: L = -γ·CE(forget) + α·CE(retain), each a mean over its own tokens.

    Args:
        forget_logp_N: log-probability of each label to forget, nats.
        retain_logp_N: the same of each label to retain; its N is its own.
        gamma: weight of the ascent.
        alpha: weight of the descent.
    Returns:
        Scalar.
    """
    return gamma * ga_loss(forget_logp_N) + alpha * sft_loss(retain_logp_N)


def npo_rows(logp_B: Tensor, reference_logp_B: Tensor, *, beta: float) -> Tensor:
    """(2/β) log(1 + (p/p_ref)^β) of each sequence; linear, not infinite, at large ratios.

    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    _check_shape("reference_logp_B", reference_logp_B, logp_B)
    _check_positive("beta", beta)
    return -(2 / beta) * logsigmoid(-beta * (logp_B - reference_logp_B.detach()))


def npo_loss(logp_B: Tensor, reference_logp_B: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation on sequences to forget (Zhang et al. 2024).

    L = -(2/β) · mean_b log σ(-β (log p_b - log p_ref,b))

    Args:
        logp_B: log-probability of each sequence, a sum over its tokens, nats.
        reference_logp_B: the same under the original model; no gradient.
        beta: inverse temperature, above 0; β → 0 recovers gradient ascent.
    Returns:
        Scalar, mean over sequences.
    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    return npo_rows(logp_B, reference_logp_B, beta=beta).mean()


def simnpo_rows(logp_B: Tensor, lengths_B: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-(2/β) log σ(β (-log p / |y| - γ)) of each sequence.

    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    _check_shape("lengths_B", lengths_B, logp_B)
    _check_positive("beta", beta)
    mean_nll_B = -logp_B / lengths_B.to(logp_B.dtype)
    return -(2 / beta) * logsigmoid(beta * (mean_nll_B - gamma))


def simnpo_loss(
    logp_B: Tensor, lengths_B: Tensor, *, beta: float = 2.5, gamma: float = 0.0
) -> Tensor:
    """NPO without a reference, by mean instead of summed log-probability (Fan et al. 2024).

    L = -(2/β) · mean_b log σ(β (-log p_b / |y_b| - γ))

    Args:
        logp_B: log-probability of each sequence, a sum over its tokens, nats.
        lengths_B: supervised tokens of each sequence.
        gamma: margin, nats a token; inside the product with β.
    Returns:
        Scalar, mean over sequences.
    Raises:
        ValueError: shapes differ or beta <= 0.
    """
    return simnpo_rows(logp_B, lengths_B, beta=beta, gamma=gamma).mean()


def flat_template_rows(prob_B: Tensor, divergence: Divergence) -> Tensor:
    """-g(P) of the template answers: what raises them."""
    match divergence:
        case "tv":
            return -torch.tanh(prob_B) / 2
        case "js":
            return softplus(-prob_B) - math.log(2)
        case "kl" | "pearson":
            return -prob_B
    raise ValueError(f"divergence is {divergence!r}: choose tv, kl, js or pearson")


def flat_forget_rows(prob_B: Tensor, divergence: Divergence) -> Tensor:
    """f*(g(P)) of the answers to forget: what lowers them."""
    match divergence:
        case "tv":
            return torch.tanh(prob_B) / 2
        case "js":
            return softplus(prob_B) - math.log(2)
        case "kl":
            return torch.exp(prob_B - 1)
        case "pearson":
            return prob_B + prob_B.square() / 4
    raise ValueError(f"divergence is {divergence!r}: choose tv, kl, js or pearson")


def flat_loss(
    template_prob_B: Tensor, forget_prob_B: Tensor, *, divergence: Divergence = "tv"
) -> Tensor:
    """Forget data only: a variational f-divergence between template and forget answers (FLAT).

    L = -g(P_e) + f*(g(P_f)),     P = mean over the batch of each answer's mean token probability

    The sum falls apart into a part of each side, which is why sides may be batched apart. The
    engine takes f(P_b) of each record and then the mean, not f of the mean P as here, where f is
    -g or f*∘g: a mean of P would have to be known over the whole step before its first backward.
    Both are equal for a single record and where f is linear (the template side of kl and pearson).

    Args:
        template_prob_B: mean probability of the supervised tokens of each template answer.
        forget_prob_B: the same of each answer to forget.
    Returns:
        Scalar.
    Raises:
        ValueError: no such divergence.
    """
    template = flat_template_rows(template_prob_B.mean(), divergence)
    return template + flat_forget_rows(forget_prob_B.mean(), divergence)


def uce_rows(logp_N: Tensor) -> Tensor:
    """-log(1 - p/2) of each label: from 0 at p = 0 to ln 2 at p = 1, its slope bounded."""
    return -torch.log1p(-0.5 * logp_N.exp())


def uce_loss(logp_N: Tensor) -> Tensor:
    """Unlearning cross-entropy: L = -mean_n log(1 - p(y_n)/2), within [0, ln 2] (FedOSD, MOLLM).

    Args:
        logp_N: log-probability of each label to forget, nats.
    Returns:
        Scalar, mean over tokens.
    """
    return uce_rows(logp_N).mean()


def bild_rows(
    student_at_teacher_NK: Tensor,
    teacher_at_teacher_NK: Tensor,
    student_at_student_NK: Tensor,
    teacher_at_student_NK: Tensor,
    *,
    temperature: float,
    symmetric: bool,
) -> Tensor:
    """Both sides of BiLD, one sum a row.

    Raises:
        ValueError: temperature <= 0.
    """
    _check_positive("temperature", temperature)
    sides = (
        (student_at_teacher_NK, teacher_at_teacher_NK),
        (student_at_student_NK, teacher_at_student_NK),
    )
    total = torch.zeros_like(student_at_teacher_NK[:, 0])
    for student_NK, teacher_NK in sides:
        logp_s = (_differences(student_NK) / temperature).log_softmax(1)
        logp_t = (_differences(teacher_NK.detach()) / temperature).log_softmax(1)
        total = total + (logp_t.exp() * (logp_t - logp_s)).sum(1)
        if symmetric:
            total = total + (logp_s.exp() * (logp_s - logp_t)).sum(1)
    return total


def bild_loss(
    student_at_teacher_NK: Tensor,
    teacher_at_teacher_NK: Tensor,
    student_at_student_NK: Tensor,
    teacher_at_student_NK: Tensor,
    *,
    temperature: float = 3.0,
    symmetric: bool = False,
) -> Tensor:
    """Bi-directional logits difference (Li et al., COLING 2025), at T, without the factor T².

    L = Σ_sides KL(softmax(d_t/T) || softmax(d_s/T)),   d = all z_i - z_j, i < j in rank order

    Args:
        student_at_teacher_NK: student logits at the teacher's top-K ids, sorted by the teacher.
        teacher_at_teacher_NK: the teacher's own there; no gradient.
        student_at_student_NK: student logits at its own top-K ids, sorted.
        teacher_at_student_NK: the teacher's there; no gradient.
        symmetric: add KL(student || teacher), as arXiv 2604.15482 writes BiLD.
    Returns:
        Scalar, mean over rows.
    Raises:
        ValueError: temperature <= 0.
    """
    return bild_rows(
        student_at_teacher_NK,
        teacher_at_teacher_NK,
        student_at_student_NK,
        teacher_at_student_NK,
        temperature=temperature,
        symmetric=symmetric,
    ).mean()


def _differences(logits_NK: Tensor) -> Tensor:
    first, second = torch.triu_indices(
        logits_NK.shape[1], logits_NK.shape[1], 1, device=logits_NK.device
    )
    return logits_NK[:, first] - logits_NK[:, second]


def _check_shape(name: str, values_B: Tensor, logp_B: Tensor) -> None:
    if values_B.shape != logp_B.shape:
        raise ValueError(
            f"{name} is {tuple(values_B.shape)}, expected the shape of logp_B, "
            f"{tuple(logp_B.shape)}"
        )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected a number above 0")
