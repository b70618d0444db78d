"""How good an answer is: checkers of texts, by name or as a function of the user's.

A checker is a function (text, row) → reward: a number, or True for 1 and False for 0. The row is
the task's record, whose "answer" is a text.
A new one by name is a row of `CHECKERS`.
"""

import contextlib
import copy
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError, Table
from dsv3_jax.host.imports import failure_of, module_here
from dsv3_jax.host.signals import cpu_limit

# of CPU for one answer: a pattern may take time that is exponential in the text's length
MAX_SECONDS = 10.0
MAX_REWARD = 1e30  # whose square is finite, as a group's deviation needs
_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9][0-9,]*(?:\.[0-9]+)?")


class TooLong(Exception):
    """A checker runs too long."""


def _late(*_: Any) -> None:
    raise TooLong(f"it takes more than {MAX_SECONDS:g} seconds")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None. Commas are those of thousands.

    Example:
        >>> last_number("5-3 is 2, so 1,002.50"), last_number("-7"), last_number("none")
        (Decimal('1002.50'), Decimal('-7'), None)
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _needs_number(answer: str) -> None:
    if last_number(answer) is None:
        raise ValueError("it holds no number")


def _number(reward: Any) -> float:
    """A reward as a float. Raises: TypeError for what is no finite number."""
    array = np.asarray(reward)  # it may be of any library
    if array.shape or array.dtype.kind not in "biuf" or not abs(float(array)) <= MAX_REWARD:
        raise TypeError(f"it returns {reward!r:.60}, not a number up to {MAX_REWARD:g}")
    return float(array)


_Pair = tuple[Callable[[str, dict[str, Any]], Any], Callable[[str], Any]]
CHECKERS: Table[_Pair] = Table("grpo checker", {
    # name: the checker; what raises ValueError or re.error for an answer that it cannot use
    "exact": (lambda text, row: text.strip() == row["answer"].strip(), str),
    "number": (lambda text, row: last_number(text) == last_number(row["answer"]), _needs_number),
    "regex": (lambda text, row: re.search(row["answer"], text) is not None, re.compile),
})  # fmt: skip


@dataclass(frozen=True)
class Checker:
    """A checker by its name, which its errors name.

    Raises: ConfigError for an unknown name, or a function that cannot be imported.

    Example:
        >>> Checker("number").check("It is 4.", {"answer": "4.0"}, "line 1")
        1.0
    """

    name: str

    def __post_init__(self) -> None:
        self._pair()

    def _pair(self) -> _Pair:
        module, colon, name = self.name.partition(":")
        if not colon:
            return CHECKERS[self.name]

        # The user's module may fail in any way while it is imported.
        try:
            function = getattr(module_here(module), name)
        except BaseException as error:
            raise ConfigError(
                f"grpo checker={self.name!r} cannot be imported: {failure_of(error)}"
            ) from error
        if not callable(function):
            raise ConfigError(f"grpo checker={self.name!r} is no function (text, row) → number")
        return function, str

    @property
    def is_own(self) -> bool:
        """Whether it is a function of the user's, which may read any key of a row."""
        return ":" in self.name

    def fingerprint(self) -> str:
        """A hash of the source of the user's module; "" for `CHECKERS`, or without source."""
        module, colon, _ = self.name.partition(":")
        with contextlib.suppress(OSError, TypeError):
            source = inspect.getsource(module_here(module)) if colon else ""
            return source and hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
        return ""

    def look_at(self, row: dict[str, Any], location: str) -> None:
        """Look at a task before the first step.

        Raises: ValueError that names the line of one that cannot be used.
        """
        answer = row.get("answer")
        if not isinstance(answer, str):
            raise ValueError(
                f"{location} has answer={answer!r:.60}, not a text for grpo checker={self.name!r}"
            )

        # Each checker has a condition: number needs a number, regex a valid pattern.
        try:
            self._pair()[1](answer)
        except (ValueError, re.error) as error:
            raise ValueError(
                f"{location}: answer={answer!r:.60} does not fit {self.name!r}: {error}"
            ) from error

    def check(self, text: str, row: dict[str, Any], location: str) -> float:
        """The reward of a text.

        Raises: ValueError if the checker fails, however, or returns no number.
        """
        function, _ = self._pair()
        try:
            # A copy of the row: what the checker does to it must not change the task.
            with cpu_limit(MAX_SECONDS, _late):
                reward = _number(function(text, copy.deepcopy(row)))

            if getattr(sys.stdout, "closed", False):
                sys.stdout = open(os.devnull, "w")  # for the sentences that follow
                raise ValueError("it closes stdout")
        except BaseException as error:
            raise ValueError(
                f"grpo checker={self.name!r} fails at {location} with {failure_of(error)}"
            ) from error
        return reward
