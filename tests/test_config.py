"""The configuration files: the documented ones load, and every mistake is named with file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from replica.config import (
    kind_of,
    load_receiver,
    load_sender,
    parse_duration,
    parse_listen,
    parse_rate,
    parse_size,
    parse_url,
)
from replica.errors import ConfigError
from replica.model import Consistency
from replica.primary.spec import DiskSpec
from replica.store import Policy
from replica.store.space import Limit, SpaceLimits

RECEIVER = """\
listen = "127.0.0.1:8443"
[tls]
ca = "pki/ca.crt"
cert = "pki/dr-1.crt"
key = "pki/dr-1.key"
[[storage]]
name = "tier1"
path = "replicas/"
[[allow]]
primary = "hv-*"
storage = "tier1"
trust_group = "prod"
[retention]
keep_last = 24
"""

SENDER = """\
name = "hv-1"
state = "state/"
[tls]
ca = "pki/ca.crt"
cert = "pki/hv-1.crt"
key = "pki/hv-1.key"
[[machine]]
name = "web-1"
to = "https://localhost:8443"
every = "30s"
[[machine.disk]]
name = "os"
image = "web-1.vhd"
"""


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def sender_error(tmp_path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_sender(write(tmp_path, "sender.toml", text))
    return caught.value


def receiver_error(tmp_path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_receiver(write(tmp_path, "receiver.toml", text))
    return caught.value


def test_the_documented_receiver(tmp_path: Path) -> None:
    spec = load_receiver(write(tmp_path, "receiver.toml", RECEIVER))
    assert (spec.listen_host, spec.listen_port, spec.retention.keep_last) == ("127.0.0.1", 8443, 24)
    assert spec.tls.ca == tmp_path / "pki/ca.crt"
    assert spec.tls.key == tmp_path / "pki/dr-1.key"
    storage = spec.storages["tier1"]
    assert (storage.name, storage.path, storage.head) == ("tier1", tmp_path / "replicas", "raw")
    assert [(a.primary, a.storage, a.trust_group) for a in spec.allow] == [("hv-*", "tier1", "prod")]


def test_the_documented_sender(tmp_path: Path) -> None:
    spec = load_sender(write(tmp_path, "sender.toml", SENDER))
    assert (spec.name, spec.state, spec.keys) == ("hv-1", tmp_path / "state", tmp_path / "keys")
    assert spec.tls.cert == tmp_path / "pki/hv-1.crt"
    (machine,) = spec.machines
    assert (machine.name, machine.to, machine.every_seconds) == ("web-1", "https://localhost:8443", 30)
    assert machine.freeze is None
    assert machine.consistency is Consistency.CRASH
    (disk,) = machine.disks
    assert (disk.name, disk.image, disk.format) == ("os", tmp_path / "web-1.vhd", None)


def test_every_optional_key_of_a_sender(tmp_path: Path) -> None:
    text = (
        SENDER.replace('state = "state/"', 'state = "/var/lib/replica"\nkeys = "secret/"\nparallel = 2\npart = "64MiB"')
        .replace(
            'every = "30s"',
            'every = "1h30min"\nfreeze = ["fsfreeze", "-f", "/srv"]\nthaw = "fsfreeze -u /srv"\n'
            'freeze_limit = "10s"\nconsistency = "application-consistent"\n'
            'files = ["/etc/web-1.xml", "sub/../nvram"]\naudit_period = "1d"',
        )
        .replace(
            'image = "web-1.vhd"',
            'image = "/images/web-1.bin"\nformat = "raw"\nformerly = "c"\nparents = ["bases", "/b"]',
        )
    )
    spec = load_sender(write(tmp_path, "sender.toml", text))
    assert (spec.state, spec.keys, spec.parallel) == (Path("/var/lib/replica"), tmp_path / "secret", 2)
    assert spec.part_bytes == 64 << 20
    (machine,) = spec.machines
    assert machine.freeze == ["fsfreeze", "-f", "/srv"]
    assert machine.thaw == "fsfreeze -u /srv"
    assert (machine.every_seconds, machine.freeze_limit_seconds) == (5400, 10)
    assert machine.consistency is Consistency.APPLICATION
    assert machine.disks[0] == DiskSpec("os", Path("/images/web-1.bin"), "raw", "c", (tmp_path / "bases", Path("/b")))
    assert machine.files == (Path("/etc/web-1.xml"), tmp_path / "nvram")
    assert machine.audit_period_seconds == 86400


def test_defaults_of_a_receiver(tmp_path: Path) -> None:
    text = RECEIVER.replace("[retention]\nkeep_last = 24\n", "").replace('trust_group = "prod"\n', "")
    spec = load_receiver(write(tmp_path, "receiver.toml", text.replace('path = "replicas/"', 'path = "r"\nhead="vhd"')))
    assert spec.retention == Policy(keep_last=24, hourly=24)
    assert spec.storages["tier1"].head == "vhd"
    assert spec.allow[0].trust_group == "default"


def test_the_two_are_told_apart_by_content(tmp_path: Path) -> None:
    assert kind_of(write(tmp_path, "a.toml", SENDER)) == "sender"
    assert kind_of(write(tmp_path, "b.toml", RECEIVER)) == "receiver"
    with pytest.raises(ConfigError, match="neither"):
        kind_of(write(tmp_path, "c.toml", "[tls]\n"))


def test_the_wrong_one_is_named(tmp_path: Path) -> None:
    error = receiver_error(tmp_path, SENDER)
    assert "is a sender's configuration" in error.message
    assert "receiver" in error.hint


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('every = "30s"', 'evry = "30s"', 10, ["evry", "`every`"]),
        ('key = "pki/hv-1.key"', 'keyfile = "x"', 6, ["tls.keyfile", "`key`"]),
        ('image = "web-1.vhd"', 'image = "web-1.vhd"\nsize = 3', 14, ["machine.disk.size", "known keys"]),
        (
            'image = "web-1.vhd"',
            "image = 3",
            13,
            ["machine.disk.image", "a text in quotes is expected here, this is a whole number"],
        ),
        ('image = "web-1.vhd"', "", 11, ["`image` is missing", "machine.disk"]),
        (
            'image = "web-1.vhd"',
            'image = "a"\nformat = "qcow9"',
            14,
            ["machine.disk.format", "'qcow9' is not known; known are: raw, vhd"],
        ),
        ('name = "os"', 'name = "os/1"', 12, ["'os/1'", "letters"]),
        ('name = "os"', 'name = "machine-files"', 12, ["reserved"]),
        ('every = "30s"', 'files = ["a", "./a"]', 10, ["named twice"]),
        ('every = "30s"', 'files = ["/"]', 10, ["files", "1 to 1024"]),
        ('every = "30s"', 'audit_period = "0s"', 10, ["`audit_period`", "out of range"]),
        ('name = "web-1"', 'name = ".web"', 8, ["'.web'"]),
        ('every = "30s"', 'every = "30"', 10, ["`every`", "'30'", "5min"]),
        ('every = "30s"', 'every = "0s"', 10, ["out of range"]),
        ('every = "30s"', 'every = "30s"\nfreeze = "x"', 7, ["only one of `freeze` and `thaw`"]),
        (
            'every = "30s"',
            'every = "30s"\nconsistency = "good"',
            11,
            ["consistency", "'good'", '"crash-consistent", "application-consistent"'],
        ),
        ("https://localhost:8443", "http://localhost:8443", 9, ["https://host:port"]),
        ("https://localhost:8443", "localhost:8443", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://[::1", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://a..b:1", 9, ["https://host:port"]),
        ("https://localhost:8443", f"https://{'a' * 70}.example", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://localhost:99999", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://localhost:x", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://localhost:", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://local host", 9, ["https://host:port"]),
        ("https://localhost:8443", "https://localhost#x", 9, ["https://host:port"]),
        ('image = "web-1.vhd"', 'image = "web\\u0000"', 13, ["machine.disk.image", "NUL"]),
        ('state = "state/"', 'state = "a\\u0000b"', 2, ["state", "NUL"]),
        ('ca = "pki/ca.crt"', 'ca = "\\u0000"', 4, ["tls.ca", "NUL"]),
        ('every = "30s"', 'every = "30s"\nfreeze = []\nthaw = "x"', 11, ["machine.freeze"]),
        ('every = "30s"', 'every = "30s"\nfreeze = ["a\\u0000"]\nthaw = "x"', 11, ["machine.freeze", "NUL"]),
        ('name = "os"', f'name = "{"d" * 129}"', 12, ["128 bytes"]),
        ('state = "state/"', 'state = "s"\nparallel = 17', 3, ["parallel"]),
        ('state = "state/"', 'state = "s"\npart = "4GB"', 3, ["`part`", "64MiB"]),
        ('state = "state/"', 'state = "s"\npart = "1MiB"', 3, ["out of range", "4MiB to 64GiB"]),
        ('state = "state/"', 'state = "s"\nparallel = "4"', 3, ["a whole number is expected here, this is a text"]),
        ('every = "30s"', 'every = "30s"\nfiles = "a"', 11, ["a list in [ ] is expected here, this is a text"]),
        ('name = "hv-1"\n', "", None, ["`name` is missing"]),
        ('state = "state/"', "state = [", 3, ["broken TOML"]),
        ("[[machine.disk]]", "[machine.disk]", 11, ["machine.disk", "[[machine.disk]]"]),
        ('[[machine.disk]]\nname = "os"\nimage = "web-1.vhd"\n', "disk = []", 7, ["'web-1' has no disk"]),
    ],
)
def test_a_mistake_in_a_sender_is_named(tmp_path: Path, old: str, new: str, line: int | None, words: list[str]) -> None:
    assert old in SENDER
    error = sender_error(tmp_path, SENDER.replace(old, new, 1))
    place = f"sender.toml:{line}: " if line else "sender.toml: "
    assert place in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("127.0.0.1:8443", "8443", 1, ["host:port"]),
        ("127.0.0.1:8443", "127.0.0.1:99999", 1, ["host:port"]),
        ("127.0.0.1:8443", "[::", 1, ["host:port"]),
        ("127.0.0.1:8443", "[::1:8443", 1, ["host:port"]),
        ("127.0.0.1:8443", "[[::1]]:8443", 1, ["host:port"]),
        ("127.0.0.1:8443", "[localhost]:8443", 1, ["host:port"]),
        ("127.0.0.1:8443", "a..b:8443", 1, ["host:port"]),
        ("127.0.0.1:8443", f"{'a' * 70}:8443", 1, ["host:port"]),
        ("127.0.0.1:8443", "\\u0000:8443", 1, ["listen", "NUL"]),
        ('path = "replicas/"', 'path = "\\u0000"', 8, ["storage.path", "NUL"]),
        ("keep_last = 24", "keep_last = 0", 14, ["retention.keep_last", ">= 1"]),
        ("keep_last = 24", 'keep_last = "24"', 14, ["retention.keep_last", "a whole number"]),
        ("keep_last", "keep_lst", 14, ["`keep_last`"]),
        ("keep_last = 24", "hourly = -1", 14, ["retention.hourly", ">= 0"]),
        ("keep_last = 24", 'min_age = "7"', 14, ["`min_age`", "no duration"]),
        ("keep_last = 24", 'min_age = "200000d"', 14, ["`min_age`", "100 years"]),
        ("keep_last = 24", "min_count = 0", 14, ["retention.min_count", ">= 1"]),
        ("keep_last = 24", "[[retention.machine]]\nhourly = 1", 14, ["`machine` is missing"]),
        ("keep_last = 24", '[[retention.machine]]\nmachine = "a"\nhourli = 1', 16, ["`hourly`"]),
        ('path = "replicas/"', 'path = "replicas/"\nmin_free = "5"', 9, ["`min_free`", "10GiB or 5%"]),
        ('path = "replicas/"', 'path = "replicas/"\nwarn_free = "95%"', 9, ["`warn_free`", "90%"]),
        ('storage = "tier1"', 'storage = "tier2"', 11, ["'tier2' is not declared", "tier1"]),
        ('path = "replicas/"', 'path = "replicas/"\nhead = "vhdx"', 9, ["storage.head", "vhdx"]),
        ("[retention]", '[[storage]]\nname = "tier1"\npath = "x"\n[retention]', 13, ["two of [[storage]]", "'tier1'"]),
    ],
)
def test_a_mistake_in_a_receiver_is_named(tmp_path: Path, old: str, new: str, line: int, words: list[str]) -> None:
    assert old in RECEIVER
    error = receiver_error(tmp_path, RECEIVER.replace(old, new, 1))
    assert f"receiver.toml:{line}: " in str(error)
    for word in words:
        assert word in str(error)


def test_retention_and_space(tmp_path: Path) -> None:
    """A machine's table says what differs; the first pattern that matches counts."""
    text = RECEIVER.replace('path = "replicas/"', 'path = "replicas/"\nwarn_free = "100 GiB"\nmin_free = "2.5%"') + (
        'daily = 7\nmin_age = "1h30min"\nmax_points_per_hour = 60\n'
        '[[retention.machine]]\nmachine = "db-*"\nhourly = 48\nmin_count = 5\nshed_buckets = true\n'
        '[[retention.machine]]\nmachine = "hv-1/*"\nmin_age = "0s"\n'
    )
    spec = load_receiver(write(tmp_path, "receiver.toml", text))
    base = Policy(keep_last=24, daily=7, min_age_seconds=5400)
    assert spec.retention == spec.policy("hv-2", "web-1") == base
    assert spec.policy("hv-1", "db-1") == Policy(
        keep_last=24, hourly=48, daily=7, min_count=5, min_age_seconds=5400, shed_buckets=True
    )
    assert spec.policy("hv-1", "web-1") == Policy(keep_last=24, daily=7)
    assert spec.max_points_per_hour == 60
    assert spec.limits(tmp_path / "replicas" / "x") == SpaceLimits(Limit(100 << 30), Limit(share=0.025))


