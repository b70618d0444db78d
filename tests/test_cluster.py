"""Two real processes over the loopback address train what one trains; when one ends, the other ends with a reason."""

import re
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from pairs import DSV3, MESH, ends, free_port, pair, pair_run, wait_for_step, with_worker
from runs import SPEND_NO_SECONDS, assert_bitwise, cheap_compiles, flags, fresh_state, rows_of, start

from dsv3_jax.cluster import processes, supervisor
from dsv3_jax.config import ConfigError, Layout
from dsv3_jax.mesh import sharding
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.long

FSDP = ("--execution.layout.fsdp",)  # each process holds half of the weights
EXPERTS = "expert=2"  # or half of the experts, to which tokens are sent:
ROUNDS = ("--execution.layout.expert-comm", "all_to_all", "--execution.layout.capacity-slack", "1")


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles():
        yield root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pair_run(tmp_path_factory.mktemp("text"))


def resumed_from(output: str) -> int:
    return int(re.search(r"resumed from the checkpoint of step (\d+)", output)[1])


def test_two_processes_are_one_whichever_is_lost(run, root, tmp_path):
    """One process; two of which the first is killed; two of which the second is; two that are asked to stop; one again.

    Each resumes the checkpoint of another mesh. With `tensor=2` both processes hold the same rows.
    """
    folder = tmp_path / "run"
    loop.fit(run, folder, stop_after=2, quiet=True)
    saved = 2
    for victim, mesh, layout in ((0, MESH, FSDP), (1, EXPERTS, ROUNDS)):
        with pair(root, folder, run, mesh=(mesh, mesh), more=(layout, layout)) as both:
            wait_for_step(folder, saved + 2, both[1 - victim])
            both[victim].kill()
            killed = time.monotonic()
            code, output, errors = ends(both[1 - victim])
            assert time.monotonic() - killed < 60
            assert (code, errors) == (supervisor.LOST, [f"dsv3: {supervisor.lost_sentence(victim)}"])
            assert resumed_from(output if victim else ends(both[0])[1]) == saved
        with Checkpoints(folder, run, read_only=True) as checkpoints:
            saved = checkpoints.latest
    with pair(root, folder, run, mesh=("tensor=2", "tensor=2")) as both:
        wait_for_step(folder, saved + 2, both[0])
        both[1].send_signal(signal.SIGTERM)
        (code, output, errors), (other_code, *other) = ends(both[0]), ends(both[1])
        assert (code, errors, other_code, other) == (0, [], 0, ["", []])  # only process 0 prints
        assert resumed_from(output) == saved
        stopped = int(re.search(r"stopped and saved at step (\d+)", output)[1])
        assert saved + 2 <= stopped < run.steps
    assert loop.fit(run, folder, quiet=True).resumed_from == stopped
    loop.fit(run, tmp_path / "alone", quiet=True)
    state, data_state = last_checkpoint(run, folder)
    expected, expected_data_state = last_checkpoint(run, tmp_path / "alone")
    assert data_state == expected_data_state
    assert_bitwise(state.bias, expected.bias)  # every count of every step was the same
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    rows, expected_rows = rows_of(folder), rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    assert any("tokens_sent" in row for row in rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() - {"tokens_sent", "wire_bytes"} == expected_row.keys()
        for name in expected_row.keys() - {"bits_per_byte_by_domain", "max_vio_by_domain", "mtp_acceptance"}:
            np.testing.assert_allclose(row[name], expected_row[name], rtol=1e-5, err_msg=name)


def last_checkpoint(run, folder):
    with Checkpoints(folder, run) as checkpoints:
        return checkpoints.restore()


# A worker that runs this fails when it saves step 2.
FAILING = """
import os, signal
from dsv3_jax.training.checkpoint import Checkpoints
save = Checkpoints.save
def fail(self, state, *rest, **more):
    if int(state.step) == 2:
        {}
    save(self, state, *rest, **more)
Checkpoints.save = fail
"""
OTHER_FAILED = "dsv3: process {} of the run ended with an error; see the output of that process"


@pytest.mark.parametrize("victim, failure, code, last_line, others_code", [
    (0, "raise RuntimeError('broken')", 1, "RuntimeError: broken", 1),
    (1, "os.kill(os.getpid(), signal.SIGKILL)", 137, "dsv3: training was ended by SIGKILL", supervisor.LOST),
])  # fmt: skip
def test_a_worker_that_fails_ends_all(run, root, tmp_path, victim, failure, code, last_line, others_code):
    """The others wait for it in a collective. After an error that would occur again, no code says to start again."""
    programs = [DSV3, DSV3]
    programs[victim] = with_worker(SPEND_NO_SECONDS + FAILING.format(failure))
    with pair(root, tmp_path / "run", run, programs=programs) as both:
        failed = ends(both[victim])  # within 100 s of its start; JAX would wait longer for its peers at exit
        ended = time.monotonic()
        other = ends(both[1 - victim])
        assert time.monotonic() - ended < 45
    assert (failed[0], failed[2][-1]) == (code, last_line)
    assert code == 1 or len(failed[2]) == 1  # an unexpected error has a stack trace
    assert (other[0], other[2]) == (others_code, [OTHER_FAILED.format(victim)])


def test_processes_with_different_runs_end_at_once(run, root, tmp_path):
    """Both get the reason, although the mesh cannot shard the batch of one of them."""
    with pair(root, tmp_path / "run", run, more=((), ("--data.batch-size", "3"))) as both:
        for process in both:
            code, output, errors = ends(process)
            sentence = "dsv3: run.data.batch_size=3 in process 1 differs from run.data.batch_size=4 in process 0"
            assert (code, output, len(errors)) == (2, "", 1) and errors[0].startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_processes_with_different_meshes_end_at_once(run, root, tmp_path):
    with pair(root, tmp_path / "run", run, mesh=("data=2", "data=4")) as both:
        for process in both:
            code, output, errors = ends(process)
            sentence = "dsv3: mesh.data=4 in process 1 differs from mesh.data=2 in process 0"
            assert (code, output, len(errors)) == (2, "", 1) and errors[0].startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_all_processes_reject_a_folder_of_other_files(run, root, tmp_path):
    (tmp_path / "notes").write_text("not a run")
    with pair(root, tmp_path, run) as both:
        for process in both:
            code, output, errors = ends(process)
            assert (code, output, len(errors)) == (2, "", 1) and "holds other files and no run.json" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("process_id, sentence", [
    (0, "cluster='{}': process 0 of 2 did not find all others within 2 seconds"),
    (1, "cluster='{}': process 0 cannot be reached within 2 seconds: [Errno 111] Connection refused"),
])  # fmt: skip
def test_a_process_alone_ends_after_its_timeout(run, root, tmp_path, process_id, sentence):
    address = f"127.0.0.1:{free_port()}"
    argv = ["--cluster", address, "--processes", "2", "--process-id", str(process_id), "--cluster-timeout", "2"]
    started = time.monotonic()
    with start(["train", "tiny", "--out", str(tmp_path / "run"), *argv, *flags(run)], root) as process:
        code, output, errors = ends(process)
    assert (code, output, len(errors)) == (2, "", 1) and errors[0].startswith("dsv3: " + sentence.format(address))
    assert time.monotonic() - started < 2 + 30  # two interpreters start, on a busy machine
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, sentence", [
    (("host0",), "cluster='host0' is neither"),
    (("host0:x", 2, 0), "cluster='host0:x' is neither"),
    (("host0:70000", 2, 0), "cluster='host0:70000' has no valid port"),
    (("host0:1234",), "cluster='host0:1234' needs processes and process_id"),
    (("host0:1234", 2), "processes=2 is given without process_id"),
    (("auto", None, 1), "process_id=1 is given without processes"),
    (("auto", 0, 0), "processes=0 is below 1"),
    (("auto", 2, 2), "process_id=2 is not one of 2 processes"),
    (("auto", 2, -1), "process_id=-1 is not one of 2 processes"),
    (("auto", 2, 1, 0), "cluster_timeout=0 is below 1"),
])  # fmt: skip
def test_invalid_settings_are_rejected(settings, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        supervisor.Cluster(*settings)


def test_addresses_are_read():
    assert [(c.host, c.port) for c in map(lambda a: supervisor.Cluster(a, 2, 0), ("h-0.net:12", "[::1]:34"))] == [
        ("h-0.net", 12),
        ("::1", 34),
    ]
    assert supervisor.Cluster("auto").host is None


def test_checkpoints_are_independent_of_the_mesh(run, tmp_path):
    """Saved from a mesh of "data" and "expert", and restored without a mesh and on three others: the same bits."""
    sharded_run = replace(run, execution=replace(run.execution, layout=Layout(fsdp=True)))
    state, data_state = fresh_state(run, step=3), {"piece": 5, "offset": 7}
    mesh = sharding.make_mesh(2, 4, 1)
    with Checkpoints(tmp_path, sharded_run) as checkpoints:
        shardings = sharding.state_sharding(state, mesh, fsdp=True)
        checkpoints.save(jax.device_put(state, shardings), data_state, wait=True)
    for sizes in (None, (1, 1, 1), (8, 1, 1), (1, 4, 2)):
        mesh = sizes and sharding.make_mesh(*sizes)
        with Checkpoints(tmp_path, sharded_run) as checkpoints:
            restored, restored_data_state = checkpoints.restore(mesh)
        shardings = sharding.state_sharding(state, mesh, fsdp=True)
        for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
        assert_bitwise(restored, state)
        assert restored_data_state == data_state


def test_processes_of_several_cpu_devices_cannot_use_fsdp(monkeypatch):
    processes.check_layout(Layout(fsdp=True))  # one process cannot deadlock
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    processes.check_layout(Layout())
    with pytest.raises(ConfigError, match="^layout.fsdp=True with 8 CPU devices in each process can deadlock"):
        processes.check_layout(Layout(fsdp=True))
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    processes.check_layout(Layout(fsdp=True))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_devices_get_their_rows_of_the_batch(sizes):
    mesh, tokens = sharding.make_mesh(*sizes), np.arange(16 * 3).reshape(16, 3)
    rows = processes.rows_held(mesh, 16)
    assert rows.tolist() == list(range(16))  # one process holds all
    placed = processes.put({"tokens": tokens[rows]}, mesh, 16, rows)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert placed.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(16 // (sizes[0] * sizes[1]), 3)}


def test_one_process_agrees_with_itself():
    assert processes.is_first() and processes.gather(b"message") == [b"message"]
    assert [processes.any_of(flag) for flag in (True, False)] == [True, False]
    processes.agree({"run": 1})
    for shared in (processes.by_first, processes.by_each):
        with pytest.raises(OSError, match="no room"):
            shared(lambda: (_ for _ in ()).throw(OSError("no room")))
    assert processes.by_each(lambda: "done") == "done"


def test_an_error_in_another_process_is_raised_here(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda message: [message, b"", b"there is no text"])
    with pytest.raises(ConfigError, match="^process 2 of 3: there is no text$"):
        processes.by_each(lambda: "done")
    with pytest.raises(ValueError, match="^nor here$"):  # each process raises its own error first
        processes.by_each(lambda: (_ for _ in ()).throw(ValueError("nor here")))
