"""Imports go down the house's floors, never up; and importing the package does nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_jax

ROOT = Path(dsv3_jax.__file__).parent
# From the ground up. A folder or file may import its own floor and those below; a new one must be given its place here.
FLOORS = [
    {"config"},
    {"files", "lock", "presets", "reference", "signals"},
    {"ops"},
    {"kernels"},
    {"mesh"},
    {"model"},
    {"data"},
    {"chat"},
    {"cluster", "decoding", "report", "training"},
    {"hf", "planning", "stats"},
    {"train"},
    {"cli"},
    {"__init__", "__main__"},
]
# Folder or file → the parts of the package that it may import, beside itself. FLOORS has the other folders.
MAY_IMPORT = {
    "config": set(),
    "reference": {"config"},
    "ops": {"config"},
    "kernels": {"config", "ops"},
    "mesh": {"config", "ops", "kernels"},
    "model": {"config", "ops", "kernels", "mesh"},
    "data": {"config", "files", "lock"},
    "chat": {"config", "files", "data"},
    "decoding": {"config", "ops", "kernels", "mesh", "model"},
}
FLOOR = {name: height for height, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(path for path in ROOT.rglob("*.py"))


def name_of(path):
    """`ops.rope` of …/ops/rope.py, `ops` of its __init__.py; the package's own is `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "__init__" else ".".join(parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path, at_once=False):
    """Full names of all that a file imports, or only of what it imports at once, outside functions.

    `from a import b` is a.b where that is a module.
    """
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("dsv3_jax.") in MODULES else node.module


def own_imports(path):
    """Those of the package, by the names of MODULES."""
    for name in imports_of(path):
        if name.split(".")[0] == "dsv3_jax":
            yield "__init__" if name == "dsv3_jax" else name.removeprefix("dsv3_jax.")


def floor_of(name):
    return FLOOR[name.split(".")[0]]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    assert name.split(".")[0] in FLOOR, f"{name} has no place in FLOORS"
    for other in own_imports(MODULES[name]):
        assert other in MODULES, f"{name} imports {other}, which is no module"
        assert floor_of(other) <= floor_of(name), f"{name} imports {other} from a floor above"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in MAY_IMPORT])
def test_the_core_imports_its_neighbours_only(name):
    room = name.split(".")[0]
    others = {other.split(".")[0] for other in own_imports(MODULES[name])} - {room}
    assert others <= MAY_IMPORT[room], f"{name} imports {others - MAY_IMPORT[room]}"


@pytest.mark.parametrize("name", MODULES)
def test_training_and_decoding_do_not_know_each_other_and_nothing_knows_the_command_line(name):
    others = {other.split(".")[0] for other in own_imports(MODULES[name])}
    room = name.split(".")[0]
    assert not (room == "training" and "decoding" in others) and not (room == "decoding" and "training" in others)
    assert room == "cli" or "cli" not in others


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("cli.")])
def test_commands_import_slow_modules_when_they_run(name):
    """`--help` and bad input are then answered before Orbax, Grain and Matplotlib are imported."""
    folders = {other.split(".")[1] for other in imports_of(MODULES[name], at_once=True) if "dsv3_jax." in other}
    assert not folders & {"train", "training", "stats", "hf", "planning", "mesh", "kernels"}


ASKS = r"default_backend|os\.environ|ffi_call|jax\.devices\(|\bplatform\b|subprocess|compiler"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in ("ops", "model", "reference")])
def test_the_mathematics_asks_for_no_platform_environment_or_compiler(name):
    code = "\n".join(line.split("#")[0] for line in MODULES[name].read_text().splitlines())
    code = re.sub(r'"""(?:.|\n)*?"""', "", code)
    assert not re.search(ASKS, code), re.search(ASKS, code)


def test_no_import_runs_in_a_circle():
    below = {name: set(own_imports(path)) for name, path in MODULES.items()}
    while below:
        free = [name for name, others in below.items() if not others & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]


def test_no_folders_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        room = name.split(".")[0]
        below.setdefault(room, set()).update({other.split(".")[0] for other in own_imports(path)} - {room})
    while free := [room for room, others in below.items() if not others & below.keys()]:
        for room in free:
            del below[room]
    assert not below, f"a circle among {sorted(below)}"


def test_the_parser_sees_what_there_is():
    """Else the tests above would hold of an empty list."""
    assert "ops.dispatch" in set(own_imports(MODULES["model.moe"]))
    assert "config" in set(own_imports(MODULES["presets"]))


def roots(name):
    return {imported.split(".")[0] for imported in imports_of(MODULES[name])}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_needs_another_framework(name):
    assert not roots(name) & {"torch", "transformers", "tensorflow", "tests", "pytest"}


def test_the_reference_page_needs_configurations_and_arrays_alone():
    assert set(own_imports(MODULES["reference"])) == {"config"}
    assert roots("reference") == {"dsv3_jax", "jaxtyping", "numpy", "typing"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("ops")])
def test_ops_know_arrays_alone(name):
    assert not roots(name) & {"flax", "optax", "orbax", "grain", "os", "pathlib", "io"}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_turns_off_what_jax_checks_of_collectives(name):
    """With these `shard_map` no longer knows what differs along an axis, and a gradient may be wrong in silence.

    One function may: it calls kernels that JAX cannot check, without collectives.
    """
    tree = ast.parse(MODULES[name].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions if name == "mesh.sharding" else ():
        if function.name == "shard_map_by_names":
            function.body = []
    found = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not {"check_vma", "check_rep"} & found


@pytest.mark.parametrize("name", ["config", "presets"])
def test_configurations_need_no_jax(name):
    assert not roots(name) & {"jax", "flax", "numpy"}


LOOK = """
import importlib, sys
import jax
before = dict(jax.config.values)
for name in sys.argv[1:]:
    importlib.import_module(name)
changed = {key: value for key, value in jax.config.values.items() if before.get(key, value) != value}
assert not changed, changed
foreign = {"torch", "transformers"} & set(sys.modules)
assert not foreign, foreign
jax.config.update("jax_num_cpu_devices", 3)  # refused once devices were touched
assert jax.device_count() == 3
"""


def test_importing_changes_no_setting_and_touches_no_device():
    names = [f"dsv3_jax.{name}" for name in MODULES if not name.endswith(("__init__", "__main__"))]
    done = subprocess.run([sys.executable, "-W", "error", "-c", LOOK, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
