"""Parametrized cases, of which some run with the long tests alone."""

from collections.abc import Iterable, Mapping

import pytest


def some_long(cases: Mapping[str, tuple] | Iterable[str], *short: str) -> list:
    """Make parameters of named cases: those that `short` names run in `make test` too."""
    named = cases if isinstance(cases, Mapping) else {name: (name,) for name in cases}
    assert named.keys() >= set(short)
    return [
        pytest.param(*values, id=name, marks=() if name in short else pytest.mark.long)
        for name, values in named.items()
    ]
