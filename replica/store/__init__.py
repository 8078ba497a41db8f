"""One replica's directory: head, points, what arrives, and who may touch it.

`ReplicaStore` is the one writer (a receiver holds it), `ReplicaReader` reads
from any process at any time. `commit` is the protocol that both rely on.
"""

from replica.store.adopt import adopt_images
from replica.store.export import ExportedPoint, export_points
from replica.store.files import read_files
from replica.store.layout import HeadFormat, Identity, Layout, StoreState, replica_directories
from replica.store.points import PointInfo
from replica.store.reader import PointReader, ReplicaReader
from replica.store.replica import ReplicaStore
from replica.store.restore import machine_files, restore_point
from replica.store.retention import Policy
from replica.store.rotation import Rotated
from replica.store.verify import DiskVerdict, verify_head

__all__ = [
    "DiskVerdict",
    "ExportedPoint",
    "HeadFormat",
    "Identity",
    "Layout",
    "PointInfo",
    "PointReader",
    "Policy",
    "ReplicaReader",
    "ReplicaStore",
    "Rotated",
    "StoreState",
    "adopt_images",
    "export_points",
    "machine_files",
    "read_files",
    "replica_directories",
    "restore_point",
    "verify_head",
]
