"""Start one training process a rank from an HCCL rank table and look after them until the last has ended.

``bash run_distribute_train.sh RANK_TABLE [CONFIG] [key=value ...]`` runs ``main``. The same command with the
same table is given on every server; each launcher starts and supervises the ranks of its own server.

How ranks are started (``LAUNCHER=``):

* ``classic``, the default on Ascend: each process gets ``RANK_TABLE_FILE``, ``RANK_SIZE``, ``RANK_ID`` and
  ``DEVICE_ID``, and HCCL reads the table itself. MindSpore 2.0 to 2.5 need it.
* ``dynamic``, the default on CPU: a scheduler process and one worker a rank with ``MS_ROLE``,
  ``MS_WORKER_NUM``, ``MS_SCHED_HOST``, ``MS_SCHED_PORT`` and ``MS_NODE_ID``: the very processes and variables
  that ``msrun`` makes (mindspore/parallel/cluster/process_entity/_api.py of 2.10), without msrun in between.
  It is the default because the ranks are then our own children: their exit codes are known, a signal reaches
  them, and MindSpore 2.0.0, which has no msrun, works too.
* ``msrun``: MindSpore's own starter. It kills its workers on SIGINT and exits 0, orphans them on SIGTERM and
  may wait for ever after a failure, so each of its workers is started through ``_under_msrun``, which ties
  the rank back to this launcher; msrun itself is never sent a signal but the last one.

Supervision: each rank in a session of its own, its output in ``rank_<i>.log`` and rank 0's on the terminal;
SIGINT and SIGTERM are passed on once (SIGHUP as SIGTERM), ranks then have a grace period to write their
checkpoint; a rank that fails brings all others down; whatever is left of the process tree is killed, also
when it has left its session (PR_SET_CHILD_SUBREAPER), and ranks die with a launcher that is itself killed
(PR_SET_PDEATHSIG). A failure on another server shows here when HCCL gives up waiting (HCCL_EXEC_TIMEOUT).

No part of this has run on an NPU. The starts on CPU are tested on MindSpore 2.0.0 and 2.10.0.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import ipaddress
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Protocol

import psutil

if __name__ == "__main__" and "skipvit" not in sys.modules:
    # Run by its path, as run_distribute_train.sh does: config.py is found without the package's __init__, which
    # imports MindSpore. A supervisor has no use for it, and should outlive whatever it does to a rank.
    sys.modules["skipvit"] = types.ModuleType("skipvit")
    sys.modules["skipvit"].__path__ = [os.path.dirname(os.path.abspath(__file__))]

from skipvit.config import UserError, load

COMMAND = "run_distribute_train"


# ------------------------------------------------------------------------------------------------------------
# The rank table
# ------------------------------------------------------------------------------------------------------------

# 4,096 servers of 8 devices need about 5 MB; a file beyond this is no rank table.
MAX_TABLE_BYTES = 8 * 2**20
DEVICES_PER_SERVER = (1, 2, 4, 8)
WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
# What CANN's documents allow as server_id: a name or an address of at most 64 characters.
SERVER_NAME = re.compile(r"[0-9A-Za-z:][0-9A-Za-z._:%-]{0,63}")


@dataclass(frozen=True)
class Device:
    """One rank of the table: its number in the job, its device on the server, that device's own address."""

    rank: int
    device_id: int
    address: str | None


@dataclass(frozen=True)
class Server:
    """One server: its id, the other addresses the table gives for it, its devices in order of rank."""

    server_id: str
    other_names: tuple[str, ...]
    devices: tuple[Device, ...]


@dataclass(frozen=True)
class RankTable:
    """A rank table that passed every check; servers in order of their first rank."""

    path: Path
    servers: tuple[Server, ...]

    @property
    def rank_count(self) -> int:
        """Ranks in the whole job."""
        return sum(len(server.devices) for server in self.servers)


def read_rank_table(path: str | Path) -> RankTable:
    """Read and check an HCCL rank table: template 1 (``server_list``) or the older 2 (``group_list``).

    The file is data of a stranger: its size is bounded before it is read and nothing in it is executed or
    looked up. Rules from CANN's "Rank Table Configuration (Atlas training product)": 1, 2, 4 or 8 devices a
    server, the same number on each; 2 or 4 of them within 0-3 or 4-7, which are two separate rings; device
    addresses are needed between servers and may be left out on a single one.

    Args:
        path: The table's file.

    Returns:
        The checked table.

    Raises:
        UserError: One line that names the file, the server and the device at fault.
    """
    path = Path(path)
    try:
        table = _load_json(path)
        if not isinstance(table, dict):
            raise UserError("the table must be a JSON object with server_list")
        status = table.get("status", "completed")
        if status == "initializing":
            raise UserError('status is "initializing": the table is not ready yet, wait until it is "completed"')
        if status != "completed":
            raise UserError(f'status must be "completed" or absent, not {_show(status)}')
        if "server_list" in table:
            servers = _servers_of_template_1(table)
        elif "group_list" in table:
            servers = _servers_of_template_2(table)
        else:
            raise UserError("neither server_list (template 1) nor group_list (template 2) is there")
        _check_across_servers(servers)
    except UserError as error:
        raise UserError(f"rank table {path}: {error}") from None
    return RankTable(path.resolve(), tuple(sorted(servers, key=lambda server: server.devices[0].rank)))


