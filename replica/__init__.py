"""Disaster-recovery replication of virtual machine disks. See docs/ARCHITECTURE.md."""

__version__ = "0.1.0"
