"""Log lines on standard error, each with a UTC time: of the two long-running commands, and with `--debug` of all."""

from __future__ import annotations

import logging
import time


def log_to_stderr() -> None:
    """Send the package's log records to standard error, once; a service manager or a file takes them from there."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logger = logging.getLogger("replica")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
