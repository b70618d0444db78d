"""Which implementation of each op runs where: the one door to devices.

`prepare` makes the `Kernels` of a target: a platform, its chip, and what the user asked for.
`kernels("product", x, w)` runs the first row of table.py that serves the platform, the dtype, the
mesh and the shapes. `kernels.device` says what else differs between platforms.

`prepare` compiles the C++ kernels before anything is traced. While a program is traced nothing is
asked of the process, except whether a mesh of several devices is in use: some kernels run on one
device.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import table, verdicts
from dsv3_jax.kernels.table import DEVICES, IN_FLOAT32, PLATFORMS, Device, Implementation


@dataclass(frozen=True)
class Target:
    """The platform that a program is compiled for, and its kernels.

    Raises: ConfigError for an unknown platform or kernel.

    Example:
        >>> Target("cpu", "auto,product=xla").forced("product").name
        'xla'
    """

    platform: str  # of the devices that the program is compiled for: one of PLATFORMS
    kernels: str = "auto"  # Execution.kernels
    # a GPU's compute capability, such as "9.0"; a TPU's kind, such as "TPU v5p"; "" if not known
    chip: str = ""
    precision: str = "none"  # Execution.precision

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ConfigError(f"platform={self.platform!r} is not one of {', '.join(PLATFORMS)}")
        base, by_op = self.asked
        names = {op: dict.fromkeys(row.name for row in rows) for op, rows in table.TABLE.items()}

        # The name for all ops.
        known = {"auto"}.union(*names.values())
        if base not in known:
            raise ConfigError(f"kernels={base!r} is not one of {', '.join(sorted(known))}")

        # The names for single ops.
        for op, name in by_op.items():
            if op not in names:
                reason = f"{op!r} is not one of the ops {', '.join(names)}"
                raise ConfigError(f"kernels={op}={name}: {reason}")
            if name not in names[op]:
                reason = f"{name!r} is not one of {', '.join(names[op])}"
                raise ConfigError(f"kernels={op}={name}: {reason}")

    @property
    def asked(self) -> tuple[str, dict[str, str]]:
        """(The name for all ops, the names for single ones)."""
        words = self.kernels.split(",")
        base = "auto" if "=" in words[0] else words.pop(0)
        return base, dict(word.split("=") for word in words)

    def name_of(self, op: str) -> str:
        """The row of an op asked for by name; "" if the choice is free or there is none."""
        base, by_op = self.asked
        name = by_op.get(op) or ("" if base == "xla" else base)
        return name if any(row.name == name for row in table.TABLE[op]) else ""

    def here(self, op: str) -> list[Implementation]:
        """The rows of an op for the platform and the precision, or without one if it has none."""
        of_op = table.TABLE[op]
        precisions = {row.precision for row in of_op}
        precision = self.precision if self.precision in precisions else "none"
        rows = (row for row in of_op if self.platform in row.platforms)
        return [row for row in rows if row.precision == precision]

    def forced(self, op: str) -> Implementation | None:
        """The row of `here` that is asked for by name; None if the choice is free."""
        return next((row for row in self.here(op) if row.name == self.name_of(op)), None)

    def rows(self, op: str) -> list[Implementation]:
        """The rows of an op that may run, in order: to the first that serves everything."""
        rows = self.here(op)
        # "xla" leaves out what is written by hand.
        if self.asked[0] == "xla" and not self.name_of(op):
            rows = [row for row in rows if not row.dtypes]

        # The first row without conditions always runs, so those after it never do.
        last = next(i for i, row in enumerate(rows) if not (row.dtypes or row.fits or row.why_not))
        forced = self.forced(op)
        others = [row for row in rows[: last + 1] if row is not forced]
        return others if forced is None else [forced, *others]


@dataclass(frozen=True)
class Kernels:
    """The ops of a target. Call it with an op of TABLE and the op's own arguments, see `ops/`.

    Hashable, so modules hold it as a static value. Made by `prepare`.

    Example:
        >>> Kernels(Target("cpu", "xla"))("product", jnp.ones(2), jnp.ones(2)).item()
        2.0
    """

    target: Target
    missing: tuple[tuple[str, str], ...] = ()  # (implementation, why it cannot run here)
    # (`Implementation.of`, what `dsv3 info --check` found wrong on this chip)
    wrong: tuple[tuple[str, str], ...] = ()

    def __call__(self, op: str, *args: Any, **settings: Any) -> Any:
        return self.pick(op, *args, **settings).run(*args, **settings)

    def pick(self, op: str, *args: Any, **settings: Any) -> Implementation:
        """The row that runs an op for these arguments.

        Raises: ConfigError if a row was asked for by name and does not serve the dtype or the mesh.
        """
        dtype = jax.tree.leaves(args)[0].dtype.name
        mesh = jax.sharding.get_abstract_mesh()
        devices = 1 if mesh.empty else mesh.size

        # A row that was asked for by name says why it cannot run here. If only these arguments do
        # not fit it, the next row runs, as for all others.
        if self.target.forced(op) is not None:
            self._check(op, dtype, devices)

        for row in self._available(op):
            if row.serves(dtype, devices) and (row.fits is None or row.fits(*args, **settings)):
                return row
        raise AssertionError(f"{op} has no row that always fits")

    def _available(self, op: str) -> list[Implementation]:
        """The rows that can run. One that is wrong here runs only if named, or if no other can."""
        missing = dict(self.missing)
        wrong = dict(self.wrong)
        rows = [row for row in self.target.rows(op) if row.name not in missing]
        kept = (self.target.forced(op), rows[-1])
        return [row for row in rows if row.of(op) not in wrong or row in kept]

    def _check(self, op: str, dtype: str, devices: int) -> None:
        """Refuse a row that is asked for by name, where it cannot run."""
        target = self.target
        name = target.name_of(op)
        row = target.forced(op)
        if not name:
            return

        if row is None:
            rows = ", ".join(dict.fromkeys(row.name for row in target.here(op)))
            where = f"on {target.platform} in precision={target.precision!r}"
            reason = f"is not available {where}: {op} has {rows}"
        elif name in dict(self.missing):
            reason = f"is not available here: {dict(self.missing)[name]}"
        elif not row.serves(dtype, devices):
            reason = f"does not serve {op} in {dtype} with devices={devices}: it is {row.made_for}"
        else:
            return

        raise ConfigError(f"kernels={target.kernels!r} {reason}; use 'auto' or 'xla'")

    @property
    def in_compute_dtype(self) -> "Kernels":
        """The same without 8-bit products: for the output head, and for decoding."""
        return replace(self, target=replace(self.target, precision="none"))

    @property
    def device(self) -> Device:
        """What differs between platforms beside kernels."""
        return DEVICES[self.target.platform]

    def chosen(self, dtype: Any = "float32", devices: int = 1) -> dict[str, str]:
        """The implementation of each op for large arrays of a dtype on so many devices, by name.

        Example:
            >>> Kernels(Target("cpu", "xla")).chosen()["exact_product"]
            'xla'
        """
        names = {}
        for op in table.TABLE:
            used = "float32" if op in IN_FLOAT32 else jnp.dtype(dtype).name
            serving = (row for row in self._available(op) if row.serves(used, devices))
            names[op] = next(serving).name
        return names

    def describe(self, dtype: Any = "float32", devices: int = 1) -> str:
        """One short line on what runs; `dsv3 info PRESET --kernels` lists it by op.

        Example:
            >>> Kernels(Target("tpu", "xla"), (("tokamax", "it is not installed"),)).describe()
            'kernels for tpu: large_blocks, blocks, select, xla, ragged_dot, by_memory'
        """
        names = dict.fromkeys(self.chosen(dtype, devices).values())
        line = f"kernels for {self.target.platform}: {', '.join(names)}"

        wanted = {row.name for op in table.TABLE for row in self.target.rows(op)}
        lacking = [name for name, _ in self.missing if name in wanted]
        if lacking:
            line += f"; without {', '.join(lacking)}: see `dsv3 info tiny --kernels`"

        for name, reason in self.wrong:
            line += f"; not {name}, which is wrong here: {reason}"
        return line


def platform_of(mesh: Mesh | None = None) -> str:
    """The platform of a mesh's devices; None means JAX's default device.

    Example:
        >>> platform_of() in PLATFORMS
        True
    """
    return _platform_name(_device_of(mesh))


def _device_of(mesh: Mesh | None) -> Any:
    device = jax.config.jax_default_device if mesh is None else mesh.devices.flat[0]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device


def _chip_of(device: Any) -> str:
    """See `Target.chip`."""
    if device.platform == "gpu":
        return str(getattr(device, "compute_capability", ""))
    return device.device_kind if device.platform == "tpu" else ""


def _platform_name(device: Any) -> str:
    """JAX calls every GPU "gpu", and lowers for "cuda" or "rocm"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in getattr(device.client, "platform_version", "").lower() else "cuda"