def _load_json(path: Path) -> Any:
    """Parse a regular file of bounded size as JSON in which no key is given twice."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a regular file")
        if status.st_size > MAX_TABLE_BYTES:
            raise UserError(f"{status.st_size} bytes; a rank table has at most {MAX_TABLE_BYTES}")
        with path.open("rb") as file:
            content = file.read(MAX_TABLE_BYTES)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not content.strip():
        raise UserError("the file is empty")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError):
        # ValueError: Python 3.11 refuses to convert whole numbers of thousands of digits.
        raise UserError("not a rank table: nested too deeply, or a number too long") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"the key {_show(key)} is given twice in one object")
        found[key] = value
    return found


def _servers_of_template_1(table: dict[str, Any]) -> list[Server]:
    version = table.get("version")
    if version is None:
        raise UserError('version is missing; template 1 has "version": "1.0"')
    if version != "1.0":
        raise UserError(f'version must be "1.0", not {_show(version)} (1.1 and later are for other products)')
    entries = _list_of_objects(table["server_list"], "server_list")
    server_count = _whole_number(table.get("server_count"), "server_count")
    if server_count != len(entries):
        raise UserError(f"server_count says {server_count}, server_list holds {len(entries)}")
    servers: dict[str, Server] = {}
    for number, entry in enumerate(entries, start=1):
        server_id = _server_id(entry, f"server {number} of server_list")
        place = f"server {server_id}"
        if server_id in servers:
            raise UserError(f"{place}: this server_id is given twice")
        if "device" not in entry:
            raise UserError(f"{place}: device is missing")
        devices = []
        for device_number, device in enumerate(_list_of_objects(entry["device"], f"{place}: device"), start=1):
            device_place, device_id = _device_id(device, place, device_number)
            rank = _whole_number(device.get("rank_id"), f"{device_place}: rank_id")
            devices.append(Device(rank, device_id, _address(device, "device_ip", device_place)))
        servers[server_id] = _server(server_id, _other_names(entry, place), devices)
    return list(servers.values())


def _servers_of_template_2(table: dict[str, Any]) -> list[Server]:
    """Gather the instances of the one group by server.

    Two forms are met: one instance a device with ``rank_id``, and one instance a server with several
    ``devices`` and no ranks, which are then numbered in the order of the list.
    """
    groups = _list_of_objects(table["group_list"], "group_list")
    if len(groups) != 1:
        raise UserError(f"group_list holds {len(groups)} groups; one is supported")
    group = groups[0]
    if "instance_list" not in group:
        raise UserError("group_list: instance_list is missing")
    instances = _list_of_objects(group["instance_list"], "instance_list")
    found: dict[str, tuple[tuple[str, ...], list[Device]]] = {}
    rank_by_position = 0
    ranks_given = "rank_id" in instances[0]
    for number, instance in enumerate(instances, start=1):
        server_id = _server_id(instance, f"instance {number} of instance_list")
        place = f"server {server_id}"
        _, devices = found.setdefault(server_id, (_other_names(instance, place), []))
        entries = _list_of_objects(instance.get("devices"), f"{place}: devices of instance {number}")
        if ranks_given != ("rank_id" in instance) or (ranks_given and len(entries) > 1):
            raise UserError(f"{place}: instance {number}: either each instance is one device with rank_id, or none has")
        for device in entries:
            device_place, device_id = _device_id(device, place, len(devices) + 1)
            rank = _whole_number(instance["rank_id"], f"{device_place}: rank_id") if ranks_given else rank_by_position
            rank_by_position += 1
            devices.append(Device(rank, device_id, _address(device, "device_ip", device_place)))
    counts = {
        "group_count": (table, len(groups)),
        "instance_count": (group, len(instances)),
        "device_count": (group, rank_by_position),
        "device_num": (group, rank_by_position),
        "server_num": (group, len(found)),
    }
    for key, (holder, counted) in counts.items():
        # Generators of this old form wrote counts as text or as numbers, and not all of them.
        if key in holder and str(holder[key]) != str(counted):
            raise UserError(f"{key} says {_show(holder[key])}, the table holds {counted}")
    return [_server(server_id, names, devices) for server_id, (names, devices) in found.items()]


def _server(server_id: str, other_names: tuple[str, ...], devices: list[Device]) -> Server:
    """Check the devices of one server against each other."""
    place = f"server {server_id}"
    ids = [device.device_id for device in devices]
    for number, device_id in enumerate(ids[:9]):
        if device_id in ids[:number]:
            raise UserError(f"{place}: device {device_id} is given twice")
    if len(ids) not in DEVICES_PER_SERVER:
        raise UserError(f"{place}: {len(ids)} devices; a server takes part with 1, 2, 4 or 8")
    if len(ids) in (2, 4) and len({device_id // 4 for device_id in ids}) > 1:
        listed = ", ".join(map(str, sorted(ids)))
        raise UserError(f"{place}: devices {listed}: {len(ids)} devices must all lie within 0-3 or within 4-7")
    return Server(server_id, other_names, tuple(sorted(devices, key=lambda device: device.rank)))


def _check_across_servers(servers: list[Server]) -> None:
    """Ranks 0 to n-1 each once, device addresses distinct, servers of one size."""
    places: dict[int, str] = {}
    addresses: dict[str, str] = {}
    for server in servers:
        for device in server.devices:
            place = f"server {server.server_id}: device {device.device_id}"
            if device.rank in places:
                raise UserError(f"{place}: rank_id {device.rank} is already that of {places[device.rank]}")
            places[device.rank] = place
            if device.address is None:
                if len(servers) > 1:
                    raise UserError(f"{place}: device_ip is missing; with more than one server each device needs it")
            elif device.address in addresses:
                raise UserError(f"{place}: device_ip {device.address} is already that of {addresses[device.address]}")
            else:
                addresses[device.address] = place
    last, place = max(places.items())
    if last != len(places) - 1:
        gap = next(rank for rank in range(len(places)) if rank not in places)
        raise UserError(
            f"{place}: rank_id {last}, but no device has rank_id {gap}; {len(places)} ranks are 0 to {len(places) - 1}"
        )
    for server in servers:
        if len(server.devices) != len(servers[0].devices):
            raise UserError(
                f"server {server.server_id}: {len(server.devices)} devices, server {servers[0].server_id}: "
                f"{len(servers[0].devices)}; each server must take part with the same number"
            )


def _server_id(entry: dict[str, Any], place: str) -> str:
    """The server's id: an address, or a name such as ``node_0``."""
    server_id = entry.get("server_id")
    if server_id is None:
        raise UserError(f"{place}: server_id is missing")
    if not isinstance(server_id, str) or not SERVER_NAME.fullmatch(server_id):
        raise UserError(f"{place}: server_id must be text, an address or a name such as node_0, not {_show(server_id)}")
    if re.fullmatch(r"[0-9.]+", server_id) and _normal_name(server_id) is None:
        raise UserError(f"server {server_id}: server_id is not a well-formed address")
    return server_id


