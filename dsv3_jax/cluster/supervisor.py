"""The supervisor of one process of a cluster: when another process is lost, it ends this one with one sentence.

JAX alone would leave the others waiting in a collective, or end them by abort() with pages of a stack trace. A process
of a cluster is therefore two: a worker, which trains, and its supervisor. The supervisor calls nothing of JAX and
cannot be blocked by it. Every supervisor has a TCP connection to process 0's supervisor. Messages are lines:

    (an empty line)   heartbeat; after PEER_TIMEOUT seconds without one a process is lost
    ended I CODE      process I's worker ended with this exit code
    lost I            process I was killed, its host is down, or the network to it

Process 0 forwards the messages that it receives. A worker holds a pipe to its supervisor and ends when that is closed.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TextIO

from dsv3_jax.config import ConfigError
from dsv3_jax.signals import STOP, handled

# Exit codes
ALL_FAIL = (2, 130)  # every process fails by itself: bad input, or Ctrl-C twice
PERMANENT = (1, 2)  # the process's own error, which the same command would meet again
LOST = 75  # another process is lost (EX_TEMPFAIL): the same command resumes from the last checkpoint

# Seconds
HEARTBEAT = 0.25  # between two heartbeats
PEER_TIMEOUT = 30.0  # without a heartbeat, until a process counts as lost
GRACE = 10.0  # for a worker to end by itself after another one's error, and for that error to arrive after the end
STDERR_DELAY = 2.0  # of a worker's stderr, so that libraries' messages about a lost process can be dropped


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, and which one this is.

    Raises: ConfigError naming a setting that is not valid.

    Example:
        >>> cluster = Cluster("host0:1234", processes=2, process_id=1)
        >>> cluster.host, cluster.port
        ('host0', 1234)
    """

    address: str  # HOST:PORT of process 0; "auto" asks SLURM, Kubernetes, Open MPI or the TPU pod
    processes: int | None = None  # number of processes; None means that "auto" finds it
    process_id: int | None = None  # 0 … processes - 1; None means that "auto" finds it
    timeout: int = 60  # seconds to wait for the other processes

    def __post_init__(self) -> None:
        n, i = self.processes, self.process_id
        if self.address != "auto" and not re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):\d{1,5}", self.address):
            raise ConfigError(f"cluster={self.address!r} is neither auto nor of the form HOST:PORT; use one of them")
        if self.address != "auto" and not 0 < self.port < 65536:
            raise ConfigError(f"cluster={self.address!r} has no valid port; use one from 1 to 65535")
        if (n is None) != (i is None):
            given, missing = ("processes", "process_id") if i is None else ("process_id", "processes")
            raise ConfigError(f"{given}={n if i is None else i} is given without {missing}; give both or neither")
        if self.address != "auto" and n is None:
            raise ConfigError(f"cluster={self.address!r} needs processes and process_id; give both")
        if n is not None and n < 1:
            raise ConfigError(f"processes={n} is below 1; give the number of all processes")
        if n is not None and i is not None and not 0 <= i < n:
            raise ConfigError(f"process_id={i} is not one of {n} processes; use 0 to {n - 1}")
        if self.timeout < 1:
            raise ConfigError(f"cluster_timeout={self.timeout} is below 1; give whole seconds")

    @property
    def host(self) -> str | None:
        """Host of process 0; None for "auto"."""
        return None if self.address == "auto" else self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port of process 0."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Rendezvous:
    """A joined worker's message to its supervisor: its process, and the address of process 0's supervisor.

    Example:
        >>> Rendezvous(process_id=0, processes=2, hosts=["host0"], port=1234, token="secret").to_json()
        '{"process_id": 0, "processes": 2, "hosts": ["host0"], "port": 1234, "token": "secret"}'
    """

    process_id: int
    processes: int
    hosts: list[str]
    port: int
    token: str  # a secret that identifies this run's supervisors to each other

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run(cluster: Cluster, worker: Callable[[int, int], list[str]]) -> int:
    """Run a worker under a supervisor.

    Args:
        cluster: the cluster and the worker's process in it.
        worker: returns the worker's command, given the file descriptor of its pipe and the supervisor's port.
    Returns: the worker's exit code. It is LOST if another process was lost or killed. It is another process's code if
        that process failed permanently. It is 2 if the processes did not find each other.
    """
    deadline = time.monotonic() + cluster.timeout
    if cluster.host is not None and cluster.process_id:
        try:
            _connect([cluster.host], cluster.port, deadline).close()
        except OSError as error:
            return _print_error(
                f"cluster={cluster.address!r}: process 0 cannot be reached within {cluster.timeout} seconds: {error}", 2
            )
    with _listen() as server:
        return _Supervisor(cluster, deadline, server, worker).run()


