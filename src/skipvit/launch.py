"""Start one training process a rank from an HCCL rank table and look after them until the last has ended.

``bash run_distribute_train.sh RANK_TABLE [CONFIG] [key=value ...]`` runs ``main``. The same command with the same
table is given on every server; each launcher starts and supervises the ranks of its own server.

How ranks find each other (``LAUNCHER=``):

* ``classic``, the default on Ascend: each process gets ``RANK_TABLE_FILE``, ``RANK_SIZE``, ``RANK_ID`` and
  ``DEVICE_ID``, and HCCL reads the table itself. MindSpore 2.0 to 2.5 need it.
* ``dynamic``, the default on CPU: they meet at a scheduler, told by ``MS_ROLE``, ``MS_WORKER_NUM``, ``MS_NODE_ID``,
  ``MS_SCHED_HOST`` and ``MS_SCHED_PORT``: the processes and variables that ``msrun`` makes, without msrun, which
  MindSpore 2.0.0 does not have.
* ``msrun``: the same, with every variable that MindSpore's own starter sets. It runs stand-ins that hand these over
  and end; the processes are started here, as in any other start. Left to itself msrun kills its workers on SIGINT and
  exits 0, orphans them on SIGTERM, and may wait for ever after a failure.

Supervision: each rank in a session of its own, its output in ``rank_<i>.log`` and rank 0's on the terminal; SIGINT and
SIGTERM are passed on once (SIGHUP as SIGTERM), ranks then have a grace period to write their checkpoint; a rank that
fails brings all others down; whatever is left of the process tree is killed, also when it has left its session
(PR_SET_CHILD_SUBREAPER), and ranks die with a launcher that is itself killed (PR_SET_PDEATHSIG). A failure on another
server shows here when HCCL gives up waiting (HCCL_EXEC_TIMEOUT). A rank that is done says so (``log.DONE``): where
MindSpore crashes or hangs while the process ends, as 2.0.0 was seen to crash, the training has not failed.

No part of this has run on an NPU. The starts on CPU are tested on MindSpore 2.0.0 and 2.10.0.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__" and "skipvit" not in sys.modules:
    # Run by its path, as run_distribute_train.sh does: config.py is found without the package's __init__, which
    # imports MindSpore. A supervisor has no use for it, and should outlive whatever it does to a rank.
    sys.modules["skipvit"] = types.ModuleType("skipvit")
    sys.modules["skipvit"].__path__ = [os.path.dirname(os.path.abspath(__file__))]

from skipvit.config import UserError, load
from skipvit.log import DONE, Parser, run_command
from skipvit.rank_table import RankTable, Server, address_of, find_server, read_rank_table, this_machine

# ------------------------------------------------------------------------------------------------------------------
# What each rank is given
# ------------------------------------------------------------------------------------------------------------------

# Left over from another start these would send a rank to the wrong job.
INHERITED_NO_MORE = (
    *("RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH", "RANK_SIZE", "RANK_ID", "DEVICE_ID"),
    *("MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID", "MS_SCHED_HOST", "MS_SCHED_PORT"),
)
OF_ONE_RANK = ("MS_NODE_ID", "RANK_ID", "DEVICE_ID")
LAUNCHERS = {"Ascend": ("classic", "dynamic", "msrun"), "CPU": ("dynamic", "msrun")}
STOP_GRACE = {"Ascend": "120", "CPU": "30"}
MSRUN_PORT = 8118  # msrun's default; servers of one job must agree on it without asking each other
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Settings:
    """What the environment decides; run_distribute_train.sh tells each variable and its default.

    Attributes:
        device_target: ``DEVICE_TARGET``.
        launcher: ``LAUNCHER``.
        server_id: ``SERVER_ID``, or None: a server finds itself in the table.
        scheduler_port: ``MS_SCHED_PORT``, or None.
        stop_grace: ``STOP_GRACE``, seconds.
        python: ``PYTHON``, which the ranks are run with.
    """

    device_target: str
    launcher: str
    server_id: str | None
    scheduler_port: int | None
    stop_grace: float
    python: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Read and check the settings; UserError names the variable at fault."""
        target = environment.get("DEVICE_TARGET") or "Ascend"
        if target not in LAUNCHERS:
            raise UserError(f"DEVICE_TARGET={target}: must be Ascend or CPU")
        launcher = environment.get("LAUNCHER") or LAUNCHERS[target][0]
        if launcher not in LAUNCHERS[target]:
            raise UserError(f"LAUNCHER={launcher}: on {target} it must be {' or '.join(LAUNCHERS[target])}")
        port = environment.get("MS_SCHED_PORT") or None
        if port is not None and not (re.fullmatch(r"[0-9]{4,5}", port) and 1024 <= int(port) <= 65535):
            raise UserError(f"MS_SCHED_PORT={port}: must be a port, 1024 to 65535")
        grace = environment.get("STOP_GRACE") or STOP_GRACE[target]
        if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", grace):
            raise UserError(f"STOP_GRACE={grace}: must be a number of seconds")
        return cls(
            device_target=target,
            launcher=launcher,
            server_id=environment.get("SERVER_ID") or None,
            scheduler_port=int(port) if port else None,
            stop_grace=float(grace),
            python=environment.get("PYTHON") or sys.executable,
        )