def _other_names(entry: dict[str, Any], place: str) -> tuple[str, ...]:
    """The host's addresses beside server_id; ``server_ip`` is how MindCluster writes a pod's."""
    found = (_address(entry, key, place) for key in ("container_ip", "host_ip", "server_ip"))
    return tuple(address for address in found if address is not None)


def _device_id(entry: dict[str, Any], server_place: str, number: int) -> tuple[str, int]:
    """The device's number, 0 to 7, and how to name the device in an error."""
    device_id = _whole_number(entry.get("device_id"), f"{server_place}: device number {number}: device_id")
    if device_id > 7:
        raise UserError(f"{server_place}: device {device_id}: device_id must be 0 to 7")
    return f"{server_place}: device {device_id}", device_id


def _address(entry: dict[str, Any], key: str, place: str) -> str | None:
    """A well-formed address in its normal spelling, or None where the key is absent or empty."""
    value = entry.get(key)
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str):
            raise ValueError
        address = ipaddress.ip_address(value)
        if address.is_unspecified or address.is_multicast:
            raise ValueError
    except ValueError:
        raise UserError(f"{place}: {key} {_show(value)} is not the address of one host") from None
    return str(address)


def _whole_number(value: object, place: str) -> int:
    if value is None:
        raise UserError(f"{place} is missing")
    if not isinstance(value, str):
        raise UserError(f'{place} must be text such as "0", not {_show(value)}')
    if not WHOLE_NUMBER.fullmatch(value):
        raise UserError(f"{place} must be a whole number, not {_show(value)}")
    return int(value)


