"""A run in a bucket is the run on a disk, bit for bit: saved, killed, resumed, read, refused."""

import json
import os
import signal
import socket
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import runs
from models import arrays_of

import dsv3_jax as ds
from dsv3_jax.config import Layout
from dsv3_jax.host import lease
from dsv3_jax.host.bucket import Bucket, Changed
from dsv3_jax.host.lease import Lease
from dsv3_jax.host.lock import LOCK_FILE, FolderInUse
from dsv3_jax.host.mirror import INDEX, fetched, mirror_of
from dsv3_jax.mesh import sharding
from dsv3_jax.runs.bucket_checkpoint import SETTINGS
from dsv3_jax.runs.checkpoint import load_run, open_checkpoints, steps_of
from dsv3_jax.runs.folder import claim, read_run
from dsv3_jax.runs.loop import fit
from dsv3_jax.training.state import Job

pytestmark = pytest.mark.long

RUN = runs.make_run("some text", model=replace(runs.MODEL, num_layers=1, mtp_depth=0), keep=2)


@pytest.fixture
def url(server, request) -> str:
    return f"gs://bucket/runs/{request.node.name.replace('[', '-').strip(']')}"


@pytest.fixture(scope="module")
def trained(server, whole, root):
    """A run that was trained in the bucket, in two parts, and the same run on the disk.

    The server kills the first when the arrays of its second checkpoint are there, and nothing else.
    """
    url = "gs://bucket/trained"
    with runs.start(["train", "tiny", "--out", url, *runs.flags(whole.run)], root) as process:
        server.at_write[f"trained/checkpoints/8.1/{SETTINGS}"] = process.kill
        assert process.wait(300) == -signal.SIGKILL, process.communicate()
    assert fit(whole.run, url, quiet=True).resumed_from == 4
    return whole.run, url, whole.folder


@contextmanager
def writing(place, run=RUN):
    """The checkpoints of a run, on the disk or in the bucket, which this process writes."""
    folder = fetched(place)
    mirror = mirror_of(folder)
    with mirror.writing() if mirror else nullcontext():
        claim(folder, run)
        with open_checkpoints(folder, run) as checkpoints:
            yield checkpoints


def save(place, *steps):
    with writing(place) as checkpoints:
        for step in steps:
            checkpoints.save(runs.fresh_state(RUN, step), {"offset": step})


def contents(url: str) -> dict[str, bytes]:
    bucket = Bucket(url)
    return {name: bucket.read(name)[0] for name in bucket.names()}


def index_of(url: str) -> dict:
    return json.loads(Bucket(url).read(INDEX)[0])


# objects


def test_a_write_is_refused_after_another_one(url):
    bucket = Bucket(url)
    absent = bucket.read("a")
    assert absent[0] is None
    first = bucket.write("a", b"1", absent[1])
    with pytest.raises(Changed, match=f"^{url}/a was changed by another process$"):
        bucket.write("a", b"2", absent[1])
    assert bucket.write("a", b"1", absent[1]) == first  # its own, whose answer was lost
    second = bucket.write("a", b"2", first)
    with pytest.raises(Changed):
        bucket.write("a", None, first)
    bucket.write("a", None, second)
    assert bucket.read("a")[0] is None


def test_objects_under_a_path_are_not_those_beside_it(url):
    bucket = Bucket(url)
    names = ["a", "c/8/a", "c/8/b/c", "c/80/a"]
    for name in names:
        bucket.write(name, b"x")
    assert bucket.names("c/8") == names[1:3]
    bucket.delete("c/8")
    assert bucket.names() == [names[0], names[3]]


# one writer


def other_lock(**changes) -> bytes:
    """The lock of a living process of another machine."""
    other = {"host": "other", "pid": 7, "since": "noon", "boot": "b", "renewed": time.time()}
    return json.dumps(other | changes).encode()


def test_two_writers(url, trained):
    mirror = mirror_of(fetched(url))
    with mirror.writing() as lock:
        before = contents(url)
        name = f"process {os.getpid()} on {socket.gethostname()}, which started at"
        with pytest.raises(FolderInUse, match=f"^out='{url}' is in use by {name}.*10 minutes"):
            Lease(Bucket(url))
        code, *_ = runs.by_command("train", "tiny", "--out", url, *runs.flags(trained[0]))
        assert code == 2 and contents(url) == before
        lock.check()
    assert LOCK_FILE not in contents(url)
    with mirror.writing() as lock:
        assert lock.sentence == ""


