"""The base of every config section: frozen, nothing unknown, no default unchecked, no infinity."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` where a number is wanted is the word, which is none: pydantic would take a 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        return _worded(value) if _names(kind, int, float) and not _names(kind, bool) else value


def _names(kind: Any, *wanted: type) -> bool:
    """Whether an annotation names one of these types anywhere."""
    return kind in wanted or any(_names(part, *wanted) for part in get_args(kind))


def _worded(value: Any) -> Any:
    """Truth values as the words that JSON has for them, in lists and mappings too."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return type(value)(_worded(each) for each in value)
    if isinstance(value, dict):
        return {key: _worded(each) for key, each in value.items()}
    return value