def _list_of_objects(value: object, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UserError(f"{place} must be a list")
    if not value:
        raise UserError(f"{place} is an empty list")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{place}: entry {number} must be an object, not {_show(entry)}")
    return value


def _show(value: object) -> str:
    """A value of the table for a message: one line, no control characters, not too long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------------------
# Which server of the table is this machine
# ------------------------------------------------------------------------------------------------------------


def find_server(table: RankTable, machine_names: Sequence[str], server_id: str | None = None) -> Server:
    """The table's server that this machine is.

    Args:
        table: The checked table.
        machine_names: This machine's addresses and host names (``this_machine()``).
        server_id: What ``SERVER_ID=`` says, if anything: then it alone decides.

    Raises:
        UserError: No server matches, or more than one; says what was looked for and what the table holds.
    """
    looked_for = [server_id] if server_id else list(machine_names)
    wanted = {_normal_name(name) or name.lower() for name in looked_for}
    found = [server for server in table.servers if wanted & {_normal_name(n) or n.lower() for n in _names(server)}]
    if len(found) == 1:
        return found[0]
    held = ", ".join("/".join(_names(server)) for server in table.servers[:16])
    if len(table.servers) > 16:
        held += f" and {len(table.servers) - 16} more"
    source = "SERVER_ID" if server_id else "this machine"
    what = f"{len(found)} servers match" if found else "no server matches"
    raise UserError(
        f"rank table {table.path}: {what} {source} ({', '.join(looked_for)}); the table holds {held}; "
        "say which one this is with SERVER_ID=, or run all ranks on this machine's CPU with DEVICE_TARGET=CPU"
    )


def this_machine() -> list[str]:
    """This machine's host names and the addresses of its interfaces."""
    names = [socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn()]
    for addresses in psutil.net_if_addrs().values():
        names += [address.address for address in addresses if address.family in (socket.AF_INET, socket.AF_INET6)]
    return list(dict.fromkeys(names))


def _names(server: Server) -> list[str]:
    return list(dict.fromkeys((server.server_id, *server.other_names)))


def _normal_name(name: str) -> str | None:
    """An address in its normal spelling without its interface (``%eth0``), or None for what is no address."""
    try:
        return str(ipaddress.ip_address(name.split("%")[0]))
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------------------
# What each rank is given
# ------------------------------------------------------------------------------------------------------------

# Left over from another start these would send a rank to the wrong job.
INHERITED_NO_MORE = (
    *("RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH", "RANK_SIZE", "RANK_ID", "DEVICE_ID"),
    *("MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID", "MS_SCHED_HOST", "MS_SCHED_PORT"),
)
MSRUN_PORT = 8118  # msrun's default; servers of one job must agree on it without asking each other
LOOPBACK = "127.0.0.1"
LAUNCHERS = {"Ascend": ("classic", "dynamic", "msrun"), "CPU": ("dynamic", "msrun")}


@dataclass(frozen=True)
class Settings:
    """What the environment decides.

    Attributes:
        device_target: ``DEVICE_TARGET``: Ascend (default) or CPU.
        launcher: ``LAUNCHER``: classic (default on Ascend), dynamic (default on CPU) or msrun.
        server_id: ``SERVER_ID``, where a server cannot find itself in the table.
        scheduler_port: ``MS_SCHED_PORT``; by default a free one on CPU and 8118 on Ascend.
        stop_grace: ``STOP_GRACE``: seconds that ranks have to write a checkpoint after Ctrl-C or SIGTERM; by
            default 30 on CPU and 120 on Ascend, where a whole sink has to return first.
        python: ``SKIPVIT_PYTHON``: what the ranks are run with; by default the Python this runs in.
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
        if port is not None and not (WHOLE_NUMBER.fullmatch(port) and 1024 <= int(port) <= 65535):
            raise UserError(f"MS_SCHED_PORT={port}: must be a port, 1024 to 65535")
        grace = environment.get("STOP_GRACE") or {"Ascend": "120", "CPU": "30"}[target]
        if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", grace):
            raise UserError(f"STOP_GRACE={grace}: must be a number of seconds")
        return cls(
            device_target=target,
            launcher=launcher,
            server_id=environment.get("SERVER_ID") or None,
            scheduler_port=int(port) if port else None,
            stop_grace=float(grace),
            python=environment.get("SKIPVIT_PYTHON") or sys.executable,
        )


@dataclass(frozen=True)
class RankPlan:
    """One rank of this machine: who it is, what it finds in its environment, which cores it may use."""

    rank: int
    device_id: int
    server_id: str
    cores: tuple[int, ...]
    environment: dict[str, str]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"rank {self.rank} (server {self.server_id}, device {self.device_id})"


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

    It runs on the server of rank 0, at the first of ``container_ip``, ``host_ip``, ``server_id`` that is an
    address or can be resolved to one; everything that runs on one machine meets at 127.0.0.1.

    Raises:
        UserError: The port is taken here, or the first server has no address.
    """
    if settings.launcher == "classic":
        return None
    first = table.servers[0]
    here = first in local
    host = LOOPBACK
    if len(local) < len(table.servers):
        candidates = [*first.other_names, first.server_id]
        resolved = (_normal_name(name) or _resolved(name) for name in candidates)
        found = next((address for address in resolved if address), None)
        if found is None:
            raise UserError(
                f"rank table {table.path}: server {first.server_id}: all ranks meet there, but its address "
                "is not in the table and cannot be resolved; give host_ip"
            )
        host = found
    port = settings.scheduler_port
    if port is None:
        port = _free_port(host) if settings.device_target == "CPU" else MSRUN_PORT
    if here and not _is_free(host, port):
        raise UserError(
            f"port {port} of {host} is taken, perhaps by another job; choose another with MS_SCHED_PORT= "
            "(the same on every server)"
        )
    return Scheduler(host, port, here)


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
        cores: The cores this process may use; shared out in equal, neighbouring parts. With fewer cores than
            ranks every rank may use all.
    """
    inherited = {key: value for key, value in environment.items() if key not in INHERITED_NO_MORE}
    members = sorted(
        ((device, server) for server in local for device in server.devices), key=lambda member: member[0].rank
    )
    plans = []
    for place, (device, server) in enumerate(members):
        share = tuple(cores[place * len(cores) // len(members) : (place + 1) * len(cores) // len(members)])
        own = {
            "DEVICE_TARGET": settings.device_target,
            "RANK_SIZE": str(table.rank_count),
            "RANK_ID": str(device.rank),
            "DEVICE_ID": str(device.device_id),
        }
        if scheduler is None:
            own["RANK_TABLE_FILE"] = str(table.path)
        else:
            own |= _cluster_environment(table, scheduler) | {
                "MS_ROLE": "MS_WORKER",
                "MS_NODE_ID": str(device.rank),
            }
        # Lines must reach the log when they are printed, and the threads of one rank fit its cores.
        defaults = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, len(share)))}
        if scheduler is not None and scheduler.host == LOOPBACK:
            # The interval of the heartbeats by which ranks learn that all have come: on one machine the default of
            # 3 to 5 seconds, meant to spare the scheduler of a large cluster, is most of the start.
            defaults |= {"MS_RETRY_INTERVAL_LOWER": "1", "MS_RETRY_INTERVAL_UPPER": "1"}
        plans.append(
            RankPlan(
                device.rank,
                device.device_id,
                server.server_id,
                share or tuple(cores),
                defaults | inherited | own,
            )
        )
    return plans


def _cluster_environment(table: RankTable, scheduler: Scheduler) -> dict[str, str]:
    return {
        "MS_WORKER_NUM": str(table.rank_count),
        "MS_SCHED_HOST": scheduler.host,
        "MS_SCHED_PORT": str(scheduler.port),
    }


def _resolved(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    """Whether a server could listen there; sockets of ended connections (TIME_WAIT) are no hindrance."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------
# Processes, and what they print
# ------------------------------------------------------------------------------------------------------------

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)
TAIL_LINES = 20
PIPE_BYTES = 2**16
# What MindSpore prints of itself. Below an exception these lines follow the error that counts; and what is no
# error stays in the log and off the terminal.
FRAMEWORK_LINE = re.compile(rb"\[(DEBUG|INFO|WARNING|ERROR|CRITICAL|EVENT)\] ")
FRAMEWORK_CHATTER = re.compile(rb"\[(DEBUG|INFO|WARNING|EVENT)\] ")


