"""What `make demo` runs: the whole life of a replica on a real disk, told as it happens.

A dynamic VHD with a partition and an ext4 in it is replicated between two
processes on this machine, changed, replicated again, and restored; qemu-img and
e2fsck are the judges. Needs no root. Everything lives in a temporary directory
that is removed at the end, whatever happens; any difference ends it with exit
code 1.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest import Guest, ToolError, check_file_system, command, missing_tools, same

DISK_BYTES = 384 << 20
MIB = 1 << 20


class Story:
    """The two sites' files, and the voice that tells what happens."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.server: subprocess.Popen[bytes] | None = None
        self.random = random.Random(2026)
        self.kept: dict[int, Path] = {}
        self._chapter = 0

    def chapter(self, title: str) -> None:
        self._chapter += 1
        print(f"\n{self._chapter}. {title}")

    def say(self, text: str) -> None:
        print(f"   {text}", flush=True)

    def replica(self, *args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run one command as a user would; its exit code must be `code`."""
        line = " ".join(map(str, args)).replace(f"{self.root}/", "")
        self.say(f"$ replica {line}")
        done = subprocess.run(
            [sys.executable, "-m", "replica", *map(str, args)],
            capture_output=True, text=True, check=False, cwd=self.root, timeout=300,
        )  # fmt: skip
        if done.returncode != code:
            raise ToolError(f"`replica {line}` ended with {done.returncode}, not {code}: {done.stdout}{done.stderr}")
        return done

    def tell(self, *args: object) -> None:
        """Run one command and show what it prints."""
        for line in self.replica(*args).stdout.splitlines():
            self.say(f"    {line}")

    def sync(self, guest: Guest) -> dict[str, Any]:
        """One cycle; the image as it was at the freeze is kept for the judges."""
        copy = guest.keep(self.root / f"kept-{len(self.kept)}.vhd")
        (entry,) = json.loads(self.replica("sync", "web-1", "--json", "-c", "sender.toml").stdout)
        self.kept[entry["point"]] = copy
        changed, wire, seconds = entry["bytes_changed"], entry["bytes_wire"], entry["seconds"]
        self.say(
            f"    point {entry['point']}: {size(entry['bytes_scanned'])} read, {size(changed)} changed, "
            f"{size(wire)} on the wire, {seconds:.2f} s"
        )
        return dict(entry)

    def points(self) -> list[int]:
        done = self.replica("points", "web-1", "--json", "-c", "receiver.toml")
        return [p["point"] for p in json.loads(done.stdout)]

    def serve(self) -> None:
        self.say("$ replica serve -c receiver.toml &")
        with (self.root / "serve.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "replica", "serve", "-c", "receiver.toml"], cwd=self.root, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise ToolError(f"the receiver did not start: {(self.root / 'serve.log').read_text()}")

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server = None


def size(count_bytes: int) -> str:
    return f"{count_bytes / MIB:.1f} MiB" if count_bytes >= MIB else f"{count_bytes / 1024:.1f} KiB"


def set_up(story: Story) -> Guest:
    """Certificates, configurations and the disk."""
    story.chapter("A machine with one disk: a dynamic VHD, partitioned, ext4, with files")
    files = story.root / "files"
    (files / "etc").mkdir(parents=True)
    (files / "etc/hostname").write_text("web-1\n")
    (files / "database").write_bytes(story.random.randbytes(24 * MIB))
    (files / "log").write_text("".join(f"{n} a request was answered\n" for n in range(400_000)))
    guest = Guest(story.root, "dynamic", DISK_BYTES, files, name="web-1")
    story.say(f"web-1.vhd: {size(guest.size_bytes)} for the guest, {size(guest.image.stat().st_size)} on the host")

    story.chapter("Certificates: a private authority, one for each site")
    story.replica("pki", "init", "pki/")
    story.replica("pki", "issue", "pki/", "dr-1", "--host", "localhost", "--host", "127.0.0.1")
    story.replica("pki", "issue", "pki/", "hv-1")
    (story.root / "receiver.toml").write_text(
        f'listen = "127.0.0.1:{story.port}"\n'
        '[tls]\nca = "pki/ca.crt"\ncert = "pki/dr-1.crt"\nkey = "pki/dr-1.key"\n'
        '[[storage]]\nname = "tier1"\npath = "replicas/"\n'
        '[[allow]]\nprimary = "hv-*"\nstorage = "tier1"\ntrust_group = "prod"\n'
        "[retention]\nkeep_last = 24\n"
    )
    (story.root / "sender.toml").write_text(
        'name = "hv-1"\nstate = "state/"\n'
        '[tls]\nca = "pki/ca.crt"\ncert = "pki/hv-1.crt"\nkey = "pki/hv-1.key"\n'
        f'[[machine]]\nname = "web-1"\nto = "https://localhost:{story.port}"\nevery = "1s"\n'
        '[[machine.disk]]\nname = "os"\nimage = "web-1.vhd"\n'
    )
    return guest


def first_cycles(story: Story, guest: Guest) -> None:
    """The first copy, then what changes cost."""
    story.chapter("The first copy")
    story.serve()
    story.sync(guest)

    story.chapter("Changes: only they travel, and every cycle makes a point")
    story.say("nothing changed:")
    story.sync(guest)
    story.say("one 4 KiB block of the database, written through qemu-io:")
    guest.write(guest.blocks_of("/database")[1000], 4096, 0x5A)
    story.sync(guest)
    story.say("a new file of 6 MiB that does not compress, and another host name:")
    new = story.root / "new"
    new.write_bytes(story.random.randbytes(6 * MIB))
    (story.root / "hostname").write_text("web-one\n")
    guest.edit(f"write {new} /upload", "rm /etc/hostname", f"write {story.root / 'hostname'} /etc/hostname")
    story.sync(guest)
    story.say("the log is deleted:")
    guest.edit("rm /log")
    story.sync(guest)
    story.tell("points", "web-1", "-c", "receiver.toml")


@contextmanager
def schedule(story: Story) -> Iterator[None]:
    """`replica run` in the background while the block runs; it must end in order."""
    story.say("$ replica run -c sender.toml &")
    with (story.root / "run.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "replica", "run", "-c", "sender.toml"], cwd=story.root, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code:
        raise ToolError(f"`replica run` ended with {code}: {(story.root / 'run.log').read_text()}")


def on_schedule(story: Story, guest: Guest) -> None:
    """Cycles by themselves; what the disk is at the end must be in the newest point."""
    story.chapter("On a schedule: every second, while the machine works")
    before = len(story.points())
    with schedule(story):
        for number in range(3):
            guest.write(guest.blocks_of("/database")[number * 50], 8192, 0x60 + number)
            time.sleep(1)
        time.sleep(1.5)
    listed = story.points()
    story.say(f"    {len(listed) - before} points more, none of them asked for by hand")
    if len(listed) <= before:
        raise ToolError("the schedule made no point")
    story.tell("status", "-c", "sender.toml")


def power_cut(story: Story, guest: Guest) -> None:
    """The receiver dies in the middle of a transfer or commit."""
    story.chapter("A power cut at the replica site, in the middle of a cycle")
    big = story.root / "big"
    big.write_bytes(story.random.randbytes(64 * MIB))
    guest.edit(f"write {big} /big")
    copy = guest.keep(story.root / "kept-cut.vhd")
    story.say("64 MiB are new; the receiver gets SIGKILL while they travel:")
    incoming = [path / "incoming" for path in (story.root / "replicas").iterdir() if (path / "incoming").is_dir()]
    story.say("$ replica sync web-1 --json -c sender.toml &")
    cut = subprocess.Popen(
        [sys.executable, "-m", "replica", "sync", "web-1", "--json", "-c", "sender.toml"],
        cwd=story.root, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while cut.poll() is None and time.monotonic() < deadline:
        if sum(f.stat().st_blocks * 512 for path in incoming for f in path.rglob("*") if f.is_file()) > 16 * MIB:
            break
        time.sleep(0.005)
    if cut.poll() is not None:
        raise ToolError("the sync was over before the receiver could be killed")
    story.kill()
    story.say("    the receiver is dead; one second later it is started again:")
    time.sleep(1)
    story.serve()
    out, error = cut.communicate(timeout=120)
    if cut.returncode:
        raise ToolError(f"the sync did not survive it: {error}")
    (entry,) = json.loads(out)
    story.kept[entry["point"]] = copy
    story.say(
        f"    the same sync went on: point {entry['point']}, {size(entry['bytes_changed'])} changed, "
        f"{size(entry['bytes_wire'])} on the wire, {entry['seconds']:.2f} s"
    )
    story.say("and nothing is left of it:")
    story.sync(guest)


def disaster(story: Story) -> None:
    """The primary is gone: restore, and let the judges look."""
    story.chapter("The disaster: the primary site is gone; restore the newest point and an old one")
    story.kill()
    newest = max(story.points())
    oldest_kept = min(story.kept)
    for point, target in ((newest, "out-newest"), (oldest_kept, "out-first")):
        started = time.monotonic()
        done = story.replica(
            "restore", "web-1", "--point", point, "--to", target, "--json", "-c", "receiver.toml"
        )  # fmt: skip
        file = story.root / json.loads(done.stdout)["files"]["os"]
        seconds = time.monotonic() - started
        same(story.kept[point], "vpc", file, "raw")
        check_file_system(file)
        story.say(f"    {seconds:.2f} s; qemu-img compare: identical to the disk at its freeze; e2fsck: clean")
    others = [p for p in story.kept if p not in (newest, oldest_kept)]
    for point in others:
        done = story.replica(
            "restore", "web-1", "--point", point, "--to", f"out-{point}", "--format", "vhd", "--json",
            "-c", "receiver.toml",
        )  # fmt: skip
        file = story.root / json.loads(done.stdout)["files"]["os"]
        same(story.kept[point], "vpc", file, "vpc")
        check_file_system(file)
        file.unlink()
    story.say(f"    points {', '.join(map(str, others))} as VHDs: identical and clean, too")
    story.tell("verify", "web-1", "-c", "receiver.toml")
    story.tell("status", "-c", "receiver.toml")
    listing = command("debugfs", "-R", "cat /etc/hostname", f"{story.root / 'out-newest/os.raw'}?offset={MIB}")
    story.say(f"the restored machine calls itself {listing.strip()!r}")


def main() -> int:
    if missing := missing_tools():
        print(f"the demo needs tools that are not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="replica-demo-"))
    story = Story(root)
    try:
        guest = set_up(story)
        first_cycles(story, guest)
        on_schedule(story, guest)
        power_cut(story, guest)
        disaster(story)
    except ToolError as error:
        print(f"\nthe demo FAILED: {error}", file=sys.stderr)
        log = root / "serve.log"
        if log.exists():
            print(f"--- the receiver's log ---\n{log.read_text()}", file=sys.stderr)
        return 1
    finally:
        story.kill()
        shutil.rmtree(root, ignore_errors=True)
    print(f"\nThat was the whole life of a replica, in {time.monotonic() - started:.0f} s. All as it should be.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
