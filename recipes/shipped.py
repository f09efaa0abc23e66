"""The data files that ship with the recipes."""

from __future__ import annotations

from pathlib import Path


def data_file(name: str) -> str:
    """Path of a file in recipes/data."""
    return str(Path(__file__).resolve().parent / "data" / name)