class _Output:
    """Copies what a process prints to its log, line by line, and rank 0's to the terminal.

    Standard output goes to standard output and standard error to standard error, so that the last line of
    standard output is the rank's.
    """

    def __init__(self, log_path: Path, on_terminal: bool = False, counted: re.Pattern[bytes] | None = None) -> None:
        self.log_path = log_path
        self.on_terminal = on_terminal
        self.last_lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.last_error = ""
        self.count = 0  # lines so far in which ``counted`` was found
        self._counted = counted
        self._log = log_path.open("ab")  # a resumed run keeps the logs of the one before
        self._log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
        out_read, out_write = os.pipe()
        error_read, error_write = os.pipe()
        self.write_ends = [out_write, error_write]
        self._error_end = error_read
        self._unfinished = {out_read: b"", error_read: b""}  # by read end: the line that has not ended yet
        for end in self._unfinished:
            os.set_blocking(end, False)

    @property
    def read_ends(self) -> list[int]:
        """What select can wait for."""
        return list(self._unfinished)

    def close_write_ends(self) -> None:
        """Once the process has its own; ours would keep the pipes open for ever."""
        while self.write_ends:
            os.close(self.write_ends.pop())

    def copy(self) -> bool:
        """Take over what is there now, without waiting; whether there was anything."""
        copied = False
        for end in self.read_ends:
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(end, PIPE_BYTES)
                *lines, unfinished = (self._unfinished[end] + chunk).split(b"\n")
                if unfinished and (not chunk or len(unfinished) > PIPE_BYTES):
                    lines, unfinished = [*lines, unfinished], b""
                self._unfinished[end] = unfinished
                for line in lines:
                    self._take(line, end == self._error_end)
                if chunk:
                    copied = True
                else:
                    del self._unfinished[end]
                    os.close(end)
        self._log.flush()
        return copied

    def close(self) -> None:
        """Take over the rest, finished line or not."""
        self.close_write_ends()
        while self.copy():
            pass
        for (
            end,
            unfinished,
        ) in self._unfinished.items():  # still held open by a process that could not be killed
            if unfinished:
                self._take(unfinished, end == self._error_end)
            os.close(end)
        self._unfinished.clear()
        self._log.close()

    def _take(self, line: bytes, is_error: bool) -> None:
        self._log.write(line + b"\n")
        text = line[:2000].decode("utf-8", "replace").rstrip()
        self.last_lines.append(text)
        if is_error and text and not FRAMEWORK_LINE.match(line):
            self.last_error = text
        if self._counted is not None and self._counted.search(line):
            self.count += 1
        if self.on_terminal and not FRAMEWORK_CHATTER.match(line):
            stream = sys.stderr if is_error else sys.stdout
            try:
                stream.buffer.write(line + b"\n")
                stream.flush()
            except OSError:
                # A reader such as head has gone; the training has not.
                self.on_terminal = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Process(Protocol):
    """What the ranks have in common: our own children (subprocess.Popen) and those of msrun (_MsrunRank)."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...


@dataclass
class _Rank:
    """A rank that was started. ``exit_code`` is None while it runs, 128 + n when signal n ended it."""

    plan: RankPlan
    process: _Process
    output: _Output
    exit_code: int | None = None


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _prepare(cores: Sequence[int]) -> Callable[[], None]:
    """What a child does between fork and exec: die with its parent, stay on its cores."""
    parent = os.getpid()

    def prepare() -> None:
        _die_with_parent()
        if os.getppid() != parent:  # it was killed in between, and nobody would ever end this one
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


def _exit_code(returncode: int) -> int:
    """The shell's way to tell a signal: 128 + its number."""
    return returncode if returncode >= 0 else 128 - returncode


def _how_it_ended(exit_code: int) -> str:
    if exit_code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(exit_code - 128).name}"
    return f"ended with exit code {exit_code}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{COMMAND}: {line}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Supervision
# ------------------------------------------------------------------------------------------------------------

POLL_SECONDS = 0.1
# After a failure there is no next step to wait for, but a checkpoint that is being written may be finished.
FAILURE_GRACE = 10.0
# Bad input is met by every rank within moments: let them all say so, and the message is nobody's in
# particular.
SETTLE_SECONDS = 5.0
# A scheduler that has gone while ranks go on: either they are about to end too, or they will wait for ever.
HELPER_PATIENCE = 10.0
START_PATIENCE = 30.0
KILL_PATIENCE = 10.0
BAD_INPUT = 2


@dataclass(frozen=True)
class _Stop:
    """Why the ranks were told to end, when they are killed, and which had failed of themselves by then."""

    reason: str  # "signal", "failure" or "helper"
    deadline: float
    failed: tuple[_Rank, ...]


