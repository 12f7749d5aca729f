"""The launcher: what each rank is given, and that whatever happens to one, none is left behind.

All tests of processes start the real command, with a stand-in for Python that plays the ranks; two of them add numbers
up over 2 ranks of the real MindSpore.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from test_rank_table import table_of, write

from skipvit import launch, log
from skipvit.config import UserError
from skipvit.launch import Settings, plan_ranks
from skipvit.rank_table import read_rank_table

pytestmark = pytest.mark.slow  # the same on every MindSpore: not in the fast part for 2.0.0

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "src/skipvit/launch.py"
CONFIG = ROOT / "configs/clutter/skipvit.yaml"
PATIENCE = 120  # seconds until a test gives up, on a machine that is busy with other things

# What plays the rank: a few names that every part needs, then the part itself.
STAND_IN = """
import json, os, signal, subprocess, sys, time
rank, ranks = int(os.environ["RANK_ID"]), int(os.environ["RANK_SIZE"])
record = os.environ["RECORD"]

def note(name, text=""):
    with open(os.path.join(record, f"{name}_{rank}"), "a") as file:
        file.write(text)

def wait_for(*names):
    while not all(os.path.exists(os.path.join(record, name)) for name in names):
        time.sleep(0.01)

def everybody(name):
    return [f"{name}_{other}" for other in range(ranks)]
"""


def here(table, number=0):
    """The table as it looks on its server ``number``: that one's id is an address of this machine."""
    table["server_list"][number]["server_id"] = "127.0.0.1"
    return table