def test_replicas_per_identity(tmp_path: Path) -> None:
    assert load_receiver(write(tmp_path, "receiver.toml", RECEIVER)).allow[0].max_replicas == 1024
    text = RECEIVER.replace('storage = "tier1"', 'storage = "tier1"\nmax_replicas = 3')
    assert load_receiver(write(tmp_path, "receiver.toml", text)).allow[0].max_replicas == 3
    assert "max_replicas" in str(receiver_error(tmp_path, text.replace("= 3", "= 0")))


def test_names_are_unique(tmp_path: Path) -> None:
    machine = SENDER[SENDER.index("[[machine]]") :]
    assert "two of [[machine]] are named 'web-1'" in str(sender_error(tmp_path, SENDER + machine))
    disk = SENDER[SENDER.index("[[machine.disk]]") :]
    error = sender_error(tmp_path, SENDER + disk)
    assert "two of [[machine.disk]] are named 'os'" in str(error)
    assert "sender.toml:14: " in str(error)


@pytest.mark.parametrize("again", ["{0}", "./{0}", "link.img"])
def test_two_disks_have_images_of_their_own(tmp_path: Path, again: str) -> None:
    disk = SENDER[SENDER.index("[[machine.disk]]") :]
    image = re.search('image = "(.*)"', disk)[1]  # type: ignore[index]
    (tmp_path / "link.img").symlink_to(tmp_path / image)
    second = disk.replace('"os"', '"data"').replace(image, again.format(image))
    error = sender_error(tmp_path, SENDER + second)
    assert "disks 'os' and 'data' have the same image" in str(error) and "sender.toml:16: " in str(error)