class Supervisor:
    """Starts the ranks of this machine and sees them through to their end.

    A context manager: however its block is left, no process of it remains.
    """

    def __init__(self, log_dir: Path, stop_grace: float) -> None:
        """Logs go to ``log_dir``; after a signal ranks have ``stop_grace`` seconds."""
        self.log_dir = log_dir
        self.stop_grace = stop_grace
        self.ranks: list[_Rank] = []
        self.helper_output: _Output | None = None
        self._helper: subprocess.Popen[bytes] | None = None
        self._helper_gone_at: float | None = None
        self._pending: deque[tuple[RankPlan, Sequence[str]]] = deque()
        self._may_start: Callable[[int], bool] = lambda started: True
        self._start_deadline = 0.0
        self._settled_at: float | None = None
        self._signal: int | None = None
        self._stop: _Stop | None = None
        self._not_ours: set[int] = set()
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Supervisor:
        """Take signals, and what our descendants leave behind."""
        self._not_ours = {child.pid for child in psutil.Process().children()}
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored by nohup, say: then it stays so
                self._old_handlers[number] = signal.signal(number, self._note_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process."""
        left = self._kill_everything()
        if left:
            _say(f"processes {left} do not end even when killed; they may hold their devices")
        for output in self._outputs():
            output.close()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def start_helper(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        counted: re.Pattern[bytes] | None = None,
    ) -> None:
        """Start the scheduler, or msrun: not a rank, but the ranks cannot do without it."""
        self.helper_output = _Output(self.log_dir / f"{name}.log", counted=counted)
        self._helper = _popen(command, environment, (), self.helper_output)

    def start_ranks(
        self,
        plans: Sequence[RankPlan],
        program: Sequence[str],
        may_start: Callable[[int], bool] = lambda started: True,
    ) -> None:
        """Start the ranks in order, each when ``may_start(how many have started)``, or after 30 seconds."""
        self._pending.extend((plan, program) for plan in plans)
        self._may_start = may_start
        self._start_deadline = time.monotonic() + START_PATIENCE

    def output_of(self, plan: RankPlan) -> _Output:
        """The log of a rank; rank 0's is shown as well."""
        return _Output(self.log_dir / f"rank_{plan.rank}.log", on_terminal=plan.rank == 0)

    def run(self) -> int:
        """Wait for the ranks.

        Returns:
            0 when every rank ended well. After a failure the worst exit code of the ranks that failed of
            themselves, after a signal the worst of all; 128 + n stands for an end by signal n.
        """
        while self._pending or any(rank.exit_code is None for rank in self.ranks):
            self._start_next()
            self._copy_output()
            for rank in self.ranks:
                code = rank.process.poll() if rank.exit_code is None else None
                if code is not None:
                    rank.exit_code = _exit_code(code)
            if self._stop is None:
                self._stop = self._reason_to_stop()
            elif time.monotonic() > self._stop.deadline:
                break
        forced = [rank for rank in self.ranks if rank.exit_code is None]
        self._kill_everything()
        while sum(output.copy() for output in self._outputs()):
            pass
        if self._stop is not None and self._stop.reason == "signal":
            for rank in forced:
                _say(f"{rank.plan.name} did not end within {self.stop_grace:g} seconds and was killed")
                rank.exit_code = 128 + signal.SIGKILL
            # MindSpore 2.10 makes SIGTERM of a Ctrl-C that comes while a graph runs.
            told = (128 + signal.SIGINT, 128 + signal.SIGTERM)
            asked = told[0] if self._signal == signal.SIGINT else told[1]
            return max((asked if rank.exit_code in told else rank.exit_code or 0 for rank in self.ranks), default=asked)
        failed = self._stop.failed if self._stop else tuple(rank for rank in self.ranks if rank.exit_code)
        if failed:
            return self._report(failed)
        if self._stop is not None and self._helper is not None and self.helper_output is not None:
            code = _exit_code(self._helper.returncode)
            self._show_log(self.helper_output)
            name = self.helper_output.log_path.stem
            _say(f"the {name} {_how_it_ended(code)} before the ranks; they were stopped")
            return code or 1
        return 0

    def _reason_to_stop(self) -> _Stop | None:
        """Tell the ranks to end where there is reason to."""
        now = time.monotonic()
        failed = tuple(rank for rank in self.ranks if rank.exit_code)
        if self._signal is not None:
            _say(f"{signal.Signals(self._signal).name}: the ranks have {self.stop_grace:g} seconds to end")
            stop = _Stop("signal", now + self.stop_grace, ())
        elif failed:
            self._settled_at = self._settled_at or now + min(SETTLE_SECONDS, self.stop_grace)
            if all(rank.exit_code == BAD_INPUT for rank in failed) and now < self._settled_at:
                return None
            stop = _Stop("failure", now + min(FAILURE_GRACE, self.stop_grace), failed)
        elif self._helper is not None and self._helper.poll() is not None:
            self._helper_gone_at = self._helper_gone_at or now
            if now < self._helper_gone_at + HELPER_PATIENCE:
                return None
            stop = _Stop("helper", now + min(FAILURE_GRACE, self.stop_grace), ())
        else:
            return None
        self._pending.clear()
        for rank in self.ranks:
            if rank.exit_code is None:
                # To the rank alone, not to its data workers: it needs them to finish its step.
                rank.process.send_signal(signal.SIGINT if self._signal == signal.SIGINT else signal.SIGTERM)
        return stop

    def _report(self, failed: Sequence[_Rank]) -> int:
        """Say which rank failed and how; bad input, which is no rank's own, is one line."""
        worst = max(rank.exit_code or 0 for rank in failed)
        if worst == BAD_INPUT:
            if not any(rank.output.on_terminal for rank in failed):
                first = failed[0]
                reason = first.output.last_error or f"exit code 2 without a word in {first.output.log_path}"
                print(f"rank {first.plan.rank}: {reason}", file=sys.stderr, flush=True)
            return worst
        first = next(rank for rank in failed if rank.exit_code != BAD_INPUT)
        self._show_log(first.output)
        _say(f"{first.plan.name} {_how_it_ended(first.exit_code or 0)}; every other rank was stopped")
        return worst

    def _show_log(self, output: _Output) -> None:
        _say(f"the last lines of {output.log_path}:")
        with contextlib.suppress(OSError):
            for line in output.last_lines:
                print(f"    {line}", file=sys.stderr)

    def _note_signal(self, number: int, _: object) -> None:
        # Only the first counts: a batch system may send several, and each rank is told once.
        self._signal = self._signal or number

    def _start_next(self) -> None:
        while self._pending and self._signal is None:
            if not self._may_start(len(self.ranks)) and time.monotonic() < self._start_deadline:
                return
            plan, program = self._pending.popleft()
            output = self.output_of(plan)
            try:
                self.ranks.append(_Rank(plan, _popen(program, plan.environment, plan.cores, output), output))
            except UserError:
                output.close()
                raise
            self._start_deadline = time.monotonic() + START_PATIENCE

    def _outputs(self) -> list[_Output]:
        outputs = [rank.output for rank in self.ranks]
        return [*outputs, self.helper_output] if self.helper_output else outputs

    def _copy_output(self) -> None:
        outputs = self._outputs()
        select.select([end for output in outputs for end in output.read_ends], [], [], POLL_SECONDS)
        for output in outputs:
            output.copy()

    def _kill_everything(self) -> list[int]:
        """Kill all descendants, also those that left their session; return the ids that do not die."""
        processes = [self._helper, *(rank.process for rank in self.ranks)]
        own = {process.pid: process for process in processes if isinstance(process, subprocess.Popen)}
        deadline = time.monotonic() + KILL_PATIENCE
        while True:
            alive = []
            for child in self._descendants():
                with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                    if child.pid in own:
                        gone = own[child.pid].poll() is not None
                    elif child.status() == psutil.STATUS_ZOMBIE and child.ppid() == os.getpid():
                        gone = os.waitpid(child.pid, os.WNOHANG)[0] != 0  # adopted: nobody else buries it
                    else:
                        gone = False
                    if not gone:
                        child.kill()
                        alive.append(child.pid)
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.02)

    def _descendants(self) -> list[Any]:
        found = []
        for child in psutil.Process().children():
            if child.pid not in self._not_ours:
                found.append(child)
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += child.children(recursive=True)
        return found


