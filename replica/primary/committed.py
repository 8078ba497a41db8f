"""A delta was committed, says the receiver: hold it to that, and only then fold.

What the receiver answers names the head it has, and for a point carries the
receipt that it signed. Both must be what was shipped. If they are not, the
trackers stay where they were: they do not describe the replica's head, so the
plan finds another head than it knows, and the two sides are compared anew.
Without a receipt (the receiver cannot sign at present, or the delta made no
point) the head it names is what counts.
"""

from __future__ import annotations

from replica.errors import DamageError, RootMismatchError
from replica.model import State
from replica.primary.record import MachineDirectory, MachineRecord
from replica.receipt import check_shipped, parse
from replica.transport.wire import ReplicaInfo


def fold_committed(
    directory: MachineDirectory, record: MachineRecord, info: ReplicaInfo, result: State
) -> MachineRecord:
    """Fold the pending delta, which made `result`. RootMismatchError: the receiver has or has signed something else."""
    receipt = info.receipt if result.is_point else None
    try:
        if info.head != result:
            raise RootMismatchError(f"the receiver says that it committed another state than point {result.point}")
        if receipt is not None:
            check_shipped(parse(receipt, "the receiver's receipt"), result)
    except DamageError as error:
        directory.discard_pending()
        raise RootMismatchError(error.message, hint=error.hint) from error
    record = directory.fold_pending(record)
    if receipt is not None:
        directory.keep_receipt(receipt)
    return record