@dataclass(frozen=True)
class RankPlan:
    """One rank of this machine: who it is, what it finds in its environment, which cores it may use."""

    rank: int
    device_id: int
    server_id: str
    cores: tuple[int, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Scheduler:
    """Where the processes of a dynamic or msrun start meet; ``here`` on the machine that runs it."""

    host: str
    port: int
    here: bool


def local_servers(table: RankTable, settings: Settings) -> tuple[Server, ...]:
    """The servers of the table whose ranks run on this machine: on CPU all of them."""
    if settings.device_target == "CPU":
        return table.servers
    return (find_server(table, this_machine(), settings.server_id),)


def place_scheduler(table: RankTable, local: Sequence[Server], settings: Settings) -> Scheduler | None:
    """Address and port of the scheduler, or None for the classic start, which has none.

    It runs on the server of rank 0, at the first of ``container_ip``, ``host_ip``, ``server_id`` that is an address or
    can be resolved to one; everything that runs on one machine meets at 127.0.0.1.

    Raises:
        UserError: The port is taken here, or the first server has no address.
    """
    if settings.launcher == "classic":
        return None
    first = table.servers[0]
    host = LOOPBACK
    if len(local) < len(table.servers):
        resolved = (address_of(name) or _resolved(name) for name in (*first.names[1:], first.server_id))
        found = next((address for address in resolved if address), None)
        if found is None:
            raise UserError(
                f"rank table {table.path}: server {first.server_id}: all ranks meet there, but its address is not in "
                "the table and cannot be resolved; give host_ip"
            )
        host = found
    wanted = settings.scheduler_port or (0 if settings.device_target == "CPU" else MSRUN_PORT)  # 0: any that is free
    here = first in local
    return Scheduler(host, _free_port(host, wanted) if here else wanted, here)


def _without(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key not in names}


def _resolved(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _free_port(host: str, port: int) -> int:
    """The port, or any for 0, at which a server could listen; sockets of ended connections are no hindrance."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be used: {error.strerror}; if another job has it, choose another with "
                "MS_SCHED_PORT= (the same on every server)"
            ) from None
        return int(probe.getsockname()[1])


def plan_ranks(
    table: RankTable,
    local: Sequence[Server],
    settings: Settings,
    scheduler: Scheduler | None,
    environment: Mapping[str, str],
    cores: Sequence[int],
) -> list[RankPlan]:
    """The ranks of this machine in order of rank, each with its whole environment and its share of the cores.

    Args:
        table: The checked table.
        local: Servers whose ranks run here.
        settings: What the environment decides.
        scheduler: Where they meet; None for the classic start.
        environment: What the ranks inherit.
        cores: The cores this process may use; shared out in equal, neighbouring parts. With fewer cores than ranks
            every rank may use all.
    """
    inherited = _without(environment, INHERITED_NO_MORE)
    defaults = {"PYTHONUNBUFFERED": "1"}  # lines must reach the log when they are printed
    common = {"DEVICE_TARGET": settings.device_target, "RANK_SIZE": str(table.rank_count)}
    if scheduler is None:
        common["RANK_TABLE_FILE"] = str(table.path)
    else:
        common |= {
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": str(table.rank_count),
            "MS_SCHED_HOST": scheduler.host,
            "MS_SCHED_PORT": str(scheduler.port),
        }
        if scheduler.host == LOOPBACK:
            # The interval of the heartbeats by which ranks learn that all have come: on one machine the default of 3
            # to 5 seconds, meant to spare the scheduler of a large cluster, is most of the start.
            defaults |= {"MS_RETRY_INTERVAL_LOWER": "1", "MS_RETRY_INTERVAL_UPPER": "1"}
    members = sorted((device.rank, device.device_id, server) for server in local for device in server.devices)
    plans = []
    for place, (rank, device_id, server) in enumerate(members):
        share = cores[place * len(cores) // len(members) : (place + 1) * len(cores) // len(members)]
        allowed = share if len(cores) >= len(members) else cores
        own = {"RANK_ID": str(rank), "DEVICE_ID": str(device_id)}
        if scheduler is not None:
            own["MS_NODE_ID"] = str(rank)
        threads = {"OMP_NUM_THREADS": str(max(1, len(share)))}
        whole = defaults | threads | inherited | common | own
        plans.append(RankPlan(rank, device_id, server.server_id, tuple(allowed), whole))
    return plans


# ------------------------------------------------------------------------------------------------------------------
# msrun
# ------------------------------------------------------------------------------------------------------------------

UNDER_MSRUN = "--under-msrun"
MSRUN_PATIENCE = 60.0


def given_by_msrun(plans: Sequence[RankPlan], scheduler: Scheduler) -> tuple[list[RankPlan], dict[str, str]]:
    """The ranks of this server with the environments that msrun gives them, and that of a scheduler that belongs here.

    Of msrun's options the oldest are used, which releases before 2.10 should have too.

    Raises:
        UserError: There is no msrun, it failed, or the table numbers its ranks in a way that msrun cannot.
    """
    first = plans[0]
    path = os.pathsep.join([str(Path(sys.executable).parent), first.environment.get("PATH", os.defpath)])
    msrun = shutil.which("msrun", path=path)
    if msrun is None:
        raise UserError("LAUNCHER=msrun: there is no msrun beside this Python; MindSpore has it from 2.3 on")
    if first.rank % len(plans) or plans[-1].rank - first.rank != len(plans) - 1:
        raise UserError(
            f"server {first.server_id}: LAUNCHER=msrun numbers ranks server by server; "
            "this table needs LAUNCHER=dynamic"
        )
    # msrun runs __file__ with the first python that it finds.
    environment = _without(first.environment, INHERITED_NO_MORE) | {"PATH": path}
    wanted = [str(plan.rank) for plan in plans] + ["scheduler"] * scheduler.here
    with tempfile.TemporaryDirectory() as folder:
        command = [
            msrun,
            f"--worker_num={first.environment['RANK_SIZE']}",
            f"--local_worker_num={len(plans)}",
            f"--master_addr={scheduler.host}",
            f"--master_port={scheduler.port}",
            f"--node_rank={first.rank // len(plans)}",
            f"--log_dir={folder}",
            *(os.path.abspath(__file__), UNDER_MSRUN, folder),
        ]
        deadline = time.monotonic() + MSRUN_PATIENCE
        with open(Path(folder, "msrun.txt"), "w+b") as said:
            process = _start(command, environment, (), said, subprocess.STDOUT)
            while process.poll() is None or not all(Path(folder, name).exists() for name in wanted):
                if process.returncode or time.monotonic() > deadline:
                    said.seek(0)
                    last = said.read().decode("utf-8", "replace").strip().split("\n")[-1]
                    raise UserError(f"LAUNCHER=msrun: {msrun} did not start every rank; its last line: {last}")
                time.sleep(POLL_SECONDS)
        given = {name: json.loads(Path(folder, name).read_bytes()) for name in wanted}
    # But not its DEVICE_ID, which counts from 0 whatever the table says.
    own = ({**given[str(plan.rank)], "DEVICE_ID": str(plan.device_id)} for plan in plans)
    return [replace(plan, environment=whole) for plan, whole in zip(plans, own)], given.get("scheduler", {})


def _under_msrun(folder: str) -> None:
    """What msrun runs in the place of a rank or of the scheduler: hand over the environment and end."""
    name = "scheduler" if os.environ["MS_ROLE"] == "MS_SCHED" else os.environ["MS_NODE_ID"]
    unfinished = Path(folder, f"{name}.unfinished")
    unfinished.write_text(json.dumps(dict(os.environ)))
    unfinished.rename(Path(folder, name))


# ------------------------------------------------------------------------------------------------------------------
# Processes, and what they print
# ------------------------------------------------------------------------------------------------------------------

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)
TAIL_LINES = 20
PIPE_BYTES = 2**16
# What MindSpore prints of itself: what is no error stays in the log and off the terminal.
FRAMEWORK_CHATTER = re.compile(rb"\[(DEBUG|INFO|WARNING|EVENT)\] ")


class Child:
    """A process in a session of its own, and its log.

    What it prints is copied to the log line by line, and to the terminal with ``on_terminal``: standard output to
    standard output and standard error to standard error, so that the last line of standard output is the rank's.

    Attributes:
        name: How messages call it.
        exit_code: None while it runs, 128 + n when signal n ended it (0 where it was done).
        has_begun: Whether it has said something on standard output, which bad input keeps it from.
        is_done: Whether it has said ``log.DONE``: a crash from then on is no failure.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        cores: Sequence[int] = (),
        on_terminal: bool = False,
    ) -> None:
        """Start it; UserError where it cannot be started or its log cannot be written."""
        self.name, self.log_path, self.on_terminal = name, log_path, on_terminal
        self.exit_code: int | None = None
        self.has_begun = self.is_done = False
        try:
            self._log = log_path.open("ab", buffering=0)  # a resumed run keeps the logs of the one before
            self._log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
            self._log_start = self._log.tell()
        except OSError as error:
            raise UserError(f"{log_path} cannot be written: {error.strerror}") from None
        self.process = _start(command, environment, cores, subprocess.PIPE, subprocess.PIPE)
        # By stream: the line that has not ended yet.
        self._unfinished: dict[Any, bytes] = {self.process.stdout: b"", self.process.stderr: b""}
        for stream in self.streams:
            os.set_blocking(stream.fileno(), False)

    @property
    def streams(self) -> list[Any]:
        """What select can wait for."""
        return list(self._unfinished)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        code = self.process.poll()
        if self.exit_code is None and code is not None:
            self.exit_code = code if code >= 0 else 128 - code
            self.copy()  # its last words
            if self.is_done and self.exit_code > 128:
                _say(f"{self.name} {self.how_it_ended()} when it was done, which is no failure")
                self.exit_code = 0
        return self.exit_code

    def how_it_ended(self) -> str:
        """Its exit code in words."""
        code = self.exit_code or 0
        if code > 128:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(code - 128).name}"
        return f"ended with exit code {code}"

    def copy(self) -> bool:
        """Take over what it has printed, without waiting; whether there was anything."""
        copied = False
        for stream, unfinished in list(self._unfinished.items()):
            chunk = stream.read(PIPE_BYTES)
            if chunk is None:  # nothing yet
                continue
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            if unfinished and (not chunk or len(unfinished) > PIPE_BYTES):
                lines, unfinished = [*lines, unfinished], b""
            self.has_begun |= bool(lines) and stream is self.process.stdout
            for line in lines:
                self._take(line, sys.stderr if stream is self.process.stderr else sys.stdout)
            if chunk:
                self._unfinished[stream] = unfinished
                copied = True
            else:
                del self._unfinished[stream]
        return copied

    def _take(self, line: bytes, terminal: Any) -> None:
        with contextlib.suppress(OSError):  # the disk is full: the training may still go on
            self._log.write(line + b"\n")
        if line == DONE.encode():
            self.is_done = True
        elif self.on_terminal and not FRAMEWORK_CHATTER.match(line):
            try:
                terminal.buffer.write(line + b"\n")
                terminal.flush()
            except OSError:
                # A reader such as head has gone; the training has not.
                self.on_terminal = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.fileno())

    def printed(self, at_most: int = 2**20) -> bytes:
        """The end of what it has printed, from its log."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, os.stat(log.fileno()).st_size - at_most))
            return log.read()

    def last_lines(self) -> list[str]:
        """The last 20 lines of its log, without MindSpore's chatter."""
        lines = [line for line in self.printed(PIPE_BYTES).splitlines() if not FRAMEWORK_CHATTER.match(line)]
        return [line[:2000].decode("utf-8", "replace").rstrip() for line in lines[-TAIL_LINES:]]


