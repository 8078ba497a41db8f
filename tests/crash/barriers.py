"""Every barrier there is: take it away, and the explorer must find what breaks (`test_barriers`, docs/CRASH.md).

A barrier is an fsync of a file or of a directory, named by the call site that asks for it, or the order of two steps.
`Barrier.sites` are taken away together: where several syncs of one directory follow each other, each of them covers
those before it, and only without all of them something is lost.

`COVERED` are the other call sites that sync, and why nothing depends on them: a name that is only litter until the
next start, or a directory that something later syncs before anything is promised. They are what `FileSystem` does with
every unlink and every new directory; it costs little, and is not reasoned about case by case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.crash.explorer import Entry, Transform, without_syncs

SAVE = " < documents.py:save < durable.py:replace_bytes < durable.py:"
FILE, NAME = f"{SAVE}sync", f"{SAVE}publish < durable.py:sync_directory"
REPLACE = " < durable.py:replace_bytes < durable.py:"
CONTENT, NAMED = f"{REPLACE}sync", f"{REPLACE}publish < durable.py:sync_directory"
SETTLE = " < durable.py:settle_names" + " < durable.py:sync_directory"
SETTLE_KEY = "delta/keys.py:add" + SETTLE
RECEIVED, REPLACED = "store/incoming.py:finish", "store/rotation.py:_replace"
STATE, IDENTITY = " < store/layout.py:save_state", " < store/layout.py:write_identity"
PUBLISH = " < durable.py:publish < durable.py:sync_directory"
UNLINK = " < durable.py:unlink < durable.py:sync_directory"
MAKE = " < durable.py:make_directory"
DIRECTORY = " < durable.py:sync_directory"

How = Literal["store", "machine", "killed store"]


@dataclass(frozen=True)
class Barrier:
    """`how` it is tried: on which history, and whether its processes were killed before the power went."""

    name: str
    how: How
    breaks: str
    sites: tuple[str, ...] = ()
    order: Transform | None = None

    @property
    def transform(self) -> Transform:
        return self.order or without_syncs(*self.sites)


# --- the order of two steps ---

When = Callable[[str, str, str], bool]
"""(host, site, kind of operation)."""


def later(moved: When, behind: When) -> Transform:
    """What is `moved` happens only behind the operation that is `behind`."""

    def transform(ops: list[Entry]) -> list[Entry]:
        result: list[Entry] = []
        waiting: list[Entry] = []
        for host, op in ops:
            if moved(host, op.site, op.kind):
                waiting.append((host, op))
                continue
            result.append((host, op))
            if waiting and behind(host, op.site, op.kind):
                result += waiting
                waiting = []
        return result + waiting

    return transform


def _at(site: str, kind: str | None = None, host: str | None = None) -> When:
    return lambda its_host, its_site, its_kind: (
        its_site.startswith(site) and kind in (None, its_kind) and host in (None, its_host)
    )


def _either(*which: When) -> When:
    return lambda host, site, kind: any(when(host, site, kind) for when in which)


BARRIERS = [
    # enrolment
    Barrier("the key's content", "store", "the key", ("delta/keys.py:add" + FILE,)),
    Barrier("the key's name", "store", "the key", ("delta/keys.py:add" + NAME, SETTLE_KEY)),
    Barrier("the replica's directory", "store", "every point",
            ("store/replica.py:create" + MAKE + DIRECTORY, "store/replica.py:create" + SETTLE, SETTLE_KEY)),
    Barrier("the first state's content", "store", "the replica", ("store/replica.py:create" + STATE + FILE,)),
    Barrier("the first state's name", "store", "the replica", ("store/replica.py:create" + STATE + NAME,)),
    Barrier("replica.toml's content", "store", "the replica",
            ("store/replica.py:create" + IDENTITY + CONTENT, "store/replica.py:create" + IDENTITY + FILE)),
    Barrier("the marks' content", "store", "locks", ("store/marks.py:ensure" + FILE,)),
    Barrier("the marks' name", "store", "locks", ("store/marks.py:ensure" + NAME,)),
    Barrier("the receipt key's content", "store", "receipts", ("store/receipt_key.py:_publish < durable.py:sync",)),
    Barrier("the receipt key's name", "store", "receipts", ("store/receipt_key.py:_publish" + PUBLISH,)),
    # receiving
    Barrier("a received delta's content", "store", "the delta is damaged", (RECEIVED + " < durable.py:sync",)),
    Barrier("a received delta's name", "store", "what was called received",
            (RECEIVED + PUBLISH, RECEIVED + UNLINK)),
    # commit
    Barrier("the inverse's content", "store", "older points", ("delta/writer.py:finish < durable.py:sync",)),
    Barrier("the state's content", "store", "the replica", ("store/commit.py:_set_state" + STATE + FILE,)),
    Barrier("the state's name", "store", "the newest point", ("store/commit.py:_set_state" + STATE + NAME,)),
    Barrier("the inverse's name", "store", "the point before", ("store/commit.py:commit" + PUBLISH,)),
    Barrier("the head's content", "store", "the newest point", ("images/flat.py:sync < durable.py:sync",)),
    Barrier("the tree's content", "store", "the newest point", ("store/head.py:sync < durable.py:sync",)),
    Barrier("names in head/", "store", "a new disk",
            ("store/head.py:sync" + DIRECTORY, "store/head.py:_create" + DIRECTORY,
             "store/head.py:_make_links < durable.py:set_links" + DIRECTORY, "store/head.py:set_disks" + UNLINK,
             "store/head.py:_create" + UNLINK, "store/commit.py:_check_writable" + UNLINK)),
    Barrier("the inverse's name before the head's content", "store", "the point before",
            order=later(_at("store/commit.py:commit < durable.py:publish"), _at("images/flat.py:sync", "sync"))),
    Barrier("the head's content before the state", "store", "the newest point",
            order=later(_either(_at("images/flat.py:sync", "sync"), _at("store/head.py:sync", "sync")),
                        _at("store/commit.py:commit" + UNLINK, "sync"))),
    Barrier("a receipt's content", "store", "the receipt", ("store/receipts.py:_issue" + CONTENT,)),
    Barrier("a receipt's name", "store", "the receipt", ("store/receipts.py:_issue" + NAMED,)),
    # locks, rotation, thinning
    Barrier("a lock's content", "store", "locks", ("store/marks.py:_save" + FILE,)),
    Barrier("a lock's name", "store", "the lock", ("store/marks.py:_save" + NAME,)),
    Barrier("a dropped inverse's removal", "store", "points of which the next inverse is gone",
            ("store/rotation.py:drop" + UNLINK,)),
    Barrier("a composed inverse's name", "store", "every older point", (REPLACED + PUBLISH,)),
    Barrier("a composed-away inverse's removal", "store", "points between", (REPLACED + UNLINK,)),
    Barrier("a spare inverse's removal", "store", "nothing: the ones behind it become strays",
            ("store/rotation.py:_remove_spare" + UNLINK,)),
    Barrier("the composed inverse before the removals", "store", "every older point",
            order=later(_at(REPLACED + " < durable.py:publish"), _at(REPLACED + UNLINK))),
    # recovery, after a kill that left what was written in the page cache only
    Barrier("the state that is read at the start", "killed store", "the newest point",
            ("store/replica.py:_load" + STATE + NAME,)),
    Barrier("names that recovery relies on", "killed store", "the point before",
            ("store/commit.py:recover" + DIRECTORY, "store/commit.py:_name_again" + PUBLISH)),
    # adoption, and the sender
    Barrier("an adoption's state", "machine", "the replica", ("store/commit.py:set_epoch" + STATE + FILE,)),
    Barrier("an adoption's name", "machine", "fencing", ("store/commit.py:set_epoch" + STATE + NAME,)),
    Barrier("the record's content", "machine", "the record", ("primary/record.py:save" + FILE,)),
    Barrier("the record's name", "machine", "the trackers", ("primary/record.py:save" + NAME,)),
    Barrier("the machine's directory", "machine", "the trackers", ("primary/record.py:locked" + MAKE + DIRECTORY,)),
    Barrier("the journal's content", "machine", "the trackers", ("tracking/journal.py:finish < durable.py:sync",)),
    Barrier("the journal's name", "machine", "the trackers", ("tracking/journal.py:finish" + PUBLISH,)),
    Barrier("digests that are nobody's", "machine", "the trackers", ("tracking/digests.py:sync < durable.py:sync",)),
    Barrier("digests and leaves", "machine", "the trackers", ("tracking/fold.py:finish < durable.py:sync",)),
    Barrier("names of digests and leaves", "machine", "the trackers", ("tracking/fold.py:finish" + DIRECTORY,)),
    Barrier("the journal before the commit is asked for", "machine", "the trackers",
            order=later(_at("tracking/journal.py:finish"), _at("store/commit.py:commit" + UNLINK, "sync"))),
    Barrier("the record before the journal goes", "machine", "the trackers",
            order=later(_at("primary/record.py:save"), _at("primary/record.py:_fold" + UNLINK, "sync"))),
]  # fmt: skip

_LITTER = "what comes back is removed at the next start or by the next rotation"
_LATER = "a later sync of the same directory comes before anything is promised"

COVERED: dict[str, str] = {
    "store/commit.py:commit" + UNLINK: "a delta that was applied is recognised by its id and removed",
    "store/commit.py:_finish_or_undo" + UNLINK: "a delta that was applied is recognised by its id and removed",
    "store/commit.py:recover" + UNLINK: _LITTER,
    "store/commit.py:_open_checked < durable.py:sync": "every file there was synced before it got its name; kept for a "
    "directory that was put back by other means",
    "store/commit.py:_check_writable" + UNLINK: _LITTER,
    "store/replica.py:_load" + STATE + FILE: "it has the content that is there already; see also `the state's content`",
    "store/replica.py:_load" + SETTLE: "without it a replica of before the marks may count its points as locked",
    "store/marks.py:begin_anew" + PUBLISH: "the damaged document is kept for people; damaged or gone is the same",
    "store/marks.py:begin_anew" + FILE: "a document that is not whole counts as damaged, as before",
    "store/marks.py:begin_anew" + NAME: "the document is damaged as before, and begun anew again",
    "store/replica.py:_clear_temporaries < durable.py:clear_temporaries" + UNLINK: _LITTER,
    "store/marks.py:ensure < durable.py:clear_temporaries" + UNLINK: _LITTER,
    "store/marks.py:ensure" + MAKE + DIRECTORY: _LATER,
    "store/marks.py:ensure" + PUBLISH: _LATER,
    "store/marks.py:ensure < durable.py:remove_tree" + DIRECTORY: _LITTER,
    "store/replica.py:create" + IDENTITY + NAMED: "opening the replica writes `state` beside it",
    "store/replica.py:create" + IDENTITY + NAME: "the copy of it is made anew where it is missing",
    "store/commit.py:_remove_temporary" + UNLINK: _LITTER,
    "store/commit.py:_name_again < durable.py:copy < durable.py:sync": "the original was synced, too",
    "store/head.py:open_interrupted" + UNLINK: _LATER,
    "store/receipt_key.py:_make" + CONTENT: "the public key is written again from the private one",
    "store/receipt_key.py:_make" + NAMED: "the public key is written again from the private one",
    "store/receipts.py:_issue" + MAKE + DIRECTORY: _LATER,
    "store/receipts.py:_issue_missing" + UNLINK: _LITTER,
    "store/receipts.py:_keep_links" + CONTENT: "links are made again from the receipts",
    "store/receipts.py:_keep_links" + NAMED: "links are made again from the receipts",
    "store/receipts.py:forget" + UNLINK: _LITTER,
    "primary/record.py:keep_receipt" + CONTENT: "the receiver has it",
    "primary/record.py:keep_receipt" + NAMED: "the receiver has it",
    "store/pins.py:removing" + UNLINK: _LITTER,
    "store/incoming.py:start" + UNLINK: _LITTER,
    "store/incoming.py:discard_all" + UNLINK: _LITTER,
    "delta/keys.py:add" + MAKE + DIRECTORY: _LATER,
    "delta/keys.py:add" + MAKE + MAKE + DIRECTORY: _LATER,
    "primary/record.py:locked" + MAKE + MAKE + DIRECTORY: _LATER,
    "primary/record.py:_fold" + UNLINK: "a journal that comes back is folded again, into the same",
    "primary/record.py:locked < durable.py:clear_temporaries" + UNLINK: _LITTER,
    "primary/record.py:pending" + UNLINK: _LITTER,
    "primary/record.py:discard_pending" + UNLINK: "it is compared with the replica again, and discarded again",
    "primary/record.py:forget" + UNLINK: "the enrolment is asked for again, and refused again",
    "primary/status.py:write_status" + FILE: "a note for people: a damaged one is none",
    "primary/status.py:write_status" + NAME: "a note for people",
    "tracking/hash.py:__init__" + MAKE + DIRECTORY: "the trackers of a disk whose directory is gone are made anew",
    "tracking/hash.py:__init__" + MAKE + MAKE + DIRECTORY: _LATER,
    "tracking/hash.py:__init__ < durable.py:clear_temporaries" + UNLINK: _LITTER,
    "tracking/hash.py:_load_secret < durable.py:replace_bytes < durable.py:sync": "then all digests differ",
    "tracking/hash.py:_load_secret < durable.py:replace_bytes" + PUBLISH: "the fold syncs the directory",
    "tracking/hash.py:_load_secret" + UNLINK: "digests name their state",
    "tracking/hash.py:__init__ < durable.py:settle_names" + DIRECTORY: "after a kill and a power cut: a disk is read",
    "tracking/journal.py:accept"
    + PUBLISH: "under its old name it is compared with the replica again, and folded again",
    "tracking/journal.py:__init__" + UNLINK: _LITTER,
    "tracking/journal.py:__exit__" + UNLINK: _LITTER,
}