def prepare(
    execution: Execution | None = None,
    *,
    platform: str | None = None,
    chip: str = "",
    mesh: Mesh | None = None,
) -> Kernels:
    """Choose a target's kernels; compile and load those in C++ it may use. Call before tracing.

    Args:
        execution: says which kernels are asked for. Default: "auto".
        platform, chip: what is compiled for, see `Target`. None means that of `mesh`, see
            `platform_of`.
    Raises: ConfigError for kernels that the target does not have, that do not serve the dtype or
        the mesh, or that cannot be compiled here.

    Example:
        >>> prepare(Execution(kernels="xla")).chosen()["exact_product"]
        'xla'
    """
    execution = execution or Execution()
    if platform is None:
        platform = platform_of(mesh)
        chip = _chip_of(_device_of(mesh))
    target = Target(platform, execution.kernels, chip, execution.precision)

    # What is missing here, once for each library, compiler or chip that a row needs.
    rows = (row for op in table.TABLE for row in target.rows(op))
    conditions = {row.name: row.why_not for row in rows if row.why_not is not None}
    reasons = {name: why_not(target) for name, why_not in conditions.items()}
    missing = tuple((name, reason) for name, reason in reasons.items() if reason)

    # A row that was asked for by name ends the command here, before a long start.
    kernels = Kernels(target, missing, tuple(verdicts.read(platform, chip).items()))
    for op in table.TABLE:
        dtype = "float32" if op in IN_FLOAT32 else execution.compute_dtype
        kernels._check(op, dtype, 1 if mesh is None else mesh.size)
    return kernels
