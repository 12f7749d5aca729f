"""HCCL rank tables: read one, check it, and find which of its servers this machine is.

Template 1 (``server_list``) and the older template 2 (``group_list``) are read. The rules are those of CANN's "Rank
Table Configuration (Atlas training product)".
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from skipvit.config import UserError

# 4,096 servers of 8 devices need about 5 MB; a file beyond this is no rank table.
MAX_TABLE_BYTES = 8 * 2**20
WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
# What CANN's documents allow as server_id: a name or an address of at most 64 characters.
SERVER_NAME = re.compile(r"[0-9A-Za-z:][0-9A-Za-z._:%-]{0,63}")
# A server_id that must be an address, for it looks like one.
LIKE_AN_ADDRESS = re.compile(r"[0-9]+[.:][0-9.:]*|[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*")

BROADCAST = ipaddress.IPv4Address("255.255.255.255")


@dataclass(frozen=True)
class Device:
    """One rank of the table: its number in the job, its device on the server, that device's own address."""

    rank: int
    device_id: int
    address: str | None


@dataclass(frozen=True)
class Server:
    """One server: its id and the other addresses that the table gives for it, its devices in order of rank."""

    names: tuple[str, ...]
    devices: tuple[Device, ...]

    @property
    def server_id(self) -> str:
        """As the table has it."""
        return self.names[0]


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
    """Read and check a rank table.

    The file is data of a stranger: its size is bounded before it is read, and nothing in it is executed or looked up.

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


# ---------------------------------------------------------------------------------------- the two forms of a table


def _servers_of_template_1(table: dict[str, Any]) -> list[Server]:
    version = table.get("version")
    if version is None:
        raise UserError('version is missing; template 1 has "version": "1.0"')
    if version != "1.0":
        raise UserError(f'version must be "1.0", not {_show(version)} (1.1 and later are for other products)')
    entries = _list_of_objects(table, "server_list")
    server_count = _whole_number(table, "server_count")
    if server_count != len(entries):
        raise UserError(f"server_count says {server_count}, server_list holds {len(entries)}")
    servers = []
    for number, entry in enumerate(entries, start=1):
        names = _names(entry, f"server {number} of server_list")
        place = f"server {names[0]}: "
        devices = [
            _device(device, device, f"{place}device number {device_number}: ", place)
            for device_number, device in enumerate(_list_of_objects(entry, "device", place), start=1)
        ]
        servers.append(_server(names, devices))
    return servers


def _servers_of_template_2(table: dict[str, Any]) -> list[Server]:
    """Gather the instances of the one group by server.

    Two forms are met: one instance a device with ``rank_id``, and one instance a server with several ``devices`` and no
    ranks, which are then numbered in the order of the list.
    """
    groups = _list_of_objects(table, "group_list")
    if len(groups) != 1:
        raise UserError(f"group_list holds {len(groups)} groups; one is supported")
    group = groups[0]
    instances = _list_of_objects(group, "instance_list", "group_list: ")
    ranks_given = "rank_id" in instances[0]
    found: dict[str, tuple[tuple[str, ...], list[Device]]] = {}
    rank = 0
    for number, instance in enumerate(instances, start=1):
        names = _names(instance, f"instance {number} of instance_list")
        place = f"server {names[0]}: "
        names, devices = found.setdefault(_normal(names[0]), (names, []))
        entries = _list_of_objects(instance, "devices", f"{place}instance {number}: ")
        if ranks_given != ("rank_id" in instance) or (ranks_given and len(entries) > 1):
            raise UserError(f"{place}instance {number}: either each instance is one device with rank_id, or none has")
        for entry in entries:
            holder = instance if ranks_given else {"rank_id": str(rank)}
            devices.append(_device(entry, holder, f"{place}device number {len(devices) + 1}: ", place))
            rank += 1
    counts = [("group_count", table, 1), ("instance_count", group, len(instances)), ("server_num", group, len(found))]
    for key, holder, count in [*counts, ("device_count", group, rank), ("device_num", group, rank)]:
        # Generators of this old form wrote counts as text or as numbers, and not all of them.
        if key in holder and str(holder[key]) != str(count):
            raise UserError(f"{key} says {_show(holder[key])}, the table holds {count}")
    return [_server(names, devices) for names, devices in found.values()]


def _names(entry: dict[str, Any], place: str) -> tuple[str, ...]:
    """The server's id, an address or a name such as ``node_0``, then what other addresses of it are given."""
    server_id = entry.get("server_id")
    if server_id is None:
        raise UserError(f"{place}: server_id is missing")
    if not isinstance(server_id, str) or not SERVER_NAME.fullmatch(server_id):
        raise UserError(f"{place}: server_id must be text, an address or a name such as node_0, not {_show(server_id)}")
    if LIKE_AN_ADDRESS.fullmatch(server_id) and address_of(server_id) is None:
        raise UserError(f"server {server_id}: server_id is not a well-formed address")
    # server_ip is how MindCluster writes a pod's address.
    others = (_address(entry, key, f"server {server_id}: ") for key in ("container_ip", "host_ip", "server_ip"))
    return tuple(dict.fromkeys((server_id, *(address for address in others if address is not None))))