def _start(
    command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int], stdout: Any, stderr: Any
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that the terminal's Ctrl-C reaches it through us alone."""
    parent = os.getpid()

    def prepare() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was killed in between, and nobody would ever end this one
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    try:
        return subprocess.Popen(
            list(command),
            bufsize=0,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=prepare,
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"run_distribute_train: {line}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------
# Supervision
# ------------------------------------------------------------------------------------------------------------------

POLL_SECONDS = 0.1
# After a failure there is no next step to wait for, but a checkpoint that is being written may be finished.
FAILURE_GRACE = 10.0
# Bad input is met by every rank within moments: let them all say so, and the message is nobody's in particular.
BAD_INPUT_PATIENCE = 10.0
# A scheduler ends when all ranks have left it, which then end too; if it goes before, they may wait for it for ever.
SCHEDULER_PATIENCE = 30.0
KILL_PATIENCE = 10.0
BAD_INPUT = 2
# MindSpore 2.0.0's scheduler says so when it is ready for a rank, and again whenever one has registered.
READY_FOR_ANOTHER = re.compile(rb"Start server succ|The new node: \S+\(role: MS_WORKER\).* is registered successfully")
# And so when it has not heard of one for 30 seconds.
GAVE_A_RANK_UP = re.compile(rb"The total number of timed out node is")
MEETINGS = 10  # at most, where it gives ranks up


def numbers_ranks_by_registration() -> bool:
    """Whether MindSpore here is older than 2.3, the first release with msrun: its ranks start one by one.

    2.0.0 numbers ranks in the order in which they register, whatever MS_NODE_ID says. Started together they also lost
    replies of the scheduler in half of the trials there (2 ranks, 2 cores), one by one in 3 of 26, and in half on a
    busy machine; init() then ends after 40 seconds with "The state of the cluster is error, total nodes num: 2,
    abnormal nodes num: 1". So there they meet anew, see ``launch``.
    """
    try:
        major, minor = re.findall(r"[0-9]+", metadata.version("mindspore"))[:2]
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) < (2, 3)


