"""Tasks that isolate one mechanism each, for studies that text cannot answer at a small size."""

from typing import Any

from experiments.lab.tasks.chains import Chains
from experiments.lab.tasks.domains import Domains, ShiftingDomains
from experiments.lab.tasks.facts import Facts
from experiments.lab.tasks.many_keys import ManyKeys
from experiments.lab.tasks.names import Names
from experiments.lab.tasks.retrieval import Retrieval
from experiments.lab.tasks.task import Task, TaskSource
from experiments.lab.tasks.two_hops import TwoHops

_KINDS = (Facts, TwoHops, Retrieval, ManyKeys, Names, Domains, ShiftingDomains, Chains)
TASKS: dict[str, Any] = {cls.name: cls for cls in _KINDS}

__all__ = [
    "TASKS",
    "Chains",
    "Domains",
    "Facts",
    "ManyKeys",
    "Names",
    "Retrieval",
    "ShiftingDomains",
    "Task",
    "TaskSource",
    "TwoHops",
    "from_dict",
]


def from_dict(values: dict[str, Any]) -> Task:
    """Return the task that `Task.to_dict` wrote.

    >>> from_dict(Facts(bits=4).to_dict()) == Facts(bits=4)
    True
    """
    fields = dict(values)
    return TASKS[fields.pop("task")](**fields)