class Launch:
    """The command, started in a folder of its own with a stand-in for Python; every process of it carries a tag.

    Args:
        folder: with the table, the stand-in, the record of what ranks note, and the logs.
        part: what each rank does, after STAND_IN. The scheduler is the real one.
        table: the rank table.
        *arguments: further ones of the command.
        flags: of the Python that runs the part; by default it has the standard library alone and starts faster.
        **environment: of the command.
    """

    def __init__(self, folder, part, table, *arguments, flags="-S", **environment):
        self.folder, self.tag = folder, str(uuid.uuid4())
        self.record, self.logs = folder / "record", folder / "logs"
        self.record.mkdir(parents=True, exist_ok=True)
        (folder / "part.py").write_text(STAND_IN + part)
        stand_in = folder / "python"
        stand_in.write_text(
            f'#!/bin/sh\n[ "$1 $2" = "-m skipvit.train" ] || exec "{sys.executable}" "$@"\n'
            f'exec "{sys.executable}" {flags} "{folder / "part.py"}" "$@"\n'
        )
        stand_in.chmod(0o755)
        settings = {"PYTHON": str(stand_in), "RECORD": str(self.record), "TAG": self.tag, **environment}
        self.process = subprocess.Popen(
            [sys.executable, LAUNCH, write(folder, table), CONFIG, f"train.output={folder}", *arguments],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )

    def wait_for(self, *names):
        deadline = time.monotonic() + PATIENCE
        while not all((self.record / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} never came"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def end(self):
        """Exit code, standard output, standard error; and nobody is left."""
        out, error = self.process.communicate(timeout=PATIENCE)
        assert not self.left()
        return self.process.returncode, out, error

    def left(self):
        """Ids of the processes of this launch that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TAG") == self.tag and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def log(self, rank):
        return (self.logs / f"rank_{rank}.log").read_text()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start launches that are ended with the test, whatever becomes of it."""
    for name in ("DEVICE_TARGET", "LAUNCHER", "SERVER_ID", "STOP_GRACE", "MS_SCHED_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def starter(part, *arguments, table=None, folder=tmp_path, **environment):
        started.append(Launch(folder, part, table or here(table_of(1, 2)), *arguments, **environment))
        return started[-1]

    yield starter
    for launched in started:
        launched.process.kill()
        for pid in launched.left():
            os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------- what ranks are given

FOUR = ("RANK_TABLE_FILE", "RANK_SIZE", "RANK_ID", "DEVICE_ID")
RECORD_ENVIRONMENT = """
note("environment", json.dumps([sys.argv[1:], dict(os.environ), sorted(os.sched_getaffinity(0))]))
"""


def recorded(folder):
    ranks = (json.loads(path.read_text()) for path in (folder / "record").iterdir())
    return sorted(ranks, key=lambda rank: int(rank[1]["RANK_ID"]))


@pytest.mark.parametrize("how", ["address", "SERVER_ID"])
def test_two_servers_of_eight_devices(start, tmp_path, how):
    """The same command on both servers starts 16 ranks, each with the four variables of the classic start."""
    found = []
    for number in range(2):
        folder = tmp_path / f"server {number}"
        if how == "address":
            launched = start(RECORD_ENVIRONMENT, "train.epochs=2", table=here(table_of(), number), folder=folder)
        else:
            by_name = {"RANK_ID": "77", "MS_ROLE": "MS_WORKER", "SERVER_ID": f"10.0.0.{number + 1}"}
            launched = start(RECORD_ENVIRONMENT, "train.epochs=2", table=table_of(), folder=folder, **by_name)
        assert launched.end()[0] == 0
        for rank, (arguments, environment, _) in enumerate(recorded(folder), start=8 * number):
            assert arguments == ["-m", "skipvit.train", str(CONFIG), f"train.output={folder}", "train.epochs=2"]
            table = str(folder / "rank table.json")
            assert [environment[name] for name in FOUR] == [table, "16", str(rank), str(rank % 8)]
            assert environment["DEVICE_TARGET"] == "Ascend"
            assert "MS_ROLE" not in environment
            found.append(rank)
    assert found == list(range(16))


def test_no_server_is_this_one(start):
    code, out, error = start(RECORD_ENVIRONMENT, table=table_of()).end()
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert error.startswith("error: rank table ")
    assert "the table holds 10.0.0.1, 10.0.0.2; say which one this is with SERVER_ID=," in error


def test_each_rank_has_its_share_of_the_cores(start, tmp_path):
    assert start(RECORD_ENVIRONMENT).end()[0] == 0
    cores = sorted(os.sched_getaffinity(0))
    (_, first, cores_of_first), (_, second, cores_of_second) = recorded(tmp_path)
    if len(cores) > 1:
        assert cores_of_first + cores_of_second == cores
        assert [first["OMP_NUM_THREADS"], second["OMP_NUM_THREADS"]] == [
            str(len(cores_of_first)),
            str(len(cores_of_second)),
        ]


def plans_for(tmp_path, environment, cores, table=None, scheduler=None):
    read = read_rank_table(write(tmp_path, table or here(table_of(1, 4))))
    settings = Settings.of(environment)
    local = launch.local_servers(read, settings)
    scheduler = scheduler or launch.place_scheduler(read, local, settings)
    return plan_ranks(read, local, settings, scheduler, environment, cores)


def test_shares_of_the_cores(tmp_path):
    """Neighbouring cores, none to two ranks; with too few everybody may use all."""
    many = plans_for(tmp_path, {}, list(range(2, 21)))
    assert [plan.cores for plan in many] == [(2, 3, 4, 5), (6, 7, 8, 9, 10), (11, 12, 13, 14, 15), (16, 17, 18, 19, 20)]
    assert [plan.environment["OMP_NUM_THREADS"] for plan in many] == ["4", "5", "5", "5"]
    few = plans_for(tmp_path, {}, [0, 1, 2])
    assert {plan.cores for plan in few} == {(0, 1, 2)}
    assert {plan.environment["OMP_NUM_THREADS"] for plan in few} == {"1"}
    own = plans_for(tmp_path, {"OMP_NUM_THREADS": "3"}, list(range(8)))
    assert {plan.environment["OMP_NUM_THREADS"] for plan in own} == {"3"}


def test_on_cpu_all_ranks_of_the_table_run_here(tmp_path):
    left_over = {"RANK_TABLE_FILE": "of another job", "MS_NODE_ID": "5", "MS_WORKER_NUM": "9", "HOME": "kept"}
    plans = plans_for(tmp_path, {"DEVICE_TARGET": "CPU", **left_over}, [0, 1], table=table_of(2, 2))
    assert [plan.rank for plan in plans] == [0, 1, 2, 3]
    for rank, plan in enumerate(plans):
        expected = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "MS_NODE_ID": str(rank), "RANK_ID": str(rank)}
        expected |= {"MS_SCHED_HOST": "127.0.0.1", "RANK_SIZE": "4", "DEVICE_TARGET": "CPU", "HOME": "kept"}
        assert plan.environment.items() >= expected.items()
        assert "RANK_TABLE_FILE" not in plan.environment
    assert len({plan.environment["MS_SCHED_PORT"] for plan in plans}) == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"server_id": "node_0", "host_ip": "172.16.0.1"}, "172.16.0.1"),
        ({"server_id": "node_0", "host_ip": "172.16.0.1", "container_ip": "10.244.0.1"}, "10.244.0.1"),
        ({"server_id": "10.0.0.1"}, "10.0.0.1"),
        ({"server_id": "localhost"}, "127.0.0.1"),
    ],
)
def test_several_servers_meet_at_the_first(tmp_path, names, expected):
    table = table_of(2, 1)
    table["server_list"][0].update(names)
    read = read_rank_table(write(tmp_path, table))
    settings = Settings.of({"LAUNCHER": "dynamic"})
    scheduler = launch.place_scheduler(read, read.servers[1:], settings)
    assert (scheduler.host, scheduler.port, scheduler.here) == (expected, 8118, False)


