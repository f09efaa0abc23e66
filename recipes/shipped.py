"""The data files that ship with the recipes."""

from __future__ import annotations

from importlib.resources import files


def data_file(name: str) -> str:
    """Path of a file in recipes/data."""
    return str(files("unteach.recipes") / "data" / name)