def report(pipe: int, rendezvous: Rendezvous) -> None:
    """Report to the supervisor, from within a worker, that it has joined the cluster."""
    os.write(pipe, (rendezvous.to_json() + "\n").encode())


def end_with_supervisor(pipe: int) -> None:
    """Make this worker end when its supervisor ends, even when that is killed."""

    def wait() -> None:
        os.read(pipe, 1)  # returns when the supervisor ends, because it never writes
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


class _Supervisor:
    """A worker and the connections to other supervisors; threads put all events into one queue."""

    def __init__(
        self, cluster: Cluster, deadline: float, server: socket.socket, worker: Callable[[int, int], list[str]]
    ):
        self._cluster, self._deadline, self._server = cluster, deadline, server
        self._events: queue.Queue[tuple] = queue.Queue()
        self._peers: dict[int, socket.socket] = {}  # process 0 has all others, and each of them has process 0
        self._ended: set[int] = set()
        self._stderr: list[tuple[float, bytes]] = []  # (time, line) of the worker's lines that are not yet printed
        self._process_id: int | None = None  # None until the worker has joined
        self._connected = threading.Event()  # connecting to the other supervisors has ended, well or not
        ours, theirs = socket.socketpair()
        with theirs:
            self._worker = subprocess.Popen(
                worker(theirs.fileno(), server.getsockname()[1]),
                env=os.environ | _quiet_xla(),
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C reaches only the supervisor, which forwards it
            )
        self._pipe = ours
        self._stderr_reader = threading.Thread(target=self._follow_stderr, daemon=True)
        self._stderr_reader.start()
        for follow in (self._follow_worker, self._follow_pipe):
            threading.Thread(target=follow, daemon=True).start()

    def run(self) -> int:
        with handled(self._forward, *STOP):
            sentence, code = self._wait()
        if self._worker.poll() is None:
            self._worker.kill()
            self._worker.wait()
        if self._process_id is not None:  # a supervisor that connects after this one's end would call it lost
            self._connected.wait(GRACE)
        self._send(f"ended {self._process_id} {code}")
        self._pipe.close()
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        if sentence is not None:
            return _print_error(sentence, code)
        self._stderr_reader.join(GRACE)
        if code in ALL_FAIL:
            self._drop_library_messages()
        self._print_stderr(everything=True)
        return code

    def _wait(self) -> tuple[str | None, int]:
        """Wait for the end of the worker, or for a reason to end it.

        Returns: (sentence to print, exit code). None means that the worker's stderr gives the reason.
        """
        peer_error: tuple[str, int] | None = None  # another process's error, which may reach the worker within GRACE
        worker_code: int | None = None  # the worker's exit code while another process may be its cause
        limit = self._deadline
        while True:
            self._send("")
            if worker_code is None:  # the last lines of an ended worker may only reflect another process's end
                self._print_stderr()
            try:
                event, *args = self._events.get(timeout=HEARTBEAT)
            except queue.Empty:
                event = "nothing"
            if event == "lost":
                return lost_sentence(args[0]), LOST
            if event == "ended" and args[1] and peer_error is None:
                sentence = f"process {args[0]} of the run ended with an error; see the output of that process"
                peer_error = sentence, args[1] if args[1] in PERMANENT else LOST
                limit = time.monotonic() + (GRACE if args[1] in ALL_FAIL else 0)
            if event == "joined":
                self._process_id, limit = args[0].process_id, float("inf")
                threading.Thread(target=self._connect_peers, args=args, daemon=True).start()
            if event == "worker":
                worker_code = args[0]
                if worker_code in (0, *ALL_FAIL) or self._process_id is None and worker_code > 0:
                    return None, worker_code
                if worker_code < 0 and worker_code != -signal.SIGABRT:  # JAX aborts when a peer is lost
                    return f"training was ended by {signal.Signals(-worker_code).name}", 128 - worker_code
                # The others wait at most GRACE for the cause, so a worker's own error is sent after a shorter delay.
                own_error = worker_code not in (LOST, -signal.SIGABRT)
                limit = min(limit, time.monotonic() + (STDERR_DELAY if own_error else GRACE))
            if worker_code is not None and peer_error is not None:
                return peer_error
            if time.monotonic() < limit:
                continue
            if self._process_id is None:
                return self._not_joined_sentence(), 2
            if worker_code is not None:
                return None, worker_code if worker_code > 0 else 128 - worker_code
            assert peer_error is not None  # nothing else sets the limit
            return peer_error

    def _not_joined_sentence(self) -> str:
        c = self._cluster
        process = "this process" if c.process_id is None else f"process {c.process_id} of {c.processes}"
        return (
            f"cluster={c.address!r}: {process} did not find all others within {c.timeout} seconds; "
            "start every process, or increase the timeout"
        )

    # Each of the following runs in its own thread.

    def _follow_worker(self) -> None:
        self._events.put(("worker", self._worker.wait()))

    def _follow_pipe(self) -> None:
        with contextlib.suppress(OSError):
            for text in self._pipe.makefile():
                self._events.put(("joined", Rendezvous(**json.loads(text))))

    def _follow_stderr(self) -> None:
        assert self._worker.stderr is not None
        for text in self._worker.stderr:
            self._stderr.append((time.monotonic(), text))

    def _connect_peers(self, rendezvous: Rendezvous) -> None:
        """Connect to process 0's supervisor, or accept the connections of all others there."""
        deadline = time.monotonic() + PEER_TIMEOUT
        try:
            if rendezvous.process_id == 0:
                self._accept_peers(rendezvous, deadline)
            else:
                connection = _connect(rendezvous.hosts, rendezvous.port, deadline)
                connection.sendall(f"{rendezvous.token} {rendezvous.process_id}\n".encode())
                self._peers[0] = connection
                self._connected.set()
                self._follow_peer(0, connection, connection.makefile())
        except OSError:
            missing = set(range(rendezvous.processes)) - {rendezvous.process_id} - self._peers.keys()
            self._events.put(("lost", min(missing)))
        finally:
            self._connected.set()

    def _accept_peers(self, rendezvous: Rendezvous, deadline: float) -> None:
        while len(self._peers) < rendezvous.processes - 1:
            self._server.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = self._server.accept()
            connection.settimeout(1.0)
            lines = connection.makefile()
            with contextlib.suppress(OSError, ValueError):  # other programs may connect to the port
                token, peer = lines.readline().split()
                if token == rendezvous.token:
                    threading.Thread(target=self._follow_peer, args=(int(peer), connection, lines), daemon=True).start()
                    self._peers[int(peer)] = connection

    def _follow_peer(self, peer: int, connection: socket.socket, lines: TextIO) -> None:
        connection.settimeout(PEER_TIMEOUT)
        self._peers[peer] = connection
        with contextlib.suppress(OSError):
            for text in lines:
                message = text.split()
                if message:
                    self._receive(message[0], [int(number) for number in message[1:]])
        if peer not in self._ended:
            self._receive("lost", [peer])

    def _receive(self, event: str, numbers: list[int]) -> None:
        if event == "ended":
            self._ended.add(numbers[0])
        if self._process_id == 0:
            self._send(" ".join(map(str, [event, *numbers])), skip=numbers[0])
        self._events.put((event, *numbers))

    def _send(self, text: str, skip: int | None = None) -> None:
        for peer, connection in list(self._peers.items()):
            if peer != skip:
                with contextlib.suppress(OSError):  # the thread that reads this connection handles its loss
                    connection.sendall((text + "\n").encode())

    def _print_stderr(self, everything: bool = False) -> None:
        while self._stderr and (everything or self._stderr[0][0] < time.monotonic() - STDERR_DELAY):
            sys.stderr.buffer.write(self._stderr.pop(0)[1])
            sys.stderr.flush()

    def _drop_library_messages(self) -> None:
        """Keep this package's sentences alone, if there are any: JAX may log that process 0 failed too."""
        own = [(seconds, text) for seconds, text in self._stderr if text.startswith(b"dsv3: ")]
        self._stderr = own or self._stderr

    def _forward(self, number: int, frame: object) -> None:
        """Send a signal on to the worker."""
        if self._worker.poll() is None:
            self._worker.send_signal(number)


def _quiet_xla() -> dict[str, str]:
    """Return settings under which XLA logs only errors, unless the user chose a level; importing JAX sets 1."""
    return {"TF_CPP_MIN_LOG_LEVEL": "2"} if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1" else {}


def lost_sentence(process: int) -> str:
    """Return the error for a lost process.

    Example:
        >>> lost_sentence(1)
        'process 1 of the run is lost; run the same command again to resume from the last checkpoint'
    """
    return f"process {process} of the run is lost; run the same command again to resume from the last checkpoint"


def _listen() -> socket.socket:
    """Open a socket at a free port of every address."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(hosts: list[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first host that answers, and retry until the deadline. Raises: OSError of the last attempt."""
    while True:
        for host in hosts:
            remaining = deadline - time.monotonic()
            try:
                return socket.create_connection((host, port), timeout=max(min(remaining, 5.0), 0.1))
            except OSError as error:
                last = error
        if time.monotonic() + 0.2 > deadline:
            raise last
        time.sleep(0.2)


def _print_error(sentence: str, code: int) -> int:
    print(f"dsv3: {sentence}", file=sys.stderr, flush=True)
    return code