def _device(entry: dict[str, Any], rank_holder: dict[str, Any], place: str, server_place: str) -> Device:
    device_id = _whole_number(entry, "device_id", place)
    place = f"{server_place}device {device_id}: "
    if device_id > 7:
        raise UserError(f"{place}device_id must be 0 to 7")
    return Device(_whole_number(rank_holder, "rank_id", place), device_id, _address(entry, "device_ip", place))


def _server(names: tuple[str, ...], devices: list[Device]) -> Server:
    """Check the devices of one server against each other."""
    place = f"server {names[0]}"
    ids: list[int] = []
    for device in devices:
        if device.device_id in ids:
            raise UserError(f"{place}: device {device.device_id} is given twice")
        ids.append(device.device_id)
    if len(ids) not in (1, 2, 4, 8):
        raise UserError(f"{place}: {len(ids)} devices; a server takes part with 1, 2, 4 or 8")
    if len(ids) in (2, 4) and len({device_id // 4 for device_id in ids}) > 1:  # 0-3 and 4-7 are two separate rings
        listed = ", ".join(map(str, sorted(ids)))
        raise UserError(f"{place}: devices {listed}: {len(ids)} devices must all lie within 0-3 or within 4-7")
    return Server(names, tuple(sorted(devices, key=lambda device: device.rank)))


def _check_across_servers(servers: list[Server]) -> None:
    """Servers distinct and of one size, ranks 0 to n-1 each once, device addresses given and distinct."""
    owners: dict[str, Server] = {}
    ranks: dict[int, str] = {}
    addresses: dict[str, str] = {}
    for server in servers:
        # Its id and its nearest address; the host_ip of two containers may be one.
        for name in server.names[:2]:
            owner = owners.setdefault(_normal(name), server)
            if owner is not server:
                raise UserError(f"server {server.server_id}: {name} already names another server, {owner.server_id}")
        for device in server.devices:
            place = f"server {server.server_id}: device {device.device_id}"
            if device.rank in ranks:
                raise UserError(f"{place}: rank_id {device.rank} is already that of {ranks[device.rank]}")
            ranks[device.rank] = place
            if device.address is None:
                if len(servers) > 1:
                    raise UserError(f"{place}: device_ip is missing; with more than one server each device needs it")
            elif device.address in addresses:
                raise UserError(f"{place}: device_ip {device.address} is already that of {addresses[device.address]}")
            else:
                addresses[device.address] = place
    count, last = len(ranks), max(ranks)
    if last != count - 1:
        gap = next(rank for rank in range(count) if rank not in ranks)
        raise UserError(
            f"{ranks[last]}: rank_id {last}, but no device has rank_id {gap}; {count} ranks are 0 to {count - 1}"
        )
    for server in servers:
        if len(server.devices) != len(servers[0].devices):
            raise UserError(
                f"server {server.server_id}: {len(server.devices)} devices, server {servers[0].server_id}: "
                f"{len(servers[0].devices)}; each server must take part with the same number"
            )


# ------------------------------------------------------------------------------------------ the file and its values


def _load_json(path: Path) -> Any:
    """Parse a regular file of bounded size as JSON in which no key is given twice."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a regular file")
        if status.st_size > MAX_TABLE_BYTES:
            raise UserError(f"{status.st_size} bytes; a rank table has at most {MAX_TABLE_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not content.strip():
        raise UserError("the file is empty")
    try:
        text = content.decode("utf-8")
        if text.startswith("\ufeff"):
            raise UserError("begins with a byte order mark; save it as UTF-8 without one")
        return json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError):
        # ValueError: Python 3.11 refuses to convert whole numbers of thousands of digits.
        raise UserError("not a rank table: nested too deeply, or a number too long") from None


def _no_constant(name: str) -> Any:
    raise UserError(f"not JSON: {name} is no value")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"the key {_show(key)} is given twice in one object")
        found[key] = value
    return found


def _list_of_objects(holder: dict[str, Any], key: str, place: str = "") -> list[dict[str, Any]]:
    value = holder.get(key)
    if value is None:
        raise UserError(f"{place}{key} is missing")
    if not isinstance(value, list):
        raise UserError(f"{place}{key} must be a list")
    if not value:
        raise UserError(f"{place}{key} is an empty list")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{place}{key}: entry {number} must be an object, not {_show(entry)}")
    return value


def _whole_number(holder: dict[str, Any], key: str, place: str = "") -> int:
    value = holder.get(key)
    if value is None:
        raise UserError(f"{place}{key} is missing")
    if not isinstance(value, str):
        raise UserError(f'{place}{key} must be text such as "0", not {_show(value)}')
    if not WHOLE_NUMBER.fullmatch(value):
        raise UserError(f"{place}{key} must be a whole number, not {_show(value)}")
    return int(value)


def _address(holder: dict[str, Any], key: str, place: str) -> str | None:
    """A well-formed address in its normal spelling, or None where the key is absent or empty."""
    value = holder.get(key)
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str):
            raise ValueError
        address = ipaddress.ip_address(value)
        if "%" in value or address.is_unspecified or address.is_multicast or address == BROADCAST:
            raise ValueError
    except ValueError:
        raise UserError(f"{place}{key} {_show(value)} is not the address of one host") from None
    return address_of(value)


def _show(value: object) -> str:
    """A value of the table for a message: one line, no control characters, not too long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -------------------------------------------------------------------------- which server of the table is this machine


def find_server(table: RankTable, machine_names: Sequence[str], server_id: str | None = None) -> Server:
    """The table's server that this machine is.

    Args:
        table: The checked table.
        machine_names: This machine's addresses and host names (``this_machine()``).
        server_id: What ``SERVER_ID=`` says, if anything: then it alone decides.

    Raises:
        UserError: No server matches, or more than one; says what was looked for and what the table holds.
    """
    looked_for = [server_id] if server_id else machine_names
    wanted = {_normal(name) for name in looked_for}
    found = [server for server in table.servers if wanted & {_normal(name) for name in server.names}]
    if len(found) == 1:
        return found[0]
    held = ", ".join("/".join(server.names) for server in table.servers[:16])
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


def address_of(name: str) -> str | None:
    """An address in its one normal spelling without its interface (``%eth0``), or None for what is no address."""
    try:
        address = ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


def _normal(name: str) -> str:
    """A name in the one spelling in which names are compared."""
    return address_of(name) or name.lower()
