"""Status: from the state directory alone, in every state a machine can be in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from primary_lab import Lab, MiB

from replica.errors import ImageError, ReplicaError
from replica.primary.retry import Stopped
from replica.primary.status import CycleStatus, Word, machine_status, note_due, noted, read_status, write_status


def test_new_then_ok(lab: Lab) -> None:
    status = machine_status(lab.fs, lab.spec, lab.machine)
    assert (status.state, status.point, status.frozen_at_ns, status.rpo_seconds) == (Word.NEW, 0, None, None)
    assert (status.machine, status.to, status.replica_id) == ("web-1", "https://dr-1", None)
    lab.scribble("os", 0, MiB)
    result = lab.sync()
    status = machine_status(lab.fs, lab.spec, lab.machine, now_ns=result.frozen_at_ns + 90_000_000_000)
    assert (status.state, status.point, status.rpo_seconds) == (Word.OK, 1, 90.0)
    assert status.replica_id == result.replica_id and status.last_error is None


def test_a_failed_cycle_shows_its_error_until_one_succeeds(lab: Lab) -> None:
    lab.sync()
    lab.images["os"].rename(lab.root / "away")
    with pytest.raises(ImageError):
        lab.sync()
    status = machine_status(lab.fs, lab.spec, lab.machine)
    assert status.state is Word.FAILING and status.point == 1
    assert status.last_error is not None and "os.raw" in status.last_error.message
    (lab.root / "away").rename(lab.images["os"])
    lab.sync()
    status = machine_status(lab.fs, lab.spec, lab.machine)
    assert status.state is Word.OK and status.last_error is None


def test_while_syncing_and_after_its_death(lab: Lab) -> None:
    seen = []
    link = lab.link()
    link.before = lambda _name, _arguments: seen.append(machine_status(lab.fs, lab.spec, lab.machine).state)
    lab.sync(link)
    assert set(seen) == {Word.SYNCING}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_status(lab.fs, lab.spec.machine_directory("web-1"), CycleStatus(5, pid=gone.pid))
    assert machine_status(lab.fs, lab.spec, lab.machine).state is Word.INTERRUPTED


def test_damage_is_shown_and_not_raised(lab: Lab) -> None:
    lab.sync()
    path = lab.spec.machine_directory("web-1")
    (path / "status.json").write_bytes(b"rot")
    assert machine_status(lab.fs, lab.spec, lab.machine).state is Word.OK
    (path / "machine.json").write_bytes(b"rot")
    status = machine_status(lab.fs, lab.spec, lab.machine)
    assert status.state is Word.DAMAGED
    assert status.last_error is not None and status.last_error.code == "format"


def test_notes(lab: Lab) -> None:
    path = lab.root
    with noted(lab.fs, path):
        found = read_status(lab.fs, path)
        assert found is not None and found.pid == os.getpid()
    note_due(lab.fs, path, 77)
    found = read_status(lab.fs, path)
    assert found is not None and (found.pid, found.next_due_ns, found.last_error) == (None, 77, None)
    with pytest.raises(Stopped), noted(lab.fs, path):
        raise Stopped
    found = read_status(lab.fs, path)
    assert found is not None and found.last_error is None
    with pytest.raises(ReplicaError), noted(lab.fs, path):
        raise ReplicaError("no")
    found = read_status(lab.fs, path)
    assert found is not None and found.last_error is not None and found.last_error.message == "no"


def test_a_status_that_cannot_be_written_fails_nothing(lab: Lab) -> None:
    with noted(lab.fs, lab.root / "no" / "such"):
        pass


def test_a_reused_pid_is_no_cycle_and_an_error_stays_until_the_next_one_ended(lab: Lab) -> None:
    path = lab.spec.machine_directory("web-1")
    lab.sync()
    write_status(lab.fs, path, CycleStatus(5, pid=os.getpid()))
    assert machine_status(lab.fs, lab.spec, lab.machine).state is Word.INTERRUPTED
    with pytest.raises(ReplicaError), noted(lab.fs, path):
        raise ReplicaError("broken")
    with noted(lab.fs, path):
        error = machine_status(lab.fs, lab.spec, lab.machine).last_error
        assert error is not None and error.message == "broken"
    assert machine_status(lab.fs, lab.spec, lab.machine).last_error is None


@pytest.mark.parametrize("name", ["machine.json", "lock", "frozen"])
def test_what_cannot_be_read_is_shown_and_not_raised(lab: Lab, name: str) -> None:
    lab.sync()
    path = lab.spec.machine_directory("web-1") / name
    path.unlink(missing_ok=True)
    path.symlink_to(name)  # a loop: no call on it succeeds, whoever calls
    status = machine_status(lab.fs, lab.spec, lab.machine)
    assert status.state is Word.DAMAGED
    assert status.last_error is not None and status.last_error.code == "storage" and name in status.last_error.message


@pytest.mark.parametrize("kind", ["directory", "loop"])
def test_a_status_that_cannot_be_read_hinders_nothing(lab: Lab, kind: str) -> None:
    """Not even where the point was committed already."""
    path = lab.spec.machine_directory("web-1") / "status.json"
    lab.sync()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    lab.scribble("os", 0, MiB)
    assert lab.sync().point == 2
    note_due(lab.fs, path.parent, 77)
    assert machine_status(lab.fs, lab.spec, lab.machine).state is Word.OK
