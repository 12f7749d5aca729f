"""Rank tables: what is accepted, what is refused and how, and which server a machine finds itself to be."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipvit.config import UserError
from skipvit.rank_table import MAX_TABLE_BYTES, Device, find_server, read_rank_table

pytestmark = pytest.mark.slow  # the same on every MindSpore: not in the fast part for 2.0.0


def table_of(servers=2, devices=8, first_device=0):
    """A faultless table of template 1, with ranks in order of server and device."""
    return {
        "version": "1.0",
        "server_count": str(servers),
        "server_list": [
            {
                "server_id": f"10.0.0.{server + 1}",
                "device": [
                    {
                        "device_id": str(first_device + device),
                        "device_ip": f"192.168.{server}.{device + 1}",
                        "rank_id": str(server * devices + device),
                    }
                    for device in range(devices)
                ],
            }
            for server in range(servers)
        ],
        "status": "completed",
    }


def group_table_of(servers=2, devices=8):
    """The same in template 2, an instance for each device, as model zoos wrote it in 2020."""
    instances = [
        {
            "devices": [{"device_id": device["device_id"], "device_ip": device["device_ip"]}],
            "rank_id": device["rank_id"],
            "server_id": server["server_id"],
        }
        for server in table_of(servers, devices)["server_list"]
        for device in server["device"]
    ]
    return {
        "board_id": "0x0020",
        "chip_info": "910",
        "deploy_mode": "lab",
        "group_count": "1",
        "group_list": [
            {
                "device_num": str(servers * devices),
                "server_num": str(servers),
                "group_name": "",
                "instance_count": str(servers * devices),
                "instance_list": instances,
            }
        ],
        "para_plane_nic_location": "device",
        "para_plane_nic_name": ["eth0", "eth1"],
        "para_plane_nic_num": "8",
        "status": "completed",
    }


def write(folder, table, name="rank table.json"):
    path = folder / name
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def server(table, number=0):
    return table["server_list"][number]


def device(table, number=0, of=0):
    return table["server_list"][of]["device"][number]


def change(where, **values):
    """A fault: set these keys, or take away those set to None."""

    def apply(table):
        entry = where(table)
        for key, value in values.items():
            if value is None:
                del entry[key]
            else:
                entry[key] = value

    return apply


def top(table):
    return table


def one_server_with(device_ids):
    def apply(table):
        table["server_count"] = "1"
        table["server_list"] = [
            {
                "server_id": "10.0.0.1",
                "device": [
                    {"device_id": str(number), "device_ip": f"192.168.0.{rank + 1}", "rank_id": str(rank)}
                    for rank, number in enumerate(device_ids)
                ],
            }
        ]

    return apply


def server_ids(first, second):
    def apply(table):
        server(table, 0)["server_id"], server(table, 1)["server_id"] = first, second

    return apply


def container_ips(first, second):
    def apply(table):
        server(table, 0)["container_ip"], server(table, 1)["container_ip"] = first, second

    return apply


def drop_second_half_of_second_server(table):
    del server(table, 1)["device"][4:]


def group(table):
    return table["group_list"][0]


def instance(table, number=0):
    return table["group_list"][0]["instance_list"][number]


# Each fault is put into a faultless table of 2 servers with 8 devices; its message is matched by no other fault's.
FAULTS = [
    (change(top, version=None), r"version is missing"),
    (change(top, version="1.2"), r'version must be "1\.0", not "1\.2"'),
    (change(top, version=1.0), r'version must be "1\.0", not 1\.0'),
    (change(top, status="initializing"), r"not ready yet"),
    (change(top, status="failed"), r'status must be "completed" or absent, not "failed"'),
    (change(top, server_list=None), r"neither server_list .* nor group_list"),
    (change(top, server_list={}), r"server_list must be a list"),
    (change(top, server_list=[]), r"server_list is an empty list"),
    (lambda table: table["server_list"].append("10.0.0.3"), r"server_list: entry 3 must be an object, not \"10"),
    (change(top, server_count=None), r"server_count is missing"),
    (change(top, server_count=2), r'server_count must be text such as "0", not 2'),
    (change(top, server_count="two"), r'server_count must be a whole number, not "two"'),
    (change(top, server_count="3"), r"server_count says 3, server_list holds 2"),
    (change(server, server_id=None), r"server 1 of server_list: server_id is missing"),
    (change(server, server_id=7), r"server 1 of server_list: server_id must be text.*not 7$"),
    (change(server, server_id="node 0\n"), r'server 1 of server_list: server_id must be text.*not "node 0\\n"'),
    (change(server, server_id="10.0.0.256"), r"server 10\.0\.0\.256: server_id is not a well-formed address"),
    (
        change(server, server_id="10.0.0.2"),
        r"server 10\.0\.0\.2: 10\.0\.0\.2 already names another server, 10\.0\.0\.2$",
    ),
    (server_ids("fd00::a", "FD00:0:0::A"), r"server FD00:0:0::A: FD00:0:0::A already names another server, fd00::a"),
    (server_ids("node_a", "NODE_A"), r"server NODE_A: NODE_A already names another server, node_a"),
    (change(server, server_id="10.0.0.1:80"), r"server 10\.0\.0\.1:80: server_id is not a well-formed address"),
    (change(server, server_id="fd00:::a"), r"server fd00:::a: server_id is not a well-formed address"),
    (
        change(lambda t: server(t, 1), host_ip="10.0.0.1"),
        r"server 10\.0\.0\.2: 10\.0\.0\.1 already names another server, 10\.0\.0\.1$",
    ),
    (
        container_ips("10.244.0.1", "::ffff:10.244.0.1"),
        r"server 10\.0\.0\.2: 10\.244\.0\.1 already names another server, 10\.0\.0\.1$",
    ),
    (change(server, host_ip="10.0.0"), r'server 10\.0\.0\.1: host_ip "10\.0\.0" is not the address of one host'),
    (change(server, container_ip="0.0.0.0"), r'server 10\.0\.0\.1: container_ip "0\.0\.0\.0" is not the address'),
    (change(server, container_ip="255.255.255.255"), r'server 10\.0\.0\.1: container_ip "255\..* is not the address'),
    (change(server, device=None), r"server 10\.0\.0\.1: device is missing"),
    (change(server, device="8"), r"server 10\.0\.0\.1: device must be a list"),
    (change(server, device=[]), r"server 10\.0\.0\.1: device is an empty list"),
    (change(lambda t: server(t, 1), device=[7]), r"server 10\.0\.0\.2: device: entry 1 must be an object, not 7"),
    (change(device, device_id=None), r"server 10\.0\.0\.1: device number 1: device_id is missing"),
    (change(device, device_id=0), r"server 10\.0\.0\.1: device number 1: device_id must be text"),
    (change(device, device_id="-1"), r"server 10\.0\.0\.1: device number 1: device_id must be a whole number"),
    (change(lambda t: device(t, 3, of=1), device_id="8"), r"server 10\.0\.0\.2: device 8: device_id must be 0 to 7"),
    (change(lambda t: device(t, 3), device_id="2"), r"server 10\.0\.0\.1: device 2 is given twice"),
    (one_server_with([0, 1, 2]), r"server 10\.0\.0\.1: 3 devices; a server takes part with 1, 2, 4 or 8"),
    (one_server_with([3, 4]), r"server 10\.0\.0\.1: devices 3, 4: 2 devices must all lie within 0-3 or within 4-7"),
    (one_server_with([1, 2, 3, 4]), r"server 10\.0\.0\.1: devices 1, 2, 3, 4: 4 devices must all lie within"),
    (drop_second_half_of_second_server, r"server 10\.0\.0\.2: 4 devices, server 10\.0\.0\.1: 8"),
    (change(lambda t: device(t, 7), device_ip=None), r"server 10\.0\.0\.1: device 7: device_ip is missing"),
    (
        change(lambda t: device(t, 7), device_ip="192.168.1"),
        r"server 10\.0\.0\.1: device 7: device_ip \"192\.168\.1\" is",
    ),
    (
        change(lambda t: device(t, 7, of=1), device_ip="192.168.0.1"),
        r"server 10\.0\.0\.2: device 7: device_ip 192\.168\.0\.1 is already that of server 10\.0\.0\.1: device 0",
    ),
    (
        change(lambda t: device(t, 6, of=1), device_ip="::ffff:192.168.0.1"),
        r"server 10\.0\.0\.2: device 6: device_ip 192\.168\.0\.1 is already that of server 10\.0\.0\.1: device 0",
    ),
    (
        change(lambda t: device(t, 6), device_ip="fe80::1%eth0"),
        r"server 10\.0\.0\.1: device 6: device_ip .* is not the",
    ),
    (change(lambda t: device(t, 2), rank_id=None), r"server 10\.0\.0\.1: device 2: rank_id is missing"),
    (change(lambda t: device(t, 2), rank_id=2), r"server 10\.0\.0\.1: device 2: rank_id must be text"),
    (change(lambda t: device(t, 2), rank_id="2.0"), r"server 10\.0\.0\.1: device 2: rank_id must be a whole number"),
    (
        change(lambda t: device(t, 2, of=1), rank_id="3"),
        r"server 10\.0\.0\.2: device 2: rank_id 3 is already that of server 10\.0\.0\.1: device 3",
    ),
    (change(lambda t: device(t, 5), rank_id="16"), r"server 10\.0\.0\.1: device 5: rank_id 16, but .* has rank_id 5;"),
]
GROUP_FAULTS = [
    (lambda table: table["group_list"].append(group(table)), r"group_list holds 2 groups"),
    (change(group, instance_list=None), r"instance_list is missing"),
    (change(top, group_count="2"), r'group_count says "2"'),
    (change(group, instance_count="8"), r'instance_count says "8", the table holds 16'),
    (change(group, device_num=8), r"device_num says 8, the table holds 16"),
    (change(group, server_num="1"), r'server_num says "1", the table holds 2'),
    (change(instance, devices=None), r"server 10\.0\.0\.1: instance 1: devices is missing"),
    (change(lambda t: instance(t, 9), rank_id=None), r"server 10\.0\.0\.2: instance 10: either each instance"),
    (change(lambda t: instance(t, 9), rank_id="0"), r"server 10\.0\.0\.2: device 1: rank_id 0 is already that of"),
]
TEXTS = [
    ("", r"the file is empty"),
    ("[1, 2]", r"must be a JSON object"),
    ('{"version": "1.0",}', r"not JSON: .* at line 1, column 1[89]"),
    ('{"version": "1.0", "version": "1.0"}', r'the key "version" is given twice'),
    ("[" * 100_000, r"nested too deeply"),
    ('{"version": "1.0", "board_id": NaN}', r"not JSON: NaN is no value"),
    ("\ufeff{}", r"begins with a byte order mark"),
]
FAULTY = [
    *((table_of, fault, pattern) for fault, pattern in FAULTS),
    *((group_table_of, fault, pattern) for fault, pattern in GROUP_FAULTS),
]


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_rank_table(path)
    message = str(caught.value)
    assert "\n" not in message
    prefix = f"rank table {path}: "
    assert message.startswith(prefix)
    return message[len(prefix) :]


def test_the_tables_that_faults_are_put_into_are_accepted(tmp_path):
    for make in (table_of, group_table_of):
        assert read_rank_table(write(tmp_path, make())).rank_count == 16


def test_each_faulty_table_is_refused_with_its_own_message(tmp_path):
    messages = []
    for make, fault, _ in FAULTY:
        table = make()
        fault(table)
        messages.append(refusal(write(tmp_path, table)))
    messages += [refusal(write(tmp_path, text)) for text, _ in TEXTS]
    patterns = [*(pattern for _, _, pattern in FAULTY), *(pattern for _, pattern in TEXTS)]
    assert len(patterns) >= 50
    assert len(set(messages)) == len(messages)
    for number, pattern in enumerate(patterns):
        matching = [message for message in messages if re.search(pattern, message)]
        assert matching == [messages[number]], pattern


def test_files_that_are_no_tables_are_refused(tmp_path):
    assert refusal(tmp_path / "none.json") == "cannot be read: No such file or directory"
    assert refusal(tmp_path) == "not a regular file"
    (tmp_path / "latin").write_bytes(b'{"server_id": "n\xf6de"}')
    assert refusal(tmp_path / "latin") == "not UTF-8 text (byte 16)"
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_TABLE_BYTES + 1)
    assert "a rank table has at most" in refusal(tmp_path / "large")


def test_what_a_message_shows_of_the_file_is_short_and_harmless(tmp_path):
    table = table_of()
    server(table)["server_id"] = "\x1b[2J" + "x" * 5000
    message = refusal(write(tmp_path, table))
    assert len(message) < 200
    assert message.isprintable()


def test_uneven_servers_are_refused(tmp_path):
    table = table_of()
    drop_second_half_of_second_server(table)
    assert refusal(write(tmp_path, table)) == (
        "server 10.0.0.2: 4 devices, server 10.0.0.1: 8; each server must take part with the same number"
    )


ACCEPTED = {
    "no status": change(top, status=None),
    "server names": lambda table: [entry.update(server_id=f"node_{i}") for i, entry in enumerate(table["server_list"])],
    "host_ip": change(server, host_ip="172.16.0.100"),
    "container_ip": change(server, container_ip="10.244.1.7"),
    "empty container_ip": change(server, container_ip=""),
    "a number as server_id": change(server, server_id="7"),
    "two containers of one host": lambda table: [
        entry.update(host_ip="172.16.0.100", container_ip=f"10.244.1.{i}")
        for i, entry in enumerate(table["server_list"])
    ],
    "host_nic_ip reserve": change(server, host_nic_ip="reserve"),
    "para_plane_nic_ip unknown": change(top, para_plane_nic_location="device"),
    "unknown in device": change(device, device_logical_id="0", device_port="16667"),
    "IPv6": change(device, device_ip="fd00::1"),
    "servers in another order": lambda table: table["server_list"].reverse(),
    "devices in another order": lambda table: server(table)["device"].reverse(),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_real_tables_contain_is_accepted(tmp_path, name):
    table = table_of()
    ACCEPTED[name](table)
    read = read_rank_table(write(tmp_path, table))
    assert [device.rank for server in read.servers for device in server.devices] == list(range(16))
    assert [device.device_id for device in read.servers[1].devices] == list(range(8))


@pytest.mark.parametrize(("devices", "first"), [(1, 0), (1, 7), (2, 2), (2, 4), (4, 0), (4, 4), (8, 0)])
def test_sizes_and_places_of_one_server(tmp_path, devices, first):
    read = read_rank_table(write(tmp_path, table_of(1, devices, first)))
    assert [device.device_id for device in read.servers[0].devices] == list(range(first, first + devices))


def test_one_server_needs_no_device_addresses(tmp_path):
    table = table_of(1, 2)
    for entry in server(table)["device"]:
        del entry["device_ip"]
    assert read_rank_table(write(tmp_path, table)).servers[0].devices == (Device(0, 0, None), Device(1, 1, None))


def test_both_templates_read_the_same(tmp_path):
    first = read_rank_table(write(tmp_path, table_of()))
    second = read_rank_table(write(tmp_path, group_table_of()))
    assert first.servers == second.servers


def test_template_2_gathers_a_server_whose_address_is_written_in_two_ways(tmp_path):
    table = group_table_of()
    for number, entry in enumerate(group(table)["instance_list"][:8]):
        entry["server_id"] = ("fd00::a", "FD00:0:0::A")[number % 2]
    assert [len(found.devices) for found in read_rank_table(write(tmp_path, table)).servers] == [8, 8]


def test_template_2_without_ranks_counts_in_order(tmp_path):
    """A form that older training scripts carried: one instance a server, devices in the order of their ring."""
    order = [5, 6, 7, 0, 1, 2, 3, 4]
    devices = [{"device_id": str(number), "device_ip": f"192.168.0.{number + 1}"} for number in order]
    table = {
        "group_count": "1",
        "group_list": [
            {
                "group_name": "worker",
                "device_count": "8",
                "instance_count": "1",
                "instance_list": [{"devices": devices, "pod_name": "another", "server_id": "127.0.0.1"}],
            }
        ],
        "status": "completed",
    }
    read = read_rank_table(write(tmp_path, table))
    assert [(device.rank, device.device_id) for device in read.servers[0].devices] == list(enumerate(order))


def places_in(node, path=()):
    """The path of every entry of a JSON value."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places_in(value, (*path, key))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["0", "9", "::1"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_table_is_read_or_refused_in_one_line(tmp_path, data):
    table = data.draw(st.sampled_from([table_of(2, 2), group_table_of(2, 2)]))
    table = copy.deepcopy(table)
    *above, last = data.draw(st.sampled_from(list(places_in(table))))
    node = table
    for key in above:
        node = node[key]
    node[last] = data.draw(JSON_VALUES)
    path = write(tmp_path, table)
    try:
        read_rank_table(path)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert message.isprintable()