class Supervisor:
    """Starts the ranks of this machine and sees them through to their end.

    A context manager: however its block is left, no process below this one remains.

    Args:
        log_dir: Where ``rank_<i>.log`` go.
        stop_grace: Seconds that ranks have to end after a signal.
    """

    def __init__(self, log_dir: Path, stop_grace: float) -> None:
        self.log_dir = log_dir
        self.stop_grace = stop_grace
        self.ranks: list[Child] = []
        self.scheduler: Child | None = None
        self._one_by_one = False
        self._signal: int | None = None

    def __enter__(self) -> Supervisor:
        """Take signals, and what our descendants leave behind."""
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._note_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process."""
        left = self._kill_everything()
        if left:
            _say(f"processes {left} do not end even when killed; they may hold their devices")

    def start_scheduler(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process at which ranks meet."""
        self._one_by_one = numbers_ranks_by_registration()
        if self._one_by_one:
            environment = {**environment, "GLOG_v": "1"}  # the level at which it says when it is ready
        self.scheduler = Child("the scheduler", command, environment, self.log_dir / "scheduler.log")

    def run(self, plans: Sequence[RankPlan], command: Sequence[str]) -> None:
        """Start the ranks in order and wait until they and all below them have ended; for the first time or again."""
        self.ranks = []
        self._odd_since: float | None = None
        self._done_since: float | None = None
        # Once ranks were told to end: when they are killed, and which had failed of themselves by then.
        self._deadline: float | None = None
        self._failed: list[Child] = []
        waiting = deque(plans)
        while waiting or any(rank.exit_code is None for rank in self.ranks):
            if self._deadline is None:
                self._stop_where_there_is_reason()
            if self._deadline is not None:
                waiting.clear()
                if time.monotonic() > self._deadline:
                    break
            elif self._only_their_end_is_left():
                break
            elif waiting and self._may_start_another():
                self._start_rank(waiting.popleft(), command)
            self._copy_output()
            for child in self._children():
                child.poll()
        self._kill_everything()  # those that did not end of themselves keep no exit code
        for rank in self.ranks:
            if rank.exit_code is None and rank.is_done:
                _say(f"{rank.name} did not end when it was done and was killed, which is no failure")
                rank.exit_code = 0
        while sum(child.copy() for child in self._children()):
            pass

    def met_in_vain(self) -> bool:
        """Whether the scheduler lost one of the ranks before any of them had begun, so that they may be run again."""
        if not self._one_by_one or self.scheduler is None or self._signal is not None:
            return False
        begun = any(rank.has_begun for rank in self.ranks)
        return not begun and GAVE_A_RANK_UP.search(self.scheduler.printed()) is not None

    def _only_their_end_is_left(self) -> bool:
        """Whether all ranks that still run were done so long ago that they hang."""
        running = [rank for rank in self.ranks if rank.exit_code is None]
        if not running or not all(rank.is_done for rank in running):
            return False
        now = time.monotonic()
        self._done_since = self._done_since or now
        return now > self._done_since + self.stop_grace

    def _may_start_another(self) -> bool:
        if not self._one_by_one or self.scheduler is None:
            return True
        return len(READY_FOR_ANOTHER.findall(self.scheduler.printed())) > len(self.ranks)

    def _start_rank(self, plan: RankPlan, command: Sequence[str]) -> None:
        name = f"rank {plan.rank} (server {plan.server_id}, device {plan.device_id})"
        log_path = self.log_dir / f"rank_{plan.rank}.log"
        self.ranks.append(Child(name, command, plan.environment, log_path, plan.cores, on_terminal=plan.rank == 0))

    def _copy_output(self) -> None:
        select.select([stream for child in self._children() for stream in child.streams], [], [], POLL_SECONDS)
        for child in self._children():
            child.copy()

    def _stop_where_there_is_reason(self) -> None:
        """Tell the ranks to end after a signal, where one has failed, or where the scheduler has gone."""
        now = time.monotonic()
        failed = [rank for rank in self.ranks if rank.exit_code]
        scheduler_gone = self.scheduler is not None and self.scheduler.exit_code is not None
        if any(rank.is_done for rank in self.ranks):
            scheduler_gone = False  # ranks no longer need each other; it gives those up that crashed as they ended
        if self._signal is None:
            if not failed and not scheduler_gone:
                return
            self._odd_since = self._odd_since or now
            at_once = any(rank.exit_code != BAD_INPUT for rank in failed)
            patience = BAD_INPUT_PATIENCE if failed else SCHEDULER_PATIENCE
            if not at_once and now < self._odd_since + min(patience, self.stop_grace):
                return
            grace = min(FAILURE_GRACE, self.stop_grace)
            self._failed = failed
        else:
            grace = self.stop_grace
            _say(f"{signal.Signals(self._signal).name}: the ranks have {grace:g} seconds to end")
        self._deadline = now + grace
        for rank in self.ranks:
            if rank.exit_code is None:
                # To the rank alone, not to its data workers: it needs them to finish its step.
                rank.process.send_signal(signal.SIGINT if self._signal == signal.SIGINT else signal.SIGTERM)

    def verdict(self) -> int:
        """How the run ended, with the reason on standard error.

        Returns:
            0 when every rank ended well. After a failure the worst exit code of the ranks that failed of themselves,
            after a signal the worst of all; 128 + n stands for an end by signal n.
        """
        told = self._deadline is not None
        if told and self._signal is not None and not self._failed:
            for rank in self.ranks:
                if rank.exit_code is None:
                    _say(f"{rank.name} did not end within {self.stop_grace:g} seconds and was killed")
                    rank.exit_code = 128 + signal.SIGKILL
            return max((rank.exit_code or 0 for rank in self.ranks), default=128 + self._signal)
        failed = self._failed if told else [rank for rank in self.ranks if rank.exit_code]
        if failed:
            return self._report(failed)
        if told and self.scheduler is not None:
            self._show_log(self.scheduler)
            _say(f"the scheduler {self.scheduler.how_it_ended()} before the ranks; they were stopped")
            return self.scheduler.exit_code or 1
        return 0

    def _report(self, failed: Sequence[Child]) -> int:
        """Say which rank failed and how; bad input, which is no rank's own, is one line unless the run had begun."""
        begun = any(rank.has_begun for rank in self.ranks)
        if not begun and all(rank.exit_code == BAD_INPUT for rank in failed):
            if not any(rank.on_terminal for rank in failed):
                first = failed[0]
                errors = [line for line in first.last_lines() if line.startswith("error: ")]
                reason = errors[-1] if errors else f"exit code 2 without a word in {first.log_path}"
                print(f"{first.name}: {reason}", file=sys.stderr, flush=True)
            return BAD_INPUT
        first = next((rank for rank in failed if rank.exit_code != BAD_INPUT), failed[0])
        self._show_log(first)
        _say(f"{first.name} {first.how_it_ended()}; every other rank was stopped")
        return max(rank.exit_code or 0 for rank in failed)

    def _show_log(self, child: Child) -> None:
        _say(f"the last lines of {child.log_path}:")
        with contextlib.suppress(OSError):
            for line in child.last_lines():
                print(f"    {line}", file=sys.stderr)

    def _note_signal(self, number: int, _: object) -> None:
        # Only the first counts: a batch system may send several, and each rank is told once.
        self._signal = self._signal or number

    def _children(self) -> list[Child]:
        return [*self.ranks, self.scheduler] if self.scheduler else self.ranks

    def _kill_everything(self) -> list[int]:
        """Kill all descendants, also those that left their session; return the ids that do not die."""
        deadline = time.monotonic() + KILL_PATIENCE
        while True:
            for child in self._children():
                child.process.poll()
            left = psutil.Process().children(recursive=True)
            if not left or time.monotonic() > deadline:
                return [process.pid for process in left]
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                    process.kill()
                    os.waitpid(process.pid, os.WNOHANG)  # adopted when its parent ended: nobody else buries it
            time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------------

