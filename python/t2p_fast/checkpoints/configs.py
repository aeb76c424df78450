# SPDX-License-Identifier: Apache-2.0
"""Configurations: from JSON to dataclasses, with the type and the range of every option checked."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from typing import Any

from t2p_fast.checkpoints.files import CheckpointError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """``repr(value)``, shortened where it is too long for a message."""
    return _SHORT.repr(value)


def check_numbers(config: Any, prefix: str, **intervals: str) -> None:
    """Raises ValueError unless options lie in their intervals, such as ``steps="[1, 100]"``.

    A square bracket includes the bound, a round one leaves it out; NaN lies in no interval. Of a
    tuple every number must fit; ``None`` always does.

    Args:
        config: whose attributes the options are.
        prefix: of the message, before the name of the option.
    """
    for name, interval in intervals.items():
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            above = number > low or (number == low and interval[0] == "[")
            below = number < high or (number == high and interval[-1] == "]")
            if not (above and below):
                raise ValueError(f"{prefix}{name} is {shown(value)}, expected within {interval}")


def config_from_dict(config_class: type[Any], values: dict[str, Any], source: str) -> Any:
    """Builds a config dataclass, with lists as tuples and unknown names refused."""
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{source}: unknown option {shown(unknown[0])} for {config_class.__name__}, "
            f"known are {', '.join(sorted(known))}"
        )
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    hints = typing.get_type_hints(config_class)
    for option, value in frozen.items():
        if not _fits(value, hints[option]):
            expected = getattr(hints[option], "__name__", None)
            if typing.get_origin(hints[option]) is not None or expected is None:
                expected = str(hints[option]).replace("typing.", "")
            raise CheckpointError(f"{source}: {option} is {shown(value)}, expected {expected}")
    try:
        return config_class(**frozen)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, as read from JSON, may stand where ``hint`` is asked for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
