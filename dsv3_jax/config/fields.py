"""What all configurations share: one error, bounds beside each field, tables of names, plain JSON.

A configuration is a frozen dataclass that checks itself when it is made. The comment of a field is
also its help text on the command line.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar

V = TypeVar("V")

# The bounds of a field are part of its type. A number far above any model that was trained is a
# mistake, and would be allocated or counted to.
Positive = Annotated[int, "[1, 2147483648)"]
Natural = Annotated[int, "[0, 2147483648)"]
Seed = Annotated[int, "[0, 4294967295]"]  # JAX keeps 32 bits of a seed
PositiveReal = Annotated[float, "(0, 3.4e38)"]
NonNegative = Annotated[float, "[0, 3.4e38)"]
Share = Annotated[float, "[0, 1]"]


class ConfigError(ValueError):
    """An invalid configuration: its message is one sentence with the offending value.

    Example:
        >>> from dsv3_jax.config import DataConfig
        >>> DataConfig(seq_len=1)
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: seq_len=1 is outside [2, 2147483648)
    """


class Table(dict[str, V]):
    """Things by name, to which anyone may add: a name that it does not have raises ConfigError.

    Example:
        >>> Table("rule", {"sign": 1})["sing"]
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: rule='sing' is not one of sign; did you mean 'sign'?
    """

    def __init__(self, setting: str, rows: Mapping[str, V], more: str = ""):
        """Make a table. Args: more: a sentence for errors, on how it gets more rows."""
        super().__init__(rows)
        self.setting = setting
        self.more = f"; {more}" if more else ""
        self.kind = type(next(iter(rows.values())))

    def add(self, name: str, row: V) -> None:
        """Add a row. Raises: ConfigError if its name is taken or no text, or the row of no kind."""
        if not isinstance(name, str) or not name or name in self:
            raise ConfigError(
                f"{self.setting}={name!r} is taken or no name; the names are {', '.join(self)}"
            )
        if not isinstance(row, self.kind):
            raise ConfigError(f"{self.setting}={name!r}: {_short(row)} is no {self.kind.__name__}")
        self[name] = row

    def __missing__(self, name: str) -> V:
        near = did_you_mean(name, self)
        raise ConfigError(
            f"{self.setting}={_short(name)} is not one of {', '.join(self)}{near}{self.more}"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or nothing if none is near.

    Example:
        >>> did_you_mean("trian", ["train", "eval"])
        "; did you mean 'train'?"
    """
    near = get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def require(holds: bool, sentence: str) -> None:
    """Raise ConfigError with a sentence about a rule that does not hold."""
    if not holds:
        raise ConfigError(sentence)