# In PyNative mode, its default, 2.0.0 refuses: "PyNative mode is not supported in dynamic networking for now."
SCHEDULER_PROGRAM = (
    "import mindspore; from mindspore.communication import init; "
    "mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target='CPU'); init('mccl')"
)

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = {"Ascend": "configs/imagenet/skipvit_small.yaml", "CPU": "configs/clutter/skipvit.yaml"}
EPILOG = """\
Settings in the environment (DEVICE_TARGET, LAUNCHER, SERVER_ID, ...): bash run_distribute_train.sh --help lists them.

Example, 20 steps on the CPU of this machine, with as many ranks as the table has:
  DEVICE_TARGET=CPU bash run_distribute_train.sh rank_table_2p.json configs/clutter/skipvit.yaml \\
      train.max_steps=20 train.output=runs/two_ranks
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """``rank_table``, ``config`` (None without one) and ``overrides``."""
    parser = Parser(
        prog="bash run_distribute_train.sh",
        usage="%(prog)s RANK_TABLE [CONFIG] [key=value ...]",
        description="Train with one process for each rank of an HCCL rank table: the same command on every server.",
        epilog=EPILOG,
    )
    configs = f"{DEFAULT_CONFIG['Ascend']}, on CPU {DEFAULT_CONFIG['CPU']}"
    parser.add_argument("rank_table", metavar="RANK_TABLE", help="an HCCL rank table, as hccl_tools.py writes it")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"a recipe ({configs})")
    key_help = "override any key, such as train.epochs=10"
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=key_help)
    arguments = parser.parse_args(argv)
    # The first is a recipe unless it is an override; the path of a recipe may hold a = too.
    if arguments.config is not None and "=" in arguments.config and not os.path.exists(arguments.config):
        arguments.overrides = [arguments.config, *arguments.overrides]
        arguments.config = None
    return arguments


def launch(rank_table: str | Path, program: Sequence[str], log_dir: Path) -> int:
    """Check the table, start this machine's ranks, wait for them.

    Where MindSpore 2.0.0 loses a message as they meet, they are started anew, up to 10 times in all; unless there are
    several servers, whose launchers know nothing of each other.

    Args:
        rank_table: The table's file.
        program: What each rank runs: arguments for the Python of ``PYTHON``.
        log_dir: Where ``rank_<i>.log`` go; made where it is not there.

    Returns:
        The exit code, see ``Supervisor.verdict``.

    Raises:
        UserError: Anything found wrong before the ranks run.
    """
    settings = Settings.of(os.environ)
    table = read_rank_table(rank_table)
    local = local_servers(table, settings)
    scheduler = place_scheduler(table, local, settings)
    plans = plan_ranks(table, local, settings, scheduler, os.environ, sorted(os.sched_getaffinity(0)))
    with _only_one_in(log_dir), Supervisor(log_dir, settings.stop_grace) as supervisor:
        of_scheduler = _without(plans[0].environment, OF_ONE_RANK) | {"MS_ROLE": "MS_SCHED"}
        if scheduler is not None and settings.launcher == "msrun":
            plans, of_scheduler = given_by_msrun(plans, scheduler)
        ranks = ", ".join(str(plan.rank) for plan in plans)
        where = f", scheduler {scheduler.host}:{scheduler.port}" if scheduler else ""
        _say(
            f"ranks {ranks} of {table.rank_count} on {settings.device_target}, "
            f"{settings.launcher} start{where}; logs in {log_dir}"
        )
        meetings = MEETINGS if len(local) == len(table.servers) else 1
        for left in reversed(range(meetings)):
            if scheduler is not None and scheduler.here:
                supervisor.start_scheduler([settings.python, "-c", SCHEDULER_PROGRAM], of_scheduler)
            supervisor.run(plans, [settings.python, *program])
            if not left or not supervisor.met_in_vain():
                break
            _say(f"MindSpore's scheduler lost a rank before the start; starting again, at most {left} times")
        return supervisor.verdict()


@contextlib.contextmanager
def _only_one_in(log_dir: Path) -> Iterator[None]:
    """Refuse a second launch of this machine into the same folder: both would write the same files."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        lock = (log_dir / f"launch_{socket.gethostname()}.lock").open("w")
    except OSError as error:
        raise UserError(f"{log_dir}: no place for logs: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{log_dir}: another launch is running in this folder; choose another train.output="
            raise UserError(message) from None
        except OSError:
            pass  # a file system without locks, such as some NFS mounts
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see ``--help``. Returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 2 and argv[0] == UNDER_MSRUN:
        _under_msrun(argv[1])
        return 0
    arguments = parse_arguments(argv)
    config = arguments.config or str(REPOSITORY / DEFAULT_CONFIG[Settings.of(os.environ).device_target])
    # Loaded here too, so that a mistake in it is told once and before any rank starts.
    output = load(config, arguments.overrides).train.output
    return launch(arguments.rank_table, ["-m", "skipvit.train", config, *arguments.overrides], Path(output) / "logs")


if __name__ == "__main__":
    sys.exit(run_command(main))
