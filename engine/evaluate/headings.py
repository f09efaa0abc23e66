"""What a score is called in a table, which way is better, and where it stands."""

from __future__ import annotations

import re
from collections.abc import Callable

MEANINGS = {
    "forget": "Forget",
    "general": "General",
    "neighbor": "Neighbor",
    "attack": "Attack success",
    "mmlu": "MMLU (5-shot)",
}
# What stands beside the five scores, in the order of the table, with the sign of the better.
EXTRAS = {
    "forget_held_out": ("Forget, untrained facts", -1),
    "forget_paraphrased": ("Forget, trained facts", -1),
    "general_held_out": ("General, untrained facts", 1),
    "general_paraphrased": ("General, trained facts", 1),
    "neighbor_held_out": ("Neighbor, untrained facts", 1),
    "neighbor_paraphrased": ("Neighbor, trained facts", 1),
    "attack_held_out": ("Attack, untrained facts", -1),
    "attack_paraphrased": ("Attack, trained facts", -1),
    "attack_leak": ("Attack, leak judge", -1),
    "attack_keyword": ("Attack, keyword judge", -1),
    "attack_unjudged": ("Attack, not judged", -1),
    "neighbor_over_refusal": ("Neighbor, refusal picked", -1),
    "neighbor_recall": ("Neighbor, open answer", 1),
    "general_prefixed": ("General, after prefix", 1),
    "neighbor_prefixed": ("Neighbor, after prefix", 1),
    "forget_refused": ("Refused, forget", 1),
    "attack_refused": ("Refused, attack", 1),
    "general_refused": ("Refused, general", -1),
    "neighbor_refused": ("Refused, neighbor", -1),
    "general_prefixed_refused": ("Refused, general + prefix", -1),
    "neighbor_prefixed_refused": ("Refused, neighbor + prefix", -1),
    "unended": ("Cut at the longest answer", 0),
}
# Stress scores carry a number or a file's name in theirs; in the order of the table.
STRESSES: tuple[tuple[str, Callable[[re.Match[str]], str], int], ...] = (
    (
        r"relearned_(\d+)_forget(_held_out)?",
        lambda m: f"Forget, relearned on {m[1]} rows{', other facts' if m[2] else ''}",
        -1,
    ),
    (r"few_shot_forget", lambda m: "Forget, behind answered examples", -1),
    (r"searched_attack", lambda m: "Attack, searched prefixes", -1),
    (r"int(\d)_forget", lambda m: f"Forget, rounded to {m[1]} bits", -1),
    (r"int(\d)_general", lambda m: f"General, rounded to {m[1]} bits", 1),
    (r"int(\d)_neighbor", lambda m: f"Neighbor, rounded to {m[1]} bits", 1),
    (r"int(\d)_attack", lambda m: f"Attack, rounded to {m[1]} bits", -1),
    (r"forget_file_(.*)", lambda m: f"Forget, questions of {m[1]}", -1),
    (r"open_(forget|attack)_refused", lambda m: f"Refused, unseen {m[1]} questions", 1),
    (r"open_(general|neighbor)_refused", lambda m: f"Refused, unseen {m[1]} questions", -1),
    (r"open_auc", lambda m: "Told apart, unseen questions (AUC)", 1),
    (r"min_k_auc", lambda m: "Membership, Min-K AUC", 0),
)
ARROWS = {1: "↑", -1: "↓", 0: ""}


def heading_of(name: str) -> tuple[str, int]:
    """A score's words, and the sign of the better; a name that is none of ours as it is."""
    if name in EXTRAS:
        return EXTRAS[name]
    for pattern, words, direction in STRESSES:
        if match := re.fullmatch(pattern, name):
            return words(match), direction
    return name, 0


def is_stress(name: str) -> bool:
    """Whether a score comes from a stress that the config asked for."""
    return any(re.fullmatch(pattern, name) for pattern, _, _ in STRESSES)


def place_of(name: str) -> tuple[int, int, str]:
    """Sorts scores as the tables show them; numbers in names by value."""
    if name in EXTRAS:
        return list(EXTRAS).index(name), 0, name
    number = int("".join(re.findall(r"\d+", name)[:1]) or 0)
    for place, (pattern, _, _) in enumerate(STRESSES, len(EXTRAS)):
        if re.fullmatch(pattern, name):
            return place, number, name
    return len(EXTRAS) + len(STRESSES), number, name