# control codes; bytes of a name that are not UTF-8
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse values of another type or out of bounds, at once, where the key can still be named."""
    types = typing.get_type_hints(type(config))
    with_bounds = typing.get_type_hints(type(config), include_extras=True)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        hint = types[item.name]
        name = prefix + item.name

        # A float field accepts an int, and stores 1 as 1.0.
        if type(value) is int and hint in (float, float | None) and abs(value) < 2**127:
            value = float(value)
            object.__setattr__(config, item.name, value)
        require(_matches(value, hint), f"{name}={_short(value)} is not {_spell(hint)}")

        bounds = _bounds_of(with_bounds[item.name])
        if bounds is not None and value is not None:
            require(_inside(value, bounds), f"{name}={_short(value)} is outside {bounds}")

        # Texts are printed, and saved as UTF-8: no control codes, no lone surrogates.
        for text in value if type(value) is tuple else (value,):
            if type(text) is str and _CONTROL.search(text):
                raise ConfigError(f"{name}={_short(text)} holds a control character")


def _bounds_of(hint: Any) -> str | None:
    """The bounds of a type, or of the part of a union that has some.

    Example:
        >>> _bounds_of(Share | None)
        '[0, 1]'
    """
    if typing.get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    return next(filter(None, map(_bounds_of, typing.get_args(hint))), None)


def _inside(value: int | float, bounds: str) -> bool:
    low, high = (float(end) for end in bounds[1:-1].split(", "))
    # Intervals as in "[0, 1)": a square bracket includes its end.
    above = low <= value if bounds[0] == "[" else low < value
    below = value <= high if bounds[-1] == "]" else value < high
    return above and below


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Check the type of an argument, where a wrong one would fail far away.

    Raises: ConfigError naming the value.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> check_kind("cfg", 3, Layout)
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: cfg=3 is not of type Layout
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={_short(value)} is not {_spell(kind)}")


def check_inputs(width: int | None, **inputs: Any) -> None:
    """Check what a model or a layer is given.

    Args:
        width: of the first input, an array [B, T, width]; None if it is one of integers [B, T].
        inputs: the others are arrays of integers [B, T], or None.
    Raises: ValueError naming the input.

    Example:
        >>> import numpy as np
        >>> check_inputs(128, x=np.ones((2, 8)))
        Traceback (most recent call last):
            ...
        ValueError: x of shape (2, 8) is not an array [B, T, 128]
    """
    (name, x), *others = inputs.items()
    shape: Any = getattr(x, "shape", None)
    what = f"{name} of type {type(x).__name__}" if shape is None else f"{name} of shape {shape}"
    if width is not None and (shape is None or len(shape) != 3 or shape[-1] != width):
        raise ValueError(f"{what} is not an array [B, T, {width}]")
    if width is None and (shape is None or len(shape) != 2 or x.dtype.kind not in "iu"):
        raise ValueError(f"{what} is not an array [B, T] of integers")
    for other, ids in others:
        if ids is not None and getattr(ids, "shape", None) != shape[:2]:
            raise ValueError(f"{other} is not an array of shape {shape[:2]}, as {name} is")


def check_shapes(giver: str, arrays: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Check arrays that a program of one's own gives, before a kernel reads them by their shapes.

    Args:
        giver: what gives them, for the error.
        shapes: by name, the shape that each must have.
    Raises: ConfigError naming an array that is absent or of another shape.

    Example:
        >>> import numpy as np
        >>> check_shapes("attention='mine'", {"k": np.ones((2, 3))}, {"k": (2, 4)})
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: attention='mine' gives k of shape (2, 3), not (2, 4)
    """
    for name, wanted in shapes.items():
        shape = getattr(arrays.get(name), "shape", None)
        if shape is None:
            raise ConfigError(f"{giver} gives no array {name} of shape {tuple(wanted)}")
        if shape != tuple(wanted):
            raise ConfigError(f"{giver} gives {name} of shape {shape}, not {tuple(wanted)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, args[0]) for v in value)
    if args:  # a union
        return any(_matches(value, a) for a in args)

    # True is an instance of int, so plain types must be equal.
    return type(value) is hint if hint in (int, float, bool, str) else isinstance(value, hint)


def _spell(hint: Any) -> str:
    """What values of a type are, in words.

    Example:
        >>> _spell(int | None), _spell(Literal["on", "off"])
        ('of type int or None', "one of 'on', 'off'")
    """
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Literal:
        names = ", ".join(map(repr, args))
        return names if len(args) == 1 else f"one of {names}"
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_spell, args))
    if hint is NoneType:
        return "None"
    return f"of type {hint if args else getattr(hint, '__name__', hint)}"


def replace(config: V, /, **changes: Any) -> V:
    """Make a configuration that differs in some fields.

    Raises: ConfigError naming a field that it does not have, or a value that it refuses.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> replace(Layout(), fsdp=True).fsdp
        True
    """
    _check_names(type(config), changes)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _check_names(kind: type, names: Iterable[str]) -> None:
    known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{_short(name)} is not a key of {kind.__name__}{did_you_mean(name, known)}"
            )


def to_dict(config: Any) -> dict:
    """Turn a configuration into plain JSON values.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> to_dict(Layout())["capacity_slack"]
        1.25
    """
    return dataclasses.asdict(config)


def from_dict(kind: type[V], values: dict) -> V:
    """Make a configuration from plain JSON values: the inverse of `to_dict`.

    Raises: ConfigError naming a key that `kind` does not have, or a value that it refuses.

    Example:
        >>> from dsv3_jax.config import Layout
        >>> from_dict(Layout, {"fsdp": True}).fsdp
        True
    """
    _check_names(kind, values)
    hints = typing.get_type_hints(kind)

    # JSON has neither dataclasses nor tuples: objects and lists become them.
    made = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = from_dict(hints[key], value)
        made[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except TypeError as error:  # a key without a default is missing
        raise ConfigError(f"{kind.__name__}: {str(error).split('__init__() ')[-1]}") from error


def first_difference(a: dict, b: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """Find the first key by name whose values differ: (key, value in a, value in b).

    Example:
        >>> first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        ('b.c', 2, 3)
    """
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)

        # Objects are compared key by key, and values as JSON, where 1 is neither 1.0 nor true.
        if isinstance(x, dict) and isinstance(y, dict):
            inner = first_difference(x, y, f"{prefix}{key}.")
            if inner:
                return inner
        elif (key in a) != (key in b) or json.dumps(x) != json.dumps(y):
            return prefix + key, x, y
    return None
