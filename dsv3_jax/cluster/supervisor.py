"""The watch over one process of a cluster: when another is lost, this one ends with a sentence, soon.

JAX alone would leave the others hanging in a collective, or end them by abort() with pages of a stack trace. So a
process of a cluster is two: a worker, which trains, and its watch, which calls nothing of JAX and cannot be held up by
it. The watches hold a TCP connection each to that of process 0. What they tell each other, a line each:

    (an empty line)   I am here; after SILENCE seconds without one a process counts as lost
    ended I CODE      process I's worker ended with this exit code
    lost I            process I is gone: killed, its host down, or the network to it

Process 0 hands on what it hears. A worker whose watch is gone ends, too, for it holds a line to it.
"""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TextIO

from dsv3_jax.config import ConfigError

REFUSED = (2, 130)  # exit codes of what all processes find by themselves: bad input, or Ctrl-C twice
FAILED = (1, 2)  # exit codes of a process whose error is its own: the same command would meet it again
LOST = 75  # exit code where another process is lost (EX_TEMPFAIL): the same command goes on from the last checkpoint
BEAT = 0.25  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as lost
GRACE = 10.0  # seconds to end by itself for a worker, once another has ended with an error; and the reverse
HELD_BACK = 2.0  # seconds that a worker's stderr waits: what libraries say of a process that is lost is not told


@dataclass(frozen=True)
class Cluster:
    """How a process finds the others of its run.

    Raises: ConfigError naming the setting that cannot be.
    """

    address: str  # of process 0, HOST:PORT; or "auto": what SLURM, Kubernetes, Open MPI or the TPU pod says
    processes: int | None = None  # how many there are; None: as found by "auto"
    process_id: int | None = None  # which of them this is, from 0; None: likewise
    timeout: int = 60  # seconds to wait for the others

    def __post_init__(self) -> None:
        n, i = self.processes, self.process_id
        if self.address != "auto" and not re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):\d{1,5}", self.address):
            raise ConfigError(f"cluster={self.address!r} is neither auto nor of the form HOST:PORT")
        if self.address != "auto" and not 0 < self.port < 65536:
            raise ConfigError(f"cluster={self.address!r} has a port outside 1 … 65535")
        if (n is None) != (i is None):
            given, missing = ("processes", "process_id") if i is None else ("process_id", "processes")
            raise ConfigError(f"{given}={n if i is None else i} is given without {missing}")
        if self.address != "auto" and n is None:
            raise ConfigError(f"cluster={self.address!r} needs processes and process_id, too")
        if n is not None and n < 1:
            raise ConfigError(f"processes={n} is below 1")
        if n is not None and i is not None and not 0 <= i < n:
            raise ConfigError(f"process_id={i} is outside 0 … {n - 1}")
        if self.timeout < 1:
            raise ConfigError(f"cluster_timeout={self.timeout} is below 1 second")

    @property
    def host(self) -> str | None:
        """Of process 0; None where it has yet to be found."""
        return None if self.address == "auto" else self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of process 0."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Meeting:
    """What a worker tells its watch once it has joined: who it is, and where process 0's watch listens."""

    process_id: int
    processes: int
    hosts: list[str]
    port: int
    token: str  # which no stranger knows who connects to that port

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run(cluster: Cluster, worker: Callable[[int, int], list[str]]) -> int:
    """Run a worker under watch.

    Args:
        cluster: of which the worker is to be a process.
        worker: its command, from the descriptor of its line to the watch, and the port that the watch listens at.
    Returns: the worker's exit code; LOST where another process was lost or killed; the other's own code where that
        failed, for going on would fail again; 2 where the processes did not meet.
    """
    deadline = time.monotonic() + cluster.timeout
    if cluster.host is not None and cluster.process_id:
        try:
            _connect([cluster.host], cluster.port, deadline).close()
        except OSError as error:
            return _say(
                f"process 0 cannot be reached at {cluster.address} within {cluster.timeout} seconds: {error}", 2
            )
    with _listen() as door:
        return _Watch(cluster, deadline, door, worker).run()


