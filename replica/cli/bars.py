"""Progress bars with rate and time left: on a terminal, on standard error, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replica.cli.output import on_terminal
from replica.progress import Progress, silent

Bar = Callable[[str], Progress]
"""Opens a bar with a title and returns the callback that moves it; thread-safe."""


@contextmanager
def bars(as_json: bool) -> Iterator[Bar]:
    """A place for bars while the block runs; without a terminal, or with JSON, they are silent."""
    if as_json or not on_terminal():
        yield lambda _title: silent
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(binary_units=True),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as display:

        def bar(title: str) -> Progress:
            task = display.add_task(title, total=None)

            def move(done: int, total: int) -> None:
                display.update(task, completed=done, total=total)

            return move

        yield bar