def test_several_servers_with_no_address_to_meet_at(tmp_path):
    table = table_of(2, 1)
    table["server_list"][0]["server_id"] = "node_0.invalid"
    read = read_rank_table(write(tmp_path, table))
    with pytest.raises(UserError, match=r"server node_0\.invalid: .*; give host_ip"):
        launch.place_scheduler(read, read.servers[1:], Settings.of({"LAUNCHER": "dynamic"}))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DEVICE_TARGET": "GPU"}, "DEVICE_TARGET=GPU: must be Ascend or CPU"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: on Ascend it must be classic or dynamic or msrun"),
        ({"DEVICE_TARGET": "CPU", "LAUNCHER": "classic"}, "LAUNCHER=classic: on CPU it must be dynamic or msrun"),
        ({"MS_SCHED_PORT": "80"}, "MS_SCHED_PORT=80: must be a port, 1024 to 65535"),
        ({"MS_SCHED_PORT": "123200"}, "MS_SCHED_PORT=123200: must be a port, 1024 to 65535"),
        ({"STOP_GRACE": "-1"}, "STOP_GRACE=-1: must be a number of seconds"),
    ],
)
def test_settings_are_checked(environment, message):
    with pytest.raises(UserError) as caught:
        Settings.of(environment)
    assert str(caught.value) == message


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "config", "overrides"),
    [
        (["t"], None, []),
        (["t", "a.yaml"], "a.yaml", []),
        (["t", "train.epochs=2", "skip=null"], None, ["train.epochs=2", "skip=null"]),
        (["t", "a b.yaml", "train.epochs=2"], "a b.yaml", ["train.epochs=2"]),
    ],
)
def test_arguments(argv, config, overrides):
    arguments = launch.parse_arguments(argv)
    assert (arguments.rank_table, arguments.config, arguments.overrides) == ("t", config, overrides)


