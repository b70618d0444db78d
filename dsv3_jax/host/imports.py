"""Programs of the user's own, which register routers and more: imported only if named.

A run's folder keeps the names, for sentences alone. Nothing imports them from there: a folder may
be a stranger's.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from dsv3_jax.config import ConfigError
from dsv3_jax.host.signals import terminated

IMPORTED: list[str] = []  # names as the user gave them


def import_program(name: str) -> None:
    """Import a program of the user's own, once. It should make no array: devices are chosen later.

    Args: name: a Python file if it ends in .py, else a module on Python's path or in the current
        folder.
    Raises: ConfigError if it cannot be imported, or a file has the name of another module.

    Example:
        >>> import_program("my_router")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: import='my_router' fails with ModuleNotFoundError: ...
    """
    try:
        if name.endswith(".py"):
            _import_file(Path(name).resolve(), name)
        else:
            module_here(name)
    except ConfigError:
        raise
    except BaseException as error:
        raise ConfigError(f"import={name!r} fails with {failure_of(error)}") from error
    if name not in IMPORTED:
        IMPORTED.append(name)


def module_here(name: str) -> ModuleType:
    """Import a module on Python's path or in the current folder.

    Example:
        >>> module_here("json").__name__
        'json'
    """
    if os.getcwd() not in sys.path:  # the command has its own folder there in place of the user's
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def failure_of(error: BaseException) -> str:
    """Describe how a program of the user's own failed, which may be by `sys.exit`.

    Ctrl-C and SIGTERM are raised.

    Example:
        >>> failure_of(ValueError("no task"))
        'ValueError: no task'
    """
    if isinstance(error, KeyboardInterrupt) or terminated.is_set():
        raise error
    # Its `str` may fail. So may the name of its module, if its class was made without one.
    try:
        text = "".join(traceback.format_exception_only(error))
    except Exception:
        text = type(error).__name__
    return " ".join(text.split())


def _import_file(path: Path, name: str) -> None:
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) != str(path):
            raise ConfigError(
                f"import={name!r} has the name of the module {path.stem!r}; rename it"
            )
        return

    # As `import` does: the module is in sys.modules while it runs, and leaves if it fails.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
