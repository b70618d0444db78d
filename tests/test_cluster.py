"""Two real processes over the loopback address train what one trains, and neither outlives the other in silence."""

import contextlib
import re
import signal
import socket
import subprocess
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import MODEL, assert_bitwise, cheap_compiles, flags, fresh_state, make_run, rows_of, start, write_text

from dsv3_jax.cluster import processes, supervisor
from dsv3_jax.config import ConfigError, Layout, OptimConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.long

MESH = "data=2"  # a device a process, which holds half of the batch
FSDP = ("--model.layout.fsdp",)  # and half of the weights
EXPERTS = "expert=2"  # or half of the experts, and the tokens travel:
ROUNDS = ("--model.layout.exchange", "all_to_all", "--model.layout.slack", "1")


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles(root):
        yield root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """eps: AdamW then does not turn the rounding of gradients near 0 into whole steps of either sign."""
    text = write_text(tmp_path_factory.mktemp("text"))
    model = replace(MODEL, num_layers=1, mtp_depth=0)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1)
    return make_run(text, model=model, optim=optim, steps=24, eval_every=12, save_every=1)


@pytest.fixture(autouse=True)
def _no_seconds_spent_on_the_rest(monkeypatch):
    monkeypatch.setattr(loop, "gemm_flops", lambda dtype: 1e9)
    monkeypatch.setattr(loop, "_draw", lambda *_: None)
    monkeypatch.setattr(loop, "_order2", lambda *_: 0.0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


DSV3 = ("-m", "dsv3_jax.cli")


@contextlib.contextmanager
def pair(root, out, run, *, mesh=(MESH, MESH), more=((), ()), programs=(DSV3, DSV3)):
    """`dsv3 train` twice, as the two processes of a cluster."""
    where = f"127.0.0.1:{free_port()}"
    both = []
    for i in range(2):
        words = ["--out", str(out), "--mesh", mesh[i], "--cluster", where, "--processes", "2", "--process-id", str(i)]
        both.append(start(["train", "tiny", *words, *flags(run), *more[i]], root, programs[i]))
    try:
        yield both
    finally:
        for process in both:
            with process:  # closes its pipes
                process.kill()


def ends(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the lines on stderr."""
    said, errors = process.communicate(timeout=100)
    return process.returncode, said, errors.splitlines()


def wait_for_step(folder, step: int, process) -> None:
    end = time.monotonic() + 100
    while not any(p.name.isdigit() and int(p.name) >= step for p in folder.glob("checkpoints/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def resumed_from(said: str) -> int:
    return int(re.search(r"resumed from the checkpoint of step (\d+)", said)[1])


def test_two_processes_are_one_whoever_is_lost(run, root, tmp_path):
    """One process, then two of which one is killed, the other one, two that are asked to stop, and one again.

    Each time the checkpoint of another mesh is gone on from, and the last two processes hold the same rows.
    """
    folder = tmp_path / "run"
    loop.fit(run, folder, stop_after=2, quiet=True)
    saved = 2
    for victim, mesh, layout in ((0, MESH, FSDP), (1, EXPERTS, ROUNDS)):
        with pair(root, folder, run, mesh=(mesh, mesh), more=(layout, layout)) as both:
            wait_for_step(folder, saved + 2, both[1 - victim])
            both[victim].kill()
            killed = time.monotonic()
            code, said, errors = ends(both[1 - victim])
            assert time.monotonic() - killed < 60
            assert (code, errors) == (supervisor.LOST, [f"dsv3: {supervisor.is_lost(victim)}"])
            assert resumed_from(said if victim else ends(both[0])[1]) == saved
        with Checkpoints(folder, run, read_only=True) as checkpoints:
            saved = checkpoints.latest
    with pair(root, folder, run, mesh=("tensor=2", "tensor=2")) as both:
        wait_for_step(folder, saved + 2, both[0])
        both[1].send_signal(signal.SIGTERM)
        (code, said, errors), (other_code, *other) = ends(both[0]), ends(both[1])
        assert (code, errors, other_code, other) == (0, [], 0, ["", []])  # process 0 alone prints
        assert resumed_from(said) == saved
        stopped = int(re.search(r"stopped and saved at step (\d+)", said)[1])
        assert saved + 2 <= stopped < run.steps
    assert loop.fit(run, folder, quiet=True).resumed_from == stopped
    loop.fit(run, tmp_path / "alone", quiet=True)
    (state, place), (want, want_place) = last_checkpoint(run, folder), last_checkpoint(run, tmp_path / "alone")
    assert place == want_place
    assert_bitwise(state.bias, want.bias)  # every count of every step was the same
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    rows, want_rows = rows_of(folder), rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [row["step"] for row in want_rows]
    assert any("crossed" in row for row in rows)
    for row, want_row in zip(rows, want_rows, strict=True):
        assert row.keys() - {"crossed", "wire_bytes"} == want_row.keys()
        for name in want_row.keys() - {"bits_per_byte_by_domain", "mtp_acceptance"}:
            np.testing.assert_allclose(row[name], want_row[name], rtol=1e-5, err_msg=name)


def last_checkpoint(run, folder):
    with Checkpoints(folder, run) as checkpoints:
        return checkpoints.restore()


# `dsv3`, whose worker does something else when it is to save step 2.
FAILING = """
import sys
from dsv3_jax.cli import main as cli
cli.WORKER = '''
import os, signal, sys
from dsv3_jax.training.checkpoint import Checkpoints
save = Checkpoints.save
def fail(self, state, *rest, **more):
    if int(state.step) == 2:
        {}
    save(self, state, *rest, **more)
Checkpoints.save = fail
''' + cli.WORKER
sys.exit(cli.main(sys.argv[1:]))
"""
OWN_WORDS = "dsv3: process {} of the run ended with an error, which its own output names"


@pytest.mark.parametrize("victim, what, code, last_words, others_code", [
    (0, "raise RuntimeError('broken')", 1, "RuntimeError: broken", 1),
    (1, "os.kill(os.getpid(), signal.SIGKILL)", 137, "dsv3: training was ended by SIGKILL", supervisor.LOST),
])  # fmt: skip
def test_a_worker_that_fails_ends_all(run, root, tmp_path, victim, what, code, last_words, others_code):
    """The others wait for it in a collective. What would fail again must not look as if it were worth a new start."""
    programs = [DSV3, DSV3]
    programs[victim] = ("-c", FAILING.format(what))
    with pair(root, tmp_path / "run", run, programs=programs) as both:
        found = ends(both[victim])  # within 100 s of its start: JAX waits for its peers at an exit for longer
        ended = time.monotonic()
        other = ends(both[1 - victim])
        assert time.monotonic() - ended < 45
    assert (found[0], found[2][-1]) == (code, last_words)
    assert code == 1 or len(found[2]) == 1  # an error that nobody foresaw shows where it was met
    assert (other[0], other[2]) == (others_code, [OWN_WORDS.format(victim)])


def test_processes_that_mean_different_runs_end_at_once(run, root, tmp_path):
    """Though one of them means what its mesh cannot cut: it must not end alone."""
    with pair(root, tmp_path / "run", run, more=((), ("--data.batch-size", "3"))) as both:
        for process in both:
            code, said, errors = ends(process)
            sentence = "dsv3: process 1 of 2 disagree with process 0: run.data.batch_size is 3, not 4"
            assert (code, said, errors) == (2, "", [sentence])
    assert not (tmp_path / "run").exists()


def test_meshes_that_differ_are_found_though_devices_do(run, root, tmp_path):
    with pair(root, tmp_path / "run", run, mesh=("data=2", "data=4")) as both:
        for process in both:
            code, said, errors = ends(process)
            sentence = "dsv3: process 1 of 2 disagree with process 0: mesh.data is 4, not 2"
            assert (code, said, errors) == (2, "", [sentence])
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_refused_by_all(run, root, tmp_path):
    (tmp_path / "notes").write_text("not a run")
    with pair(root, tmp_path, run) as both:
        for process in both:
            code, said, errors = ends(process)
            assert (code, said, len(errors)) == (2, "", 1) and "holds other files and no run.json" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("process_id, sentence", [
    (0, "process 0 of 2 did not meet the others at {} within 2 seconds: not all of them came"),
    (1, "process 0 cannot be reached at {} within 2 seconds: [Errno 111] Connection refused"),
])  # fmt: skip
def test_a_process_alone_waits_no_longer_than_it_should(run, root, tmp_path, process_id, sentence):
    where = f"127.0.0.1:{free_port()}"
    words = ["--cluster", where, "--processes", "2", "--process-id", str(process_id), "--cluster-timeout", "2"]
    began = time.monotonic()
    with start(["train", "tiny", "--out", str(tmp_path / "run"), *words, *flags(run)], root) as process:
        code, said, errors = ends(process)
    assert (code, said, errors) == (2, "", ["dsv3: " + sentence.format(where)])
    assert time.monotonic() - began < 2 + 10  # the interpreter's start, on a busy machine
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, sentence", [
    (("host0",), "cluster='host0' is neither auto nor of the form HOST:PORT"),
    (("host0:x", 2, 0), "cluster='host0:x' is neither auto nor of the form HOST:PORT"),
    (("host0:70000", 2, 0), "cluster='host0:70000' has a port outside 1 … 65535"),
    (("host0:1234",), "cluster='host0:1234' needs processes and process_id, too"),
    (("host0:1234", 2), "processes=2 is given without process_id"),
    (("auto", None, 1), "process_id=1 is given without processes"),
    (("auto", 0, 0), "processes=0 is below 1"),
    (("auto", 2, 2), "process_id=2 is outside 0 … 1"),
    (("auto", 2, -1), "process_id=-1 is outside 0 … 1"),
    (("auto", 2, 1, 0), "cluster_timeout=0 is below 1 second"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        supervisor.Cluster(*settings)


def test_addresses_are_read():
    assert [(c.host, c.port) for c in map(lambda a: supervisor.Cluster(a, 2, 0), ("h-0.net:12", "[::1]:34"))] == [
        ("h-0.net", 12),
        ("::1", 34),
    ]
    assert supervisor.Cluster("auto").host is None


def test_a_checkpoint_is_of_no_mesh(run, tmp_path):
    """Saved where "data" and "expert" cut it, restored whole, on one device, and cut eight ways: the same bits."""
    cut = replace(run, model=replace(run.model, layout=Layout(fsdp=True)))
    state, place = fresh_state(run, step=3), {"piece": 5, "offset": 7}
    mesh = sharding.make_mesh(2, 4, 1)
    with Checkpoints(tmp_path, cut) as checkpoints:
        where = sharding.state_sharding(state, mesh, fsdp=True)
        checkpoints.save(jax.device_put(state, where), place, wait=True)
    for sizes in (None, (1, 1, 1), (8, 1, 1), (1, 4, 2)):
        mesh = sizes and sharding.make_mesh(*sizes)
        with Checkpoints(tmp_path, cut) as checkpoints:
            found, found_place = checkpoints.restore(mesh)
        where = sharding.state_sharding(state, mesh, fsdp=True)
        for leaf, at in zip(jax.tree.leaves(found), jax.tree.leaves(where), strict=True):
            assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
        assert_bitwise(found, state)
        assert found_place == place


def test_processes_of_several_cpu_devices_do_not_cut_weights_along_data(monkeypatch):
    processes.check_layout(Layout(fsdp=True))  # a process alone waits for nobody
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    processes.check_layout(Layout())
    with pytest.raises(ConfigError, match="^layout.fsdp with 8 CPU devices in each process can deadlock"):
        processes.check_layout(Layout(fsdp=True))
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    processes.check_layout(Layout(fsdp=True))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_devices_get_the_rows_of_the_batch_that_are_theirs(sizes):
    mesh, tokens = sharding.make_mesh(*sizes), np.arange(16 * 3).reshape(16, 3)
    rows = processes.rows_held(mesh, 16)
    assert rows.tolist() == list(range(16))  # one process holds all
    placed = processes.put({"tokens": tokens[rows]}, mesh, 16, rows)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert placed.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(16 // (sizes[0] * sizes[1]), 3)}


def test_one_process_alone_agrees_with_itself():
    assert processes.is_first() and processes.gather(b"mine") == [b"mine"]
    assert [processes.any_of(flag) for flag in (True, False)] == [True, False]
    processes.agree({"run": 1})
    for shared in (processes.by_first, processes.by_each):
        with pytest.raises(OSError, match="no room"):
            shared(lambda: (_ for _ in ()).throw(OSError("no room")))
    assert processes.by_each(lambda: "done") == "done"


def test_what_is_refused_in_another_process_is_refused_here(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, b"", b"there is no text"])
    with pytest.raises(ConfigError, match="^process 2 of 3: there is no text$"):
        processes.by_each(lambda: "done")
    with pytest.raises(ValueError, match="^nor here$"):  # each tells its own first
        processes.by_each(lambda: (_ for _ in ()).throw(ValueError("nor here")))
