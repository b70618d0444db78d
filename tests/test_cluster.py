"""Two processes over the loopback address train what one trains; a process's part of a batch."""

import re
import shlex
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from dsv3_jax.config import Layout, OptimConfig
from dsv3_jax.host.bucket import Bucket
from dsv3_jax.host.mirror import fetched
from dsv3_jax.mesh import processes, sharding
from dsv3_jax.runs import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With a large eps, AdamW does not turn rounding of gradients near 0 into full steps."""
    model = replace(runs.MODEL, num_layers=1, mtp_depth=0)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1)
    text = runs.write_text(tmp_path_factory.mktemp("text"))
    return runs.make_run(text, model=model, optim=optim, steps=12, eval_every=12, save_every=2)


# The second process is killed when it saves step 8.
KILLED = """
import os, signal, jax
from dsv3_jax.runs.checkpoint import Checkpoints
save = Checkpoints.save
def save_or_die(self, state, *rest, **more):
    if int(state.step) == 8 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, state, *rest, **more)
Checkpoints.save = save_or_die
"""


@pytest.fixture(params=["disk", pytest.param("bucket", marks=pytest.mark.rare)])
def out(request, tmp_path) -> Path | str:
    """The folder of a run, or its URL."""
    if request.param == "disk":
        return tmp_path / "run"
    request.getfixturevalue("server")
    return "gs://bucket/runs/two"


@pytest.mark.long
def test_two_processes_train_as_one(run, root, out, tmp_path):
    """Each has half of the experts."""
    alone = tmp_path / "alone"
    loop.fit(run, out, stop_after=2, quiet=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    argv = ["train", "tiny", "--out", str(out), "--mesh", "expert=2", *runs.flags(run)]
    argv += ["--execution.layout.expert-comm", "all_to_all"]
    argv += ["--execution.layout.capacity-slack", "1"]
    argv += ["--cluster", address, "--processes", "2", "--process-id"]
    program = runs.dsv3(runs.SPEND_NO_SECONDS + KILLED)
    both = [runs.start([*argv, str(i)], root, program) for i in range(2)]
    try:
        assert both[1].wait(300) == -signal.SIGKILL, both[1].stderr.read()
        said, errors = both[0].communicate(timeout=300)
    finally:
        for process in both:
            with process:  # closes its pipes
                process.kill()
    assert both[0].returncode in (75, -signal.SIGABRT), errors
    assert "resumed from the checkpoint of step 2" in said
    if isinstance(out, Path):
        lists = {path.name for path in out.glob("checkpoints/[46]/checksums.*")}
        assert lists == {"checksums.0-of-2.json", "checksums.1-of-2.json"}
    else:
        arrays = [name for name in Bucket(out).names("checkpoints") if "/d/" in name]
        assert {name.split("/")[2] for name in arrays} >= {"0", "1"}  # the processes
    assert loop.fit(run, out, quiet=True).resumed_from in (4, 6)
    loop.fit(run, alone, quiet=True)
    saved, expected = runs.last_state(out), runs.last_state(alone)
    assert saved[1] == expected[1]  # where the data continues
    runs.assert_bitwise(saved[0].bias, expected[0].bias)  # every count of every step was the same
    runs.assert_near(saved[0].params, expected[0].params)
    rows, expected_rows = runs.rows_of(fetched(out)), runs.rows_of(alone)
    assert any("tokens_sent" in row for row in rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() - {"tokens_sent", "wire_bytes"} == expected_row.keys()
        others = {"bits_per_byte_by_domain", "max_vio_by_domain", "mtp_acceptance"}
        for name in expected_row.keys() - others:
            np.testing.assert_allclose(row[name], expected_row[name], rtol=1e-5, err_msg=name)


def test_processes_with_different_runs_are_named(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda text: [text, text.replace(b"4", b"3")])
    with runs.refused("^run.batch_size=3 in process 1 differs from run.batch_size=4 in process 0"):
        processes.agree({"run": {"steps": 12, "batch_size": 4}})


def test_invalid_settings_are_refused(monkeypatch):
    unknown = "cluster='auto', processes=None, process_id=None cannot be used"
    for changes, named in (
        ({"address": "host0"}, "cluster='host0' is neither"),
        ({"count": 3}, "devices=4 of the mesh are not divisible by processes=3"),
        ({"address": "auto", "index": None}, unknown),
    ):
        settings = {"address": "host0:1234", "count": None, "index": 0, "devices": 4} | changes
        with runs.refused(f"^{re.escape(named)}"):
            processes.join(**settings)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with runs.refused("^layout.fsdp=True with 8 CPU devices in each process can deadlock"):
        processes.check_layout(Layout(fsdp=True))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 1, 8)])
def test_devices_get_their_rows_of_the_batch(sizes):
    mesh, tokens = sharding.make_mesh(*sizes), np.arange(16 * 3).reshape(16, 3)
    rows = processes.rows_held(mesh, 16)
    placed = processes.put({"tokens": tokens[rows]}, mesh, 16)["tokens"]
    np.testing.assert_array_equal(placed, tokens)  # one process holds all
    rows_there = 16 // (sizes[0] * sizes[1])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(rows_there, 3)}


def test_an_error_in_one_process_is_raised_in_all(monkeypatch):
    with pytest.raises(OSError, match="no room"):
        processes.by_first(lambda: (_ for _ in ()).throw(OSError("no room")))
    monkeypatch.setattr(processes, "gather", lambda message: [message, b"", b"there is no text"])
    with runs.refused("^process 2 of 3: there is no text$"):
        processes.by_each(lambda: "done")


# the files that start a run on several hosts, in a dry run

LAUNCH = Path(__file__).parents[1] / "experiments" / "scale" / "launch"
STARTED = ["tiny", "--out", "runs/a b", "--cluster", "auto", "--mesh", "data=2,expert=4"]


def launch(script: str, folder: Path, code: int = 0, restarts: int = 0) -> tuple[int, list, str]:
    """Run a script whose programs note their words: (its exit code, words by program, said)."""
    for program in ("srun", "scontrol", "gcloud"):
        file = folder / program
        noted = f'printf "%s\\0" "$@" > {folder}/{program}.words'
        file.write_text(f"#!/bin/bash\n{noted}\n[ $0 != {folder}/srun ] || exit {code}\n")
        file.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "NAME": "slice", "ZONE": "zone"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    words = [STARTED[0], STARTED[2], *STARTED[5:]]
    done = subprocess.run(["bash", LAUNCH / script, *words], env=environment, capture_output=True)
    files = sorted(folder.glob("*.words"))
    found = {file.stem: file.read_text().split("\0")[:-1] for file in files}
    return done.returncode, found, done.stderr.decode()


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (134, 9, True), (75, 10, False)],
)
def test_slurm_starts_a_run_and_again_one_that_lost_a_process(tmp_path, code, restarts, again):
    found, words, said = launch("slurm.sbatch", tmp_path, code, restarts)
    assert found == code and (code or said == "")
    assert words["srun"][words["srun"].index("dsv3") :] == ["dsv3", "train", *STARTED]
    assert words.get("scontrol") == (["requeue", "7"] if again else None)


def test_the_launch_file_of_a_pod_starts_the_same_command(tmp_path):
    code, words, said = launch("tpu_pod.sh", tmp_path)
    assert (code, said) == (0, "")
    [line] = [word for word in words["gcloud"] if word.startswith("--command=")]
    assert shlex.split(line.removeprefix("--command=")) == ["dsv3", "train", *STARTED]
