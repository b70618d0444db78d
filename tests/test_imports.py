"""Imports go down the house's floors, never up; and importing the package does nothing else."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import jedi
import pytest

import dsv3_jax
from dsv3_jax.cli.main import COMMANDS

ROOT = Path(dsv3_jax.__file__).parent
# From the ground up. Folders and files import those below their own floor; a new one needs a place
# here.
FLOORS = """config < ops < kernels < mesh < model < host presets reference < data < chat
    < decoding report training < hf < planning runs < scores serve stats < cli
    < __init__ __main__"""
# Folder or file → what it may import of the package, where its floor would let it import more.
MAY_IMPORT = {
    "reference": {"config"},
    "host": {"config"},
    "data": {"config", "host"},
    "chat": {"config", "host", "data"},
    "decoding": {"config", "ops", "kernels", "mesh", "model"},
    "training": {"config", "ops", "kernels", "mesh", "model"},
    "hf": {"config", "host", "kernels", "mesh", "model", "report"},
    "scores": {"config", "host", "model", "data", "chat", "decoding", "report"},
    "serve": {"config", "host", "ops", "mesh", "model", "data", "chat", "decoding", "report"},
}
# Folder or file → other projects that it may not import; "" is all of them.
NO_PROJECT = {
    "": {"torch", "transformers", "tensorflow", "tests", "pytest"},
    "ops": {"flax", "optax", "orbax", "grain", "os", "pathlib", "io"},
    "config": {"jax", "flax", "numpy"},
    "presets": {"jax", "flax", "numpy"},
    "reference": {"jax", "flax"},
    "training": {"orbax", "os", "pathlib", "io"},
}
SERVERS = {"starlette", "uvicorn"}
FLOOR = {name: height for height, floor in enumerate(FLOORS.split("<")) for name in floor.split()}


def name_of(path):
    """`ops.rope` of …/ops/rope.py, `ops` of its __init__.py; the package's own is `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "__init__" else ".".join(parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports_of(name, at_once=False):
    """Full names of all that a module imports, or only of what it imports outside functions.

    `from a import b` is a.b where that is a module.
    """
    tree = TREES[name]
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("dsv3_jax.") in MODULES else node.module


def room_of(name):
    return name.split(".")[0]


# Module → what it imports of the package, by the names of MODULES.
OWN = {
    name: {
        "__init__" if other == "dsv3_jax" else other.removeprefix("dsv3_jax.")
        for other in imports_of(name)
        if room_of(other) == "dsv3_jax"
    }
    for name in MODULES
}


def test_imports_go_down():
    for name, others in OWN.items():
        room = room_of(name)
        assert room in FLOOR, f"{name} has no place in FLOORS"
        assert others <= MODULES.keys(), f"{name} imports {others - MODULES.keys()}"
        rooms = set(map(room_of, others)) - {room}
        above = [other for other in rooms if FLOOR[other] >= FLOOR[room]]
        assert not above, f"{name} imports {above} from above"
        assert rooms <= MAY_IMPORT.get(room, rooms), f"{name} imports {rooms - MAY_IMPORT[room]}"
        assert room == "cli" or "cli" not in rooms, name
    assert "ops.dispatch" in OWN["model.moe"]  # the parser sees imports


def test_other_projects_are_imported_where_they_belong():
    for name in MODULES:
        roots = set(map(room_of, imports_of(name)))
        for room in ("", room_of(name)):
            assert not roots & NO_PROJECT.get(room, set()), f"{name} imports {roots}"
        # `dsv3 serve` needs two packages that nothing else does.
        assert room_of(name) == "serve" or name == "cli.serve" or not roots & SERVERS, name


def test_commands_import_slow_modules_when_they_run():
    """`--help` and bad input are then answered before Orbax and Matplotlib are imported.

    So do the files that a command imports at once.
    """
    of_cli = [name for name in MODULES if name.startswith("cli.")]
    at_once = {other for name in of_cli for other in imports_of(name, at_once=True)}
    for name in of_cli:
        if name.removeprefix("cli.") in COMMANDS or f"dsv3_jax.{name}" in at_once:
            ours = [other for other in imports_of(name, at_once=True) if "dsv3_jax." in other]
            late = {"runs", "training", "stats", "hf", "planning", "mesh", "kernels", "serve"}
            assert not {other.split(".")[1] for other in ours} & late, name


ASKS = r"default_backend|os\.environ|ffi_call|jax\.devices\(|\bplatform\b|subprocess|compiler"


def test_the_mathematics_asks_for_no_platform_environment_or_compiler():
    for name, path in MODULES.items():
        if room_of(name) in ("ops", "model", "reference"):
            code = re.sub(r'"""(?:.|\n)*?"""|#.*', "", path.read_text())
            assert not re.search(ASKS, code), name


def test_no_import_runs_in_a_circle():
    TopologicalSorter(OWN).prepare()  # raises CycleError


def test_nothing_turns_off_what_jax_checks_of_collectives():
    """With these `shard_map` loses what differs along an axis; a gradient may be wrong in silence.

    One place may: it calls kernels that JAX cannot check, without collectives.
    """
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree)]
    keywords = [(name, node.arg) for name, node in nodes if isinstance(node, ast.keyword)]
    unchecked = [use for use in keywords if use[1] in ("check_vma", "check_rep")]
    assert unchecked == [("mesh.sharding", "check_vma")]


LOOK = """
import importlib, sys
import jax
before = dict(jax.config.values)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert before.items() <= dict(jax.config.values).items()
assert not {"torch", "transformers"} & set(sys.modules)
jax.config.update("jax_num_cpu_devices", 3)  # refused once devices were touched
"""


@pytest.mark.long
def test_importing_changes_no_setting_and_touches_no_device():
    names = [f"dsv3_jax.{name}" for name in MODULES if not name.endswith(("__init__", "__main__"))]
    command = [sys.executable, "-W", "error", "-c", LOOK, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_editor_completes_the_names_and_their_arguments():
    """Those that are imported when they are first used, too."""

    def asked(line):
        return jedi.Script(f"import dsv3_jax as ds\n{line}", project=jedi.Project(ROOT.parent))

    assert set(dsv3_jax.__all__) - {"__version__"} <= {c.name for c in asked("ds.").complete()}
    for call, argument in {
        "ds.train.fit(": "stop_after",
        "ds.load_model(": "folder",
        "ds.hf.load(": "packed",
        "ds.register_router(": "row",
        "ds.score_tasks(": "shots",
        "ds.balance.update(": "model",
    }.items():
        (signature,) = asked(call).get_signatures()
        assert argument in [p.name for p in signature.params], (call, signature)