def test_a_lock_is_taken_over_when_it_is_old_or_its_process_has_ended(url):
    bucket = Bucket(url)
    dead = {"host": socket.gethostname(), "boot": lease._BOOT.read_text().strip(), "pid": 1 << 23}
    bucket.write(LOCK_FILE, other_lock())
    with pytest.raises(FolderInUse, match="in use by process 7 on other, which started at noon;"):
        Lease(bucket)
    for ended in ({"renewed": time.time() - 601}, {"renewed": None}, dead):
        bucket.write(LOCK_FILE, other_lock(**ended))
        lock = Lease(bucket)
        assert "is taken over: it has ended" in lock.sentence
        lock.close()
    others = dead | {"host": "other"}, dead | {"boot": "another start"}
    for alive in (*others, dead | {"pid": os.getpid()}):
        bucket.write(LOCK_FILE, other_lock(**alive))
        with pytest.raises(FolderInUse):
            Lease(bucket)


def test_a_writer_notices_that_it_is_the_writer_no_longer(url, monkeypatch, server):
    """Its machine slept. Nothing of its is written after that; an outage of minutes is survived."""
    mirror = mirror_of(fetched(url))
    now = time.time()
    with pytest.raises(OSError, match="no longer the writer: .* changed by another process$"):
        with mirror.writing() as lock:
            generation = lock._generation
            monkeypatch.setattr(time, "time", lambda: now + 100)
            lock.check()
            assert lock._generation != generation
            monkeypatch.setattr(server, "refused", True)
            monkeypatch.setattr(time, "time", lambda: now + 350)
            lock.check()
            monkeypatch.setattr(server, "refused", False)
            mirror.bucket.write(LOCK_FILE, other_lock())
            (mirror.folder / "metrics.jsonl").write_text("{}\n")
    assert set(contents(url)) == {INDEX, LOCK_FILE}
    assert contents(url)[LOCK_FILE][:16] == other_lock()[:16]


# checkpoints


@pytest.fixture(params=["disk", "bucket"])
def either(request, url, tmp_path) -> str:
    return url if request.param == "bucket" else str(tmp_path / "run")


def test_checkpoints_are_independent_of_the_mesh(either):
    run = replace(RUN, execution=replace(RUN.execution, layout=Layout(fsdp=True)))
    state = runs.fresh_state(run, step=3)
    with writing(either, run) as checkpoints:
        checkpoints.save(runs.on_mesh(state, sharding.make_mesh(2, 4, 1), fsdp=True), {"piece": 5})
        assert checkpoints.latest == 3
    for sizes in (None, (1, 4, 2)):
        mesh = sizes and sharding.make_mesh(*sizes)
        with open_checkpoints(fetched(either), run, read_only=True) as checkpoints:
            restored, position = checkpoints.restore(mesh)
        runs.assert_bitwise(restored, state)
        assert position == {"piece": 5}
        expected = sharding.state_sharding(state, mesh, fsdp=True)
        for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert ds.load_run(either).step == 3


def test_a_state_may_be_donated_while_it_is_written(either):
    state = runs.fresh_state(RUN, step=3)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with writing(either) as checkpoints:
        checkpoints.save(state, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
    runs.assert_bitwise(runs.last_state(either)[0], runs.fresh_state(RUN, step=3))


def test_a_step_can_be_chosen_and_damage_is_refused_by_readers_and_passed_over(either):
    save(either, 4, 8)
    with writing(either) as checkpoints:
        with runs.refused(r"^step=5 has no checkpoint in .*; there are those of 4, 8$"):
            checkpoints.rewind(5)
        assert checkpoints.rewind(8) == checkpoints.rewind() == []
        (sentence,) = checkpoints.rewind(4)
        kept = "the checkpoint of step 8 is kept as 8.superseded"
        assert sentence == f"{kept}: training resumes from step 4"
        assert checkpoints.latest == 4
        checkpoints.save(runs.fresh_state(RUN, 8), {"offset": 9}, wait=True)
        assert checkpoints.restore()[1] == {"offset": 9}

    if either.startswith("gs:"):
        Bucket(either).write(f"checkpoints/8.2/{SETTINGS}", None)
    else:
        (Path(either) / "checkpoints" / "8" / "config" / "metadata").unlink()
    with runs.refused(r"^step=8: file='.*/checkpoints/8.* is absent; `dsv3 runs check` says"):
        load_run(either)
    assert load_run(either, step=4).step == 4
    with writing(either) as checkpoints:
        (sentence,) = checkpoints.rewind()
        assert sentence.startswith("the checkpoint of step 8 is kept as 8.damaged: file='")
        state, position = checkpoints.restore()
        assert position == {"offset": 4}
        runs.assert_bitwise(state, runs.fresh_state(RUN, 4))


def test_old_checkpoints_and_what_a_dead_process_left_are_deleted(url):
    save(url, 4, 8)
    Bucket(url).write("checkpoints/12.1/0/d/0123", b"half")
    assert steps_of(fetched(url) / "checkpoints") == [4, 8]
    save(url, 12)
    folders = {name.split("/")[1] for name in contents(url) if name.startswith("checkpoints/")}
    assert folders == {"8.1", "12.2"}
    assert index_of(url)["steps"] == {"8": "checkpoints/8.1", "12": "checkpoints/12.2"}


def test_a_flipped_bit_or_an_absent_object_is_refused_and_never_read(url):
    save(url, 4)
    bucket = Bucket(url)
    arrays = {name: data for name, data in contents(url).items() if "/0/d/" in name}
    name, content = max(arrays.items(), key=lambda pair: len(pair[1]))
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]
    for data in (flipped, None):
        bucket.write(name, data)
        with runs.refused("^step=4: the checkpoint in "):
            runs.last_state(url)