def test_a_recipe_may_have_an_equals_sign_in_its_path(tmp_path):
    path = tmp_path / "lr=1" / "recipe.yaml"
    path.parent.mkdir()
    path.touch()
    assert launch.parse_arguments(["t", str(path)]).config == str(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "the following arguments are required: RANK_TABLE; bash run_distribute_train.sh --help tells what there is",
        ),
        (["table.json", "--ranks=2"], "unrecognized arguments: --ranks=2; "),
        (["table.json", "none.yaml"], "none.yaml: cannot be read"),
        (["table.json", "train.epoch=2"], "train.epoch"),
        (["none.json", str(CONFIG)], "rank table none.json: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")
    assert log.run_command(launch.main, argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_help_tells_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        launch.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for part in ("configs/clutter/skipvit.yaml", "configs/imagenet/skipvit_small.yaml", "DEVICE_TARGET=CPU bash"):
        assert part in out


# ------------------------------------------------------------------------------------------------ what is printed


def test_rank_0_is_shown_and_every_rank_has_a_log(start):
    part = """
print(f"step 1 of rank {rank}")
print(f"progress of rank {rank}", file=sys.stderr)
print("[WARNING] ME(1,7f,python): of no interest", file=sys.stderr)
print("[ERROR] ME(1,7f,python): of interest", file=sys.stderr)
sys.stdout.write(json.dumps({"rank": rank}))
sys.stdout.flush()
print("[INFO] PS(1,7f,python): after the end", file=sys.stderr)
"""
    launched = start(part)
    code, out, error = launched.end()
    assert code == 0
    assert out == 'step 1 of rank 0\n{"rank": 0}\n'
    first, *shown = error.splitlines()
    assert first.startswith("run_distribute_train: ranks 0, 1 of 2 on Ascend, classic start; logs in ")
    assert shown == ["progress of rank 0", "[ERROR] ME(1,7f,python): of interest"]
    for rank in range(2):
        lines = launched.log(rank).splitlines()[1:]
        assert {f"step 1 of rank {rank}", json.dumps({"rank": rank}), f"progress of rank {rank}"} <= set(lines)
        assert "[WARNING] ME(1,7f,python): of no interest" in lines
        assert len(lines) == 6


def test_much_output_is_neither_lost_nor_waited_for(start):
    part = """
line = "x" * 99
for number in range(30_000):
    print(line)
sys.stdout.write("y" * 300_000)  # and one line without an end
"""
    launched = start(part)
    code, out, _ = launched.end()
    assert code == 0
    for text in (out, launched.log(1).split("\n", 1)[1]):
        assert text.count("x") == 30_000 * 99
        assert text.count("y") == 300_000


def test_a_reader_that_goes_away_ends_nothing(start):
    launched = start("for number in range(2000): print(number, 'x' * 500)\nnote('done')\n")
    launched.process.stdout.readline()
    launched.process.stdout.close()
    launched.process.stdout = open(os.devnull)  # noqa: SIM115 communicate() closes it
    assert launched.end()[0] == 0
    assert (launched.record / "done_0").exists()
    assert launched.log(0).count("\n") == 2001


# --------------------------------------------------------------------------------------------- failures of ranks

WAIT_FOR_EVER = "note('ready')\nwhile True: time.sleep(1)\n"


def test_a_rank_that_fails_brings_the_others_down(start):
    part = f"""
if rank == 2:
    wait_for("ready_0", "ready_1", "ready_3")
    print("a traceback, say", file=sys.stderr)
    print("[INFO] DISTRIBUTED(1,7f,python): after the end", file=sys.stderr)
    sys.exit(3)
{WAIT_FOR_EVER}"""
    launched = start(part, table=here(table_of(1, 4)))
    code, _, error = launched.end()
    assert code == 3
    *_, heading, line, verdict = error.splitlines()
    assert heading == f"run_distribute_train: the last lines of {launched.logs / 'rank_2.log'}:"
    assert line == "    a traceback, say"
    assert verdict == (
        "run_distribute_train: rank 2 (server 127.0.0.1, device 2) ended with exit code 3; every other rank was stopped"
    )


def test_a_rank_that_is_killed(start):
    launched = start(f"note('pid', str(os.getpid()))\n{WAIT_FOR_EVER}")
    launched.wait_for("ready_0", "ready_1")
    os.kill(int((launched.record / "pid_1").read_text()), signal.SIGKILL)
    code, _, error = launched.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 (server 127.0.0.1, device 1) was ended by SIGKILL; every other rank was stopped" in error


def test_a_rank_that_crashes_when_it_is_done(start):
    """It has not failed, and the others are let finish."""
    part = f"""
if rank == 1:
    print({log.DONE!r}, file=sys.stderr, flush=True)
    note("done")
    os.kill(os.getpid(), signal.SIGSEGV)
wait_for("done_1")
time.sleep(1)
print(f"rank {{rank}} has finished")"""
    code, out, error = start(part).end()
    assert (code, out) == (0, "rank 0 has finished\n")
    assert error.splitlines()[-1] == (
        "run_distribute_train: rank 1 (server 127.0.0.1, device 1) was ended by SIGSEGV when it was done, which is "
        "no failure"
    )


def test_a_rank_that_hangs_when_it_is_done(start):
    """It has not failed either, and its device is wanted: it is killed."""
    part = f"""
print("a result")
print({log.DONE!r}, file=sys.stderr, flush=True)
if rank == 1:
    time.sleep(1000)"""
    code, out, error = start(part, STOP_GRACE="1").end()
    assert (code, out) == (0, "a result\n")
    assert error.splitlines()[-1] == (
        "run_distribute_train: rank 1 (server 127.0.0.1, device 1) did not end when it was done and was killed, which "
        "is no failure"
    )


@pytest.mark.parametrize(("how", "code"), [("kill -SEGV $$", 0), ("exit 139", 0), ("exit 3", 3)])
def test_last_words_count_though_they_are_heard_after_the_end(tmp_path, how, code):
    child = launch.Child("rank 0", ["sh", "-c", f"echo '{log.DONE}' >&2; {how}"], os.environ, tmp_path / "log")
    child.process.wait()
    assert child.poll() == code


def test_ranks_that_do_not_listen_are_killed(start):
    part = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    wait_for("ready_1")
    sys.exit(5)
{WAIT_FOR_EVER}"""
    launched = start(part, STOP_GRACE="0.5")
    assert launched.end()[0] == 5


def test_the_exit_code_is_that_of_the_ranks_that_failed_of_themselves(start):
    """Not the 143 of those that were told to end."""
    part = f"""
if rank == 1:
    wait_for("ready_0")
    sys.exit(7)
{WAIT_FOR_EVER}"""
    assert start(part).end()[0] == 7


def test_what_ranks_leave_behind_is_ended_too(start):
    """Children of ranks, also those that went into a session of their own and whose parent has gone."""
    part = """
for session in (False, True):
    subprocess.Popen(["sleep", "1000"], start_new_session=session)
subprocess.run(["sh", "-c", "trap '' TERM HUP; setsid sleep 1000 & exit 0"])
note("ready")
wait_for(*everybody("ready"))
sys.exit(4 * rank)
"""
    launched = start(part)
    assert launched.end()[0] == 4


def test_bad_input_that_all_ranks_meet_is_one_line(start):
    launched = start("print('error: data.train: no such folder', file=sys.stderr)\nsys.exit(2)\n")
    code, out, error = launched.end()
    assert (code, out) == (2, "")
    assert error.splitlines()[1:] == ["error: data.train: no such folder"]


def test_bad_input_that_shows_in_the_middle_of_a_run_names_a_rank(start):
    part = """
print("step 1")
print("error: data.train: too many images cannot be read", file=sys.stderr)
sys.exit(2)
"""
    launched = start(part)
    code, out, error = launched.end()
    assert (code, out) == (2, "step 1\n")
    assert "    error: data.train: too many images cannot be read\n" in error
    assert error.endswith("rank 0 (server 127.0.0.1, device 0) ended with exit code 2; every other rank was stopped\n")


def test_bad_input_of_one_rank_names_it(start):
    part = f"""
if rank == 1:
    wait_for("ready_0")
    print("error: cannot read image", file=sys.stderr)
    print("[ERROR] CORE(1,7f,python): and then some", file=sys.stderr)
    sys.exit(2)
{WAIT_FOR_EVER}"""
    code, _, error = start(part, STOP_GRACE="0.5").end()
    assert code == 2
    assert error.splitlines()[1:] == ["rank 1 (server 127.0.0.1, device 1): error: cannot read image"]


def test_a_python_that_cannot_be_started(start):
    code, _, error = start("", PYTHON="/none/python").end()
    assert code == 2
    assert error.splitlines()[1:] == ["error: /none/python cannot be started: No such file or directory"]


# ------------------------------------------------------------------------------------------------------- signals

SAVE_AND_END = """
def save(number, _):
    note("signals", f"{number} ")
    if os.path.exists(os.path.join(record, f"told_{rank}")):
        return
    note("told")
    time.sleep(0.3)
    note("last")
    sys.exit(128 + number)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
note("ready")
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("sent", "received", "code"),
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGHUP, signal.SIGTERM, 143)],
)
def test_signals_reach_every_rank_once(start, sent, received, code):
    before = signal.signal(sent, signal.SIG_DFL)  # these tests may run under nohup, which a launcher would heed
    try:
        launched = start(SAVE_AND_END)
    finally:
        signal.signal(sent, before)
    launched.wait_for("ready_0", "ready_1")
    launched.process.send_signal(sent)
    launched.wait_for("told_0", "told_1")
    launched.process.send_signal(sent)  # asked twice
    assert launched.end()[0] == code
    for rank in range(2):
        assert (launched.record / f"last_{rank}").exists()
        assert (launched.record / f"signals_{rank}").read_text() == f"{int(received)} "


