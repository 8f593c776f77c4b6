"""Settings held against their annotations, with messages of one line."""

import functools
import math
from numbers import Integral
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError


def check_types(settings, *names: str) -> None:
    """Hold the fields of a dataclass against their annotations, types strictly.

    What NumPy computed becomes Python's own number first, in place.

    Strictly means that 100.0 is no whole number and "false" no truth value: papermill hands over
    whatever it was given.

    Parameters
    ----------
    settings : dataclass instance
    names : str
        Fields to check; all of them when none is named.

    Raises
    ------
    ValueError
        One line with the first field that does not fit, its value and what is allowed.
    """
    for name, adapter in _adapters(type(settings)).items():  # type: ignore[arg-type]
        if names and name not in names:
            continue
        value = getattr(settings, name)
        if isinstance(value, np.generic):  # what a computation with arrays gives
            value = value.item()
            object.__setattr__(settings, name, value)
        try:
            adapter.validate_python(value)
        except ValidationError:
            hint = get_type_hints(type(settings), include_extras=True)[name]
            raise ValueError(f"{name}={value!r}: {allowed(hint)} is allowed") from None


def is_whole(value: object) -> bool:
    """Whether it is a whole number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@functools.cache
def _adapters(cls) -> dict[str, TypeAdapter]:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    hints = get_type_hints(cls, include_extras=True)
    return {name: TypeAdapter(hint, config=strict) for name, hint in hints.items()}


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    type(None): "None",
}
_LIMITS = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}


def _in_words(value: float) -> str:
    """A limit, whole numbers to the last digit."""
    return f"{value:d}" if isinstance(value, int) else f"{value:g}"


def allowed(hint) -> str:
    """In words, the values that an annotation admits."""
    if get_origin(hint) is Annotated:
        kind, field = get_args(hint)
        limits = [
            f"{word} {_in_words(getattr(limit, key))}"
            for limit in field.metadata
            for key, word in _LIMITS.items()
            if hasattr(limit, key) and math.isfinite(getattr(limit, key))
        ]
        return " ".join([allowed(kind), *limits])
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
    return " or ".join(map(allowed, choices)) if choices else _KINDS[hint]
