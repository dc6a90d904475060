"""What commands print: tables, and progress with the time that is left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Advance(Protocol):
    """Reports that one more unit is done; `note` is shown beside the bar."""

    def __call__(self, note: str = "") -> None: ...


_LINE_EVERY_S = 10.0
"""Where there is no terminal for a bar, progress is told this often."""
_silent = False


def silence() -> None:
    """Say nothing from now on and write no results: another process of the same training does."""
    global _silent
    _silent = True


def is_silent() -> bool:
    """Return whether `silence` was called."""
    return _silent


def say(text: str = "") -> None:
    """Print one line for the person at the terminal: to standard error, so that `--json -` keeps standard output clean."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Keep what is below an error and goes through these loggers ("" is the root) off the terminal."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(headers), "| " + " | ".join(rule) + " |", *(line(row) for row in rows)])


def percent(fraction: float | None) -> str:
    """Return a score for reading: 0.5123 becomes 51.23, a missing one a dash."""
    return "–" if fraction is None else f"{100 * fraction:.2f}"


@contextmanager
def progress(description: str, total: int | None, *, done: int = 0) -> Iterator[Advance]:
    """Show a bar with the time left on a terminal, and a line every ten seconds where output goes to a file.

    Args:
        description: what is being done.
        total: how many units there are; None where nobody knows.
        done: how many of them were done before.
    """
    bar = _rich_bar() if sys.stderr.isatty() and not _silent else None
    if bar is None:
        yield _line_printer(description, total, done)
        return
    with bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda note="": bar.update(task, advance=1, note=note)


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:  # a device that only runs the student need not have it
        return None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True))


def _line_printer(description: str, total: int | None, done: int) -> Advance:
    before = done
    start = last = time.monotonic()

    def advance(note: str = "") -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last < _LINE_EVERY_S and done != total:
            return
        last = now
        left = "" if total is None else f", {(now - start) / (done - before) * (total - done):.0f} s left"
        say(f"{description}: {done}{'' if total is None else f'/{total}'}{left}  {note}")

    return advance