def test_two_machines_may_have_disks_of_one_name(tmp_path: Path) -> None:
    second = SENDER[SENDER.index("[[machine]]") :].replace("web-1", "web-2")
    spec = load_sender(write(tmp_path, "sender.toml", SENDER + second))
    assert [(m.name, m.disks[0].name) for m in spec.machines] == [("web-1", "os"), ("web-2", "os")]


def test_lines_of_the_second_machine(tmp_path: Path) -> None:
    second = SENDER[SENDER.index("[[machine]]") :].replace("web-1", "web-2").replace("image", "imge")
    assert "sender.toml:20: unknown key `machine.disk.imge`" in str(sender_error(tmp_path, SENDER + second))


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.toml"):
        load_sender(tmp_path / "nowhere.toml")
    (tmp_path / "b.toml").write_bytes(b'name = "x"\nstate = "\xff"\n')
    with pytest.raises(ConfigError, match=r"b\.toml:2: not UTF-8"):
        load_sender(tmp_path / "b.toml")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5min", 300), ("1h", 3600), ("1h30min", 5400), ("0.5h", 1800), ("2 d", 172800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "30x", "-5s", "5m", "1h and more", "30s!"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:8443", ("127.0.0.1", 8443)), ("[::1]:443", ("::1", 443)), (":8443", ("", 8443)), ("dr:0", ("dr", 0))],
)
def test_addresses_to_listen_on(text: str, expected: tuple[str, int]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize("text", ["8443", "::1:8443", "dr:", "dr:x", "dr:65536"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        parse_listen(text)


def test_a_file_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    error = sender_error(tmp_path, "a = " + "[" * 5000)
    assert "sender.toml" in str(error)


@pytest.mark.parametrize(
    "host", ["localhost", "dr-1.example.org", "dr_1.example.", "192.0.2.7", "[2001:db8::1]", "m\u00fcller.example"]
)
def test_addresses_that_are_good(host: str) -> None:
    assert parse_url(f"https://{host}:8443/") == f"https://{host}:8443"
    assert parse_listen(f"{host}:8443") == (host.strip("[]"), 8443)


def test_sizes() -> None:
    for text, size in (("4MiB", 4 << 20), ("1.5 GiB", 3 << 29), (" 4GiB ", 4 << 30), ("2TiB", 2 << 40), ("8KiB", 8192)):
        assert parse_size(text) == size
    for text in ("", "4", "4GB", "-1GiB", "GiB", "4 GiB 1MiB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 30 + "TiB"])
def test_a_size_beyond_any_disk_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="larger than any disk"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0MiB/s", "0.0000001KiB/s", "9" * 400 + "GiB/s"])
def test_a_rate_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="out of range"):
        parse_rate(text)


def test_a_number_of_thousands_of_digits_is_a_mistake_in_the_file(tmp_path: Path) -> None:
    assert "sender.toml is no configuration" in str(sender_error(tmp_path, f"parallel = {'9' * 5000}\n{SENDER}"))


def test_a_machine_has_as_many_disks_as_a_point_can_hold(tmp_path: Path) -> None:
    disks = "".join(f'[[machine.disk]]\nname = "d{n}"\nimage = "d{n}.raw"\n' for n in range(256))
    head = SENDER[: SENDER.index("[[machine.disk]]")]
    assert len(load_sender(write(tmp_path, "sender.toml", head + disks)).machines[0].disks) == 256
    more = disks + '[[machine.disk]]\nname = "one"\nimage = "one.raw"\n'
    assert "has 257 disks" in str(sender_error(tmp_path, head + more))
    assert "`files` included" in str(sender_error(tmp_path, head + 'files = ["/etc/a.xml"]\n' + disks))