def _popen(
    command: Sequence[str], environment: Mapping[str, str], cores: Sequence[int], output: _Output
) -> subprocess.Popen[bytes]:
    """A child in a session of its own, so that the terminal's Ctrl-C reaches it through us alone."""
    try:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output.write_ends[0],
            stderr=output.write_ends[1],
            start_new_session=True,
            preexec_fn=_prepare(cores),
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
    output.close_write_ends()
    return process


# ------------------------------------------------------------------------------------------------------------
# The dynamic start: a scheduler and the ranks
# ------------------------------------------------------------------------------------------------------------

# In PyNative mode, its default, 2.0.0 refuses: "PyNative mode is not supported in dynamic networking for
# now."
SCHEDULER_PROGRAM = (
    "import mindspore; from mindspore.communication import init; "
    "mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target='CPU'); init('mccl')"
)
REGISTERED = re.compile(rb"The new node: \S+\(role: MS_WORKER\).* is registered successfully")


def start_dynamic(
    supervisor: Supervisor,
    plans: Sequence[RankPlan],
    program: Sequence[str],
    scheduler: Scheduler,
    python: str,
    one_by_one: bool,
) -> None:
    """Start the scheduler, where it belongs here, and the ranks once it listens.

    Args:
        supervisor: Takes the processes.
        plans: This machine's ranks.
        program: What each of them runs.
        scheduler: Where they meet.
        python: Runs the scheduler.
        one_by_one: Start each rank when the one before has registered, as MindSpore 2.0.0 needs it: it numbers
            ranks in the order in which they register, whatever MS_NODE_ID says. Started together they also lost
            replies of the scheduler in half of the trials there (2 ranks, 2 cores), one by one in 2 of 18; init()
            then ends after 40 seconds with "The state of the cluster is error, total nodes num: 2, abnormal nodes
            num: 1". 2.10.0 did not do that in any of some 20 starts.
    """
    if not scheduler.here:
        supervisor.start_ranks(plans, program)
        return
    of_ranks = ("MS_NODE_ID", "RANK_ID", "DEVICE_ID")
    environment = {key: value for key, value in plans[0].environment.items() if key not in of_ranks}
    environment["MS_ROLE"] = "MS_SCHED"
    if one_by_one:
        environment["GLOG_v"] = "1"  # the level at which 2.0.0 says that a rank has registered
    supervisor.start_helper("scheduler", [python, "-c", SCHEDULER_PROGRAM], environment, REGISTERED)

    def may_start(started: int) -> bool:
        assert supervisor.helper_output is not None
        if one_by_one and started:
            return supervisor.helper_output.count >= started
        return _is_listening(scheduler.port)

    supervisor.start_ranks(plans, program, may_start)


def numbers_ranks_by_registration() -> bool:
    """Whether MindSpore here is older than 2.3, the first release with msrun (see ``one_by_one`` above)."""
    try:
        major, minor = re.findall(r"[0-9]+", metadata.version("mindspore"))[:2]
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) < (2, 3)


def _is_listening(port: int) -> bool:
    """Whether somebody listens at this port, seen without connecting to it."""
    tables = [path.read_text() for path in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if path.exists()]
    return any(re.search(rf":{port:04X} [0-9A-F]+:0000 0A ", table) for table in tables)


# ------------------------------------------------------------------------------------------------------------
# The start through msrun
# ------------------------------------------------------------------------------------------------------------

UNDER_MSRUN = "--under-msrun"


class _MsrunRank:
    """A rank whose parent is ``_under_msrun``, which reports its process id and its exit code."""

    def __init__(self, control: _Control) -> None:
        self.wrapper_pid: int | None = None
        self.pid: int | None = None
        self.code: int | None = None
        self._control = control

    def poll(self) -> int | None:
        # Looked up before the report is read: a wrapper reports first and ends then.
        ended = self.wrapper_pid is not None and not _is_running(self.wrapper_pid)
        self._control.read()
        return -signal.SIGKILL if self.code is None and ended else self.code

    def send_signal(self, number: int, /) -> None:
        if self.pid is not None and self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class _Control:
    """The pipe on which the wrappers under msrun report, a line each time: rank, what, value."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self.ranks: dict[int, _MsrunRank] = {}

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            # Reports are far below PIPE_BUF, so that each arrives whole; both ends stay open as long as we
            # live.
            for line in os.read(self._read_end, PIPE_BYTES).decode().splitlines():
                rank, what, value = line.split()
                setattr(self.ranks[int(rank)], what, int(value))


def start_msrun(
    supervisor: Supervisor,
    table: RankTable,
    plans: Sequence[RankPlan],
    program: Sequence[str],
    scheduler: Scheduler,
) -> None:
    """Let msrun start scheduler and ranks, each through ``_under_msrun``.

    Of msrun's options the oldest are used, which releases before 2.10 should have too. Devices, cores and logs are
    set by the wrapper.

    Raises:
        UserError: There is no msrun, or the table numbers its ranks in a way that msrun cannot.
    """
    beside = Path(sys.executable).parent
    path = os.pathsep.join([str(beside), plans[0].environment.get("PATH", os.defpath)])
    msrun = shutil.which("msrun", path=path)
    if msrun is None:
        raise UserError("LAUNCHER=msrun: there is no msrun beside this Python; MindSpore has it from 2.3 on")
    node_rank, misplaced = divmod(plans[0].rank, len(plans))
    if misplaced or [plan.rank for plan in plans] != list(range(plans[0].rank, plans[0].rank + len(plans))):
        raise UserError(
            f"server {plans[0].server_id}: LAUNCHER=msrun numbers ranks server by server; "
            "this table needs LAUNCHER=dynamic"
        )
    control = _Control()
    orders = {}
    for plan in plans:
        rank = _Rank(plan, _MsrunRank(control), supervisor.output_of(plan))
        control.ranks[plan.rank] = rank.process  # type: ignore[assignment]
        supervisor.ranks.append(rank)
        orders[plan.rank] = {
            "device_id": plan.device_id,
            "cores": plan.cores,
            "output": [f"/proc/{os.getpid()}/fd/{end}" for end in rank.output.write_ends],
        }
    order = json.dumps({"report": f"/proc/{os.getpid()}/fd/{control.write_end}", "ranks": orders})
    command = [
        msrun,
        f"--worker_num={table.rank_count}",
        f"--local_worker_num={len(plans)}",
        f"--master_addr={scheduler.host}",
        f"--master_port={scheduler.port}",
        f"--node_rank={node_rank}",
        f"--log_dir={supervisor.log_dir / 'msrun'}",
        "--join=True",
        *(str(Path(__file__).resolve()), UNDER_MSRUN, order, *program),
    ]
    environment = {key: value for key, value in plans[0].environment.items() if key not in INHERITED_NO_MORE}
    environment["PATH"] = path  # msrun runs __file__ with the first python it finds there
    supervisor.start_helper("msrun", command, environment)


def _under_msrun(order_text: str, program: Sequence[str]) -> int:
    """Stand between msrun and a rank: give it its place, die with msrun, report its end to the launcher."""
    _die_with_parent()
    if os.environ["MS_ROLE"] == "MS_SCHED":
        os.execv(sys.executable, [sys.executable, "-c", SCHEDULER_PROGRAM])
    order = json.loads(order_text)
    rank = os.environ["MS_NODE_ID"]
    own = order["ranks"][rank]
    report = os.open(order["report"], os.O_WRONLY)
    os.write(report, f"{rank} wrapper_pid {os.getpid()}\n".encode())
    output = [os.open(path, os.O_WRONLY) for path in own["output"]]
    process = subprocess.Popen(
        list(program),
        env=dict(os.environ, DEVICE_ID=str(own["device_id"])),  # msrun counts from 0, whatever the table says
        stdout=output[0],
        stderr=output[1],
        preexec_fn=_prepare(own["cores"]),
    )
    os.write(report, f"{rank} pid {process.pid}\n".encode())
    code = process.wait()
    os.write(report, f"{rank} code {code}\n".encode())
    return _exit_code(code)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = {"Ascend": "configs/imagenet/skipvit_small.yaml", "CPU": "configs/clutter/skipvit.yaml"}
DESCRIPTION = "Train with one process for each rank of an HCCL rank table: the same command on every server."
EPILOG = """\
Settings in the environment (DEVICE_TARGET, LAUNCHER, SERVER_ID, ...): bash run_distribute_train.sh --help lists them.