def test_ranks_that_do_not_end_in_time_are_killed(start):
    launched = start(f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAIT_FOR_EVER}", STOP_GRACE="0.5")
    launched.wait_for("ready_0", "ready_1")
    launched.process.send_signal(signal.SIGINT)
    code, _, error = launched.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 (server 127.0.0.1, device 1) did not end within 0.5 seconds and was killed" in error


def test_ranks_die_with_a_launcher_that_is_killed(start):
    launched = start(WAIT_FOR_EVER)
    launched.wait_for("ready_0", "ready_1")
    launched.process.kill()
    launched.process.wait()
    deadline = time.monotonic() + PATIENCE
    while launched.left():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ----------------------------------------------------------------------------------- other launches on the machine


def test_a_port_that_is_taken(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = start(WAIT_FOR_EVER, DEVICE_TARGET="CPU", MS_SCHED_PORT=str(port)).end()
    assert code == 2
    assert error.startswith(
        f"error: port {port} of 127.0.0.1 cannot be used: Address already in use; if another job has it, choose"
    )
    assert error.count("\n") == 1


def test_a_second_launch_into_the_same_folder(start, tmp_path):
    first = start(WAIT_FOR_EVER)
    first.wait_for("ready_0", "ready_1")
    code, _, error = start(WAIT_FOR_EVER).end()
    assert code == 2
    assert (
        error == f"error: {tmp_path / 'logs'}: another launch is running in this folder; choose another train.output=\n"
    )
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143


def test_ranks_do_not_wait_for_a_scheduler_that_has_gone(start, tmp_path):
    program = tmp_path / "its python"
    program.write_text('#!/bin/sh\n[ "$MS_ROLE" = MS_SCHED ] && echo "no such host" && exit 6\nexec sleep 1000\n')
    program.chmod(0o755)
    code, _, error = start("", DEVICE_TARGET="CPU", PYTHON=str(program), STOP_GRACE="0.5").end()
    assert code == 6
    assert "    no such host\n" in error
    assert error.endswith("the scheduler ended with exit code 6 before the ranks; they were stopped\n")


# ------------------------------------------------------------------------------ a scheduler that loses ranks (2.0.0)

# The scheduler of MindSpore 2.0.0 in what it says: ready for two ranks, and lost one in the first LOST meetings.
LOSING_SCHEDULER = """#!/bin/sh
[ "$MS_ROLE" = MS_SCHED ] || exec "{python}" -S "{part}"
echo "Start server succ, fd: 7"
echo "The new node: 0(role: MS_WORKER) is registered successfully."
echo met >> "$RECORD/meetings"
[ "$(wc -l < "$RECORD/meetings")" -gt $LOST ] && exec sleep 1000
sleep 0.2
echo "The total number of timed out node is 1"
exit 1
"""
# A rank that begins in the meetings that go well, or with BEGIN at once, and ends well or in 1.
OF_A_MEETING = """
met_well = len(open(os.path.join(record, "meetings")).readlines()) > int(os.environ["LOST"])
if met_well or "BEGIN" in os.environ:
    print("step 1", flush=True)
if not met_well:
    time.sleep(0.5)
    sys.exit("RuntimeError: The state of the cluster is error")
"""
AGAIN = "MindSpore's scheduler lost a rank before the start; starting again, at most {} times\n"


def meet(start, folder, lost, version="2.0.0", **environment):
    """Two ranks under a MindSpore of that version: exit code, what was printed, standard error, meetings."""
    described = folder / f"mindspore-{version}.dist-info/METADATA"
    described.parent.mkdir()
    described.write_text(f"Metadata-Version: 2.1\nName: mindspore\nVersion: {version}\n")
    program = folder / "its python"
    program.write_text(LOSING_SCHEDULER.format(python=sys.executable, part=folder / "part.py"))
    program.chmod(0o755)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHON": str(program), "PYTHONPATH": path, "LOST": str(lost), "STOP_GRACE": "1", **environment}
    launched = start(OF_A_MEETING, DEVICE_TARGET="CPU", **settings)
    code, out, error = launched.end()
    return code, out, error, len((launched.record / "meetings").read_text().splitlines())


def test_ranks_meet_anew_where_the_scheduler_lost_one(start, tmp_path):
    code, out, error, meetings = meet(start, tmp_path, lost=2)
    assert (code, out, meetings) == (0, "step 1\n", 3)
    assert [AGAIN.format(left) in error for left in (9, 8, 7)] == [True, True, False]
    assert "were stopped" not in error
    assert "last lines" not in error


def test_ranks_that_meet_in_vain_say_so_in_the_end(start, tmp_path):
    code, out, error, meetings = meet(start, tmp_path, lost=1000)
    assert (code, out, meetings) == (1, "", launch.MEETINGS)
    assert AGAIN.format(1) in error
    assert "RuntimeError: The state of the cluster is error\n" in error
    assert error.endswith("ended with exit code 1; every other rank was stopped\n")


@pytest.mark.parametrize("how", [{"BEGIN": "1"}, {"version": "2.10.0"}], ids=["begun", "newer"])
def test_no_second_meeting_of_ranks_that_have_begun_or_of_a_newer_scheduler(start, tmp_path, how):
    code, _, error, meetings = meet(start, tmp_path, lost=1, **how)
    assert (code, meetings) == (1, 1)
    assert "starting again" not in error
    assert error.endswith("ended with exit code 1; every other rank was stopped\n")


# ------------------------------------------------------------------------------------------- the real MindSpore

ALL_REDUCE = """
import numpy as np
import mindspore
from mindspore import nn, ops
from mindspore.communication import get_group_size, get_rank, init

mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
init()
assert (get_rank(), get_group_size()) == (rank, 2)


class Sum(nn.Cell):
    def __init__(self):
        super().__init__()
        self.all_reduce = ops.AllReduce()

    def construct(self, values):
        return self.all_reduce(values)


total = Sum()(mindspore.Tensor(np.array([rank + 1.0, 10.0 * rank], np.float32)))
note("sum", str(total.asnumpy().tolist()))
if "KILL" in os.environ:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    Sum()(total)  # waits for the other for ever
"""


def all_reduce(start, table=None, **environment):
    """Exit code and standard error of two real ranks, and what each got as the sum."""
    launched = start(ALL_REDUCE, table=table or table_of(1, 2), flags="", DEVICE_TARGET="CPU", **environment)
    code, _, error = launched.end()
    return code, error, [path.read_text() for path in sorted(launched.record.glob("sum_*"))]


def test_two_real_ranks_add_up(start):
    code, _, sums = all_reduce(start)
    assert (code, sums) == (0, ["[3.0, 10.0]"] * 2)


@pytest.mark.skipif(
    shutil.which("msrun", path=str(Path(sys.executable).parent)) is None, reason="MindSpore has msrun from 2.3 on"
)
def test_a_real_rank_of_msrun_is_killed(start):
    """The whole way through msrun, with devices that are not those that it counts."""
    code, error, sums = all_reduce(start, table_of(1, 2, first_device=2), LAUNCHER="msrun", KILL="1", STOP_GRACE="2")
    assert code == 128 + signal.SIGKILL
    assert sums == ["[3.0, 10.0]"] * 2
    assert "rank 1 (server 10.0.0.1, device 3) was ended by SIGKILL; every other rank was stopped" in error


def test_the_door(tmp_path):
    """run_distribute_train.sh from a folder with spaces, told by its path to a repository with spaces."""
    (tmp_path / "the repository").symlink_to(ROOT)
    (tmp_path / "a folder").mkdir()
    stand_in = tmp_path / "stand in"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-m skipvit.train" ] || exec "{sys.executable}" "$@"\n'
        '[ "$RANK_ID" != 0 ] || echo "$@"\n'
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stand_in), "SERVER_ID": "10.0.0.1"}
    done = subprocess.run(
        ["bash", "../the repository/run_distribute_train.sh", write(tmp_path, table_of(1, 2)), "train.output=a run"],
        cwd=tmp_path / "a folder",
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    config = ROOT / "configs/imagenet/skipvit_small.yaml"
    assert done.stdout.splitlines()[-1] == f"-m skipvit.train {config} train.output=a run"
    assert (tmp_path / "a folder/a run/logs/rank_1.log").exists()