# training and reading


def test_a_run_that_is_killed_while_it_writes_in_a_bucket_ends_as_that_on_a_disk(trained):
    run, url, disk = trained
    folder = fetched(url)
    assert runs.rows_of(folder) == runs.rows_of(disk)
    runs.assert_bitwise(runs.last_state(folder, run), runs.last_state(disk))
    assert steps_of(folder / "checkpoints") == steps_of(disk / "checkpoints")
    assert read_run(folder) == read_run(disk)
    options = ["--prompt", "a", "--max-new-tokens", 4, "--temperature", 0]
    ours, theirs = (runs.by_command("generate", place, *options)[:2] for place in (url, disk))
    assert ours == theirs and ours[0] == 0
    code, said, _ = runs.by_command("runs", "check", url)
    assert code == 0 and "step 12: in a bucket, where arrays are checked" in said
    assert "metrics.jsonl: 14 rows" in said

    starts = [ds.train.open_start(place) for place in (url, str(disk))]
    ours, theirs = (begin.load(Job(replace(run, start=begin.place))) for begin in starts)
    runs.assert_bitwise(arrays_of(ours[0]), arrays_of(theirs[0]))
    assert ours[1] == theirs[1] and starts[0].run.data == starts[1].run.data


# what is refused


def test_what_is_no_bucket_of_ours_is_refused_in_a_sentence(trained, server, url, monkeypatch):
    """With exit code 2; nothing is written."""
    run, finished, _ = trained

    def refuse(sentence, *argv):
        code, _, said = runs.by_command(*argv)
        assert code == 2 and said.count("\n") == 1 and sentence in said, said

    def refuse_training(sentence, out, run=run):
        refuse(sentence, "train", "tiny", "--out", out, *runs.flags(run))

    refuse_training("gs://absent/run/run.lock cannot be written: NOT_FOUND", "gs://absent/run")
    refuse_training("gs://BAD_/run/ cannot be opened: ", "gs://BAD_/run")
    refuse("gs://absent/run' is neither a run", "generate", "gs://absent/run")
    Bucket(url).write("notes/mine.txt", b"mine")
    refuse_training(f"out='{url}' holds other files and no index.json; choose another --out", url)
    assert contents(url) == {"notes/mine.txt": b"mine"}

    # An index that is another's, or names files outside of the run.
    index = index_of(finished)
    outside = ({"files": ["../a"]}, {"files": ["/etc/a"]}, {"steps": {"a": "b"}}, {"aside": 3})
    for values in ({}, [1], *(index | one for one in outside)):
        Bucket(url).write(INDEX, json.dumps(values).encode())
        refuse(f"file='{url}/index.json' is damaged, or no run's", "runs", "check", url)
    Bucket(url).write(INDEX, json.dumps(index).encode())
    refuse(f"file='{url}/load.jsonl' is absent", "generate", url)

    # Another run's; one that the bucket does not let in; commands that write to a disk.
    before = contents(finished)
    refuse_training(f"seed=9 is not that of the run in {finished}", finished, replace(run, seed=9))
    assert contents(finished) | {INDEX: before[INDEX]} == before
    only = "only `dsv3 train` writes into a bucket; name a folder"
    for words in (("stats", finished, "--out"), ("convert", finished)):
        refuse(f"out='gs://bucket/out': {only}", *words, "gs://bucket/out")
    refuse(f"run='{finished}' is in a bucket, and its report is not; name a", "stats", finished)
    monkeypatch.setattr(server, "refused", True)
    refuse_training("cannot be read: PERMISSION_DENIED", finished)