# ------------------------------------------------------------------------------------------------ which server


NAMED = table_of(3, 1)
for number, entry in enumerate(NAMED["server_list"]):
    entry.update(server_id=f"node_{number}", host_ip=f"172.16.0.{number}", container_ip=f"10.244.0.{number}")
NAMED["server_list"][0].update(server_id="trainer-a.cluster.local")


@pytest.mark.parametrize(
    ("machine_names", "server_id", "expected"),
    [
        (["somewhere", "172.16.0.1"], None, 1),
        (["somewhere", "10.244.0.2", "127.0.0.1"], None, 2),
        (["node_2"], None, 2),
        (["TRAINER-A.cluster.local", "trainer-a"], None, 0),
        (["node_2"], "node_1", 1),
        (["node_2"], "10.244.0.1", 1),
        (["fe80::1%eth0", "172.16.0.0"], None, 0),
    ],
)
def test_a_machine_finds_its_server(tmp_path, machine_names, server_id, expected):
    table = read_rank_table(write(tmp_path, NAMED))
    assert find_server(table, machine_names, server_id) == table.servers[expected]


def test_addresses_are_compared_as_addresses(tmp_path):
    table = table_of(1, 1)
    server(table)["server_id"] = "FD00:0:0::00ff"
    read = read_rank_table(write(tmp_path, table))
    assert find_server(read, ["fd00::ff"]) == read.servers[0]


def test_no_server_of_the_table(tmp_path):
    table = read_rank_table(write(tmp_path, NAMED))
    with pytest.raises(UserError) as caught:
        find_server(table, ["here", "192.0.2.1"])
    message = str(caught.value)
    for part in ("no server matches this machine (here, 192.0.2.1)", "node_1/10.244.0.1/172.16.0.1", "SERVER_ID="):
        assert part in message
    with pytest.raises(UserError, match=r"no server matches SERVER_ID \(node_9\)"):
        find_server(table, ["node_1"], "node_9")


def test_two_servers_on_one_machine_need_server_id(tmp_path):
    table = read_rank_table(write(tmp_path, NAMED))
    with pytest.raises(UserError, match="2 servers match this machine"):
        find_server(table, ["172.16.0.1", "10.244.0.2"])