Example, 20 steps on the CPU of this machine, with as many ranks as the table has:
  DEVICE_TARGET=CPU bash run_distribute_train.sh rank_table_2p.json configs/clutter/skipvit.yaml \\
      train.max_steps=20 train.output=runs/two_ranks
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help explains)")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """``rank_table``, ``config`` (None without one), ``overrides`` and ``log_dir`` (None without one)."""
    parser = _Parser(
        prog=f"bash {COMMAND}.sh",
        usage="%(prog)s [--log-dir DIR] RANK_TABLE [CONFIG] [key=value ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    configs = f"{DEFAULT_CONFIG['Ascend']}, on CPU {DEFAULT_CONFIG['CPU']}"
    parser.add_argument("rank_table", metavar="RANK_TABLE", help="an HCCL rank table, as hccl_tools.py writes it")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"a recipe ({configs})")
    key_help = "override any key, such as train.epochs=10"
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=key_help)
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="one log a rank (logs in the run's folder)")
    arguments = parser.parse_args(argv)
    # The first is a recipe unless it is an override; the path of a recipe may hold a = too.
    if arguments.config is not None and "=" in arguments.config and not os.path.exists(arguments.config):
        arguments.overrides = [arguments.config, *arguments.overrides]
        arguments.config = None
    return arguments


def launch(
    rank_table: str | Path,
    program: Sequence[str],
    log_dir: Path,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Check the table, start this machine's ranks, wait for them.

    Args:
        rank_table: The table's file.
        program: What each rank runs: arguments for the Python of ``SKIPVIT_PYTHON``.
        log_dir: Where ``rank_<i>.log`` go; made where it is not there.
        environment: Settings, and what the ranks inherit; by default this process's own.

    Returns:
        The exit code, see ``Supervisor.run``.

    Raises:
        UserError: Anything found wrong before the ranks run.
    """
    environment = os.environ if environment is None else environment
    settings = Settings.of(environment)
    table = read_rank_table(rank_table)
    local = local_servers(table, settings)
    scheduler = place_scheduler(table, local, settings)
    plans = plan_ranks(table, local, settings, scheduler, environment, sorted(os.sched_getaffinity(0)))
    command = [settings.python, *program]
    with _only_one_in(log_dir), Supervisor(log_dir, settings.stop_grace) as supervisor:
        ranks = ", ".join(str(plan.rank) for plan in plans)
        meeting = f", scheduler {scheduler.host}:{scheduler.port}" if scheduler else ""
        _say(
            f"ranks {ranks} of {table.rank_count} on {settings.device_target}, "
            f"{settings.launcher} start{meeting}; logs in {log_dir}"
        )
        if scheduler is None:
            supervisor.start_ranks(plans, command)
        elif settings.launcher == "msrun":
            start_msrun(supervisor, table, plans, command, scheduler)
        else:
            one_by_one = numbers_ranks_by_registration()
            start_dynamic(supervisor, plans, command, scheduler, settings.python, one_by_one)
        return supervisor.run()


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
    if len(argv) > 2 and argv[0] == UNDER_MSRUN:
        return _under_msrun(argv[1], argv[2:])
    try:
        arguments = parse_arguments(argv)
        config = arguments.config or str(REPOSITORY / DEFAULT_CONFIG[Settings.of(os.environ).device_target])
        # Loaded here too, so that a mistake in it is told once and before any rank starts.
        output = load(config, arguments.overrides).train.output
        program = ["-m", "skipvit.train", config, *arguments.overrides]
        return launch(arguments.rank_table, program, arguments.log_dir or Path(output) / "logs")
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