def report(line: int, meeting: Meeting) -> None:
    """Tell the watch, from within a worker, that it has joined."""
    os.write(line, (meeting.to_json() + "\n").encode())


def end_with_watch(line: int) -> None:
    """Have this worker end when its watch does, however that came about."""

    def wait() -> None:
        os.read(line, 1)  # the watch never writes: this is its end
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


class _Watch:
    """A worker and the connections to other watches; all that happens comes through one queue."""

    def __init__(self, cluster: Cluster, deadline: float, door: socket.socket, worker: Callable[[int, int], list[str]]):
        self._cluster, self._deadline, self._door = cluster, deadline, door
        self._events: queue.Queue[tuple] = queue.Queue()
        self._peers: dict[int, socket.socket] = {}  # process 0 has all others, they have process 0
        self._ended: set[int] = set()
        self._held: list[tuple[float, bytes]] = []  # of the worker's stderr
        self._me: int | None = None  # once joined
        ours, theirs = socket.socketpair()
        with theirs:
            self._worker = subprocess.Popen(
                worker(theirs.fileno(), door.getsockname()[1]),
                env=os.environ | _quiet(),
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C comes to the watch alone, which hands it on
            )
        self._line = ours
        for follow in (self._follow_worker, self._follow_line, self._follow_stderr):
            threading.Thread(target=follow, daemon=True).start()

    def run(self) -> int:
        with self._signals_handed_on():
            verdict, code = self._until_the_end()
        if self._worker.poll() is None:
            self._worker.kill()
            self._worker.wait()
        self._tell(f"ended {self._me} {code}")
        self._line.close()
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        if verdict is not None:
            return _say(verdict, code)
        self._pass_on_stderr(all_of_it=True)
        return code

    def _until_the_end(self) -> tuple[str | None, int]:
        """(what to say of others, None where the worker's own words stand; the exit code)."""
        blame: tuple[str, int] | None = None  # another's error, which the worker may meet by itself within GRACE
        own: int | None = None  # the worker's exit code, where its reason may lie with another
        limit = self._deadline
        while True:
            self._tell("")
            if own is None:  # else what it said last may be but the echo of another's end
                self._pass_on_stderr()
            try:
                what, *rest = self._events.get(timeout=BEAT)
            except queue.Empty:
                what = "nothing"
            if what == "lost":
                return is_lost(rest[0]), LOST
            if what == "ended" and rest[1] and blame is None:
                said = f"process {rest[0]} of the run ended with an error, which its own output names"
                blame = said, rest[1] if rest[1] in FAILED else LOST
                limit = time.monotonic() + (GRACE if rest[1] in REFUSED else 0)
            if what == "joined":
                self._me, limit = rest[0].process_id, float("inf")
                threading.Thread(target=self._meet, args=rest, daemon=True).start()
            if what == "worker":
                own = rest[0]
                if own in (0, *REFUSED) or self._me is None and own > 0:
                    return None, own
                if own < 0 and own != -signal.SIGABRT:  # that is how JAX ends a process whose peer is lost
                    return f"training was ended by {signal.Signals(-own).name}", 128 - own
                # Who fails by itself must tell the others before they give up waiting for whose fault it was.
                limit = min(limit, time.monotonic() + (GRACE if own in (LOST, -signal.SIGABRT) else HELD_BACK))
            if own is not None and blame is not None:
                return blame
            if time.monotonic() < limit:
                continue
            if self._me is None:
                return self._not_met(), 2
            if own is not None:
                return None, own if own > 0 else 128 - own
            assert blame is not None  # nothing else sets the limit
            return blame

    def _not_met(self) -> str:
        c = self._cluster
        who = "this process" if c.process_id is None else f"process {c.process_id} of {c.processes}"
        return f"{who} did not meet the others at {c.address} within {c.timeout} seconds: not all of them came"

    # What is followed, each in a thread of its own.

    def _follow_worker(self) -> None:
        self._events.put(("worker", self._worker.wait()))

    def _follow_line(self) -> None:
        with contextlib.suppress(OSError):
            for text in self._line.makefile():
                self._events.put(("joined", Meeting(**json.loads(text))))

    def _follow_stderr(self) -> None:
        assert self._worker.stderr is not None
        for text in self._worker.stderr:
            self._held.append((time.monotonic(), text))

    def _meet(self, meeting: Meeting) -> None:
        """Connect to process 0, or take the others' connections there."""
        deadline = time.monotonic() + SILENCE
        try:
            if meeting.process_id == 0:
                self._receive(meeting, deadline)
            else:
                connection = _connect(meeting.hosts, meeting.port, deadline)
                connection.sendall(f"{meeting.token} {meeting.process_id}\n".encode())
                self._follow(0, connection, connection.makefile())
        except OSError:
            missing = set(range(meeting.processes)) - {meeting.process_id} - self._peers.keys()
            self._events.put(("lost", min(missing)))

    def _receive(self, meeting: Meeting, deadline: float) -> None:
        while len(self._peers) < meeting.processes - 1:
            self._door.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = self._door.accept()
            connection.settimeout(1.0)
            lines = connection.makefile()
            with contextlib.suppress(OSError, ValueError):  # a stranger's
                token, who = lines.readline().split()
                if token == meeting.token:
                    threading.Thread(target=self._follow, args=(int(who), connection, lines), daemon=True).start()
                    self._peers[int(who)] = connection

    def _follow(self, peer: int, connection: socket.socket, lines: TextIO) -> None:
        connection.settimeout(SILENCE)
        self._peers[peer] = connection
        with contextlib.suppress(OSError):
            for text in lines:
                words = text.split()
                if words:
                    self._heard(words[0], [int(word) for word in words[1:]])
        if peer not in self._ended:
            self._heard("lost", [peer])

    def _heard(self, what: str, numbers: list[int]) -> None:
        if what == "ended":
            self._ended.add(numbers[0])
        if self._me == 0:
            self._tell(" ".join(map(str, [what, *numbers])), but=numbers[0])
        self._events.put((what, *numbers))

    def _tell(self, text: str, but: int | None = None) -> None:
        for peer, connection in list(self._peers.items()):
            if peer != but:
                with contextlib.suppress(OSError):  # whoever reads of it will notice
                    connection.sendall((text + "\n").encode())

    def _pass_on_stderr(self, all_of_it: bool = False) -> None:
        while self._held and (all_of_it or self._held[0][0] < time.monotonic() - HELD_BACK):
            sys.stderr.buffer.write(self._held.pop(0)[1])
            sys.stderr.flush()

    @contextlib.contextmanager
    def _signals_handed_on(self) -> Iterator[None]:
        def hand_on(number, frame):
            if self._worker.poll() is None:
                self._worker.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _quiet() -> dict[str, str]:
    """XLA then tells errors alone; whoever wants its warnings has set the level to 0. 1 is what importing JAX sets."""
    return {"TF_CPP_MIN_LOG_LEVEL": "2"} if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1" else {}


def is_lost(process: int) -> str:
    """What is said where a process is lost."""
    return f"process {process} of the run is lost; the same command goes on from the last checkpoint"


def _listen() -> socket.socket:
    """A socket at a free port of every address."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(hosts: list[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first host that answers, trying until the deadline. Raises: OSError, the last one met."""
    while True:
        for host in hosts:
            left = deadline - time.monotonic()
            try:
                return socket.create_connection((host, port), timeout=max(min(left, 5.0), 0.1))
            except OSError as error:
                last = error
        if time.monotonic() + 0.2 > deadline:
            raise last
        time.sleep(0.2)


def _say(sentence: str, code: int) -> int:
    print(f"dsv3: {sentence}", file=sys.stderr, flush=True)
    return code
