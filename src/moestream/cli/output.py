"""The terminal: answers go to stdout, everything else to stderr, and Ctrl-C is a request."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from moestream.config import format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

INTERRUPTED = 130
"""Exit status of a command ended by Ctrl-C, as shells expect."""


def note(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """``warnings.showwarning`` without file names and source lines."""
    note(f"moestream: warning: {message}")


class Bar:
    """What goes on, on stderr: on terminals only, once it has taken over a second, and gone afterwards."""

    def __init__(self, amount: Callable[[int, int], str] = lambda done, total: "") -> None:
        """Nothing is shown before ``update``.

        Args:
            amount: Words for (done, total).
        """
        self._amount = amount
        self._timer: threading.Timer | None = None
        self._shown: tuple[Progress, TaskID] | None = None
        self._now: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def update(self, what: str, done: int = 0, total: int = 0) -> None:
        """Say what goes on and how far it is; a total of 0 is unknown."""
        amount = self._amount(done, total) if total else ""
        self._now = {"description": what, "completed": done, "total": total or None, "amount": amount}
        if self._shown is not None:
            bar, task = self._shown
            bar.update(task, **self._now)
        elif self._timer is None and sys.stderr.isatty():
            self._timer = threading.Timer(1.0, self._show)
            self._timer.daemon = True
            self._timer.start()

    def hide(self) -> None:
        """Take the bar off the terminal, as before every other output; the next ``update`` counts as a new wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self._shown is not None:
            self._shown[0].stop()
        self._timer = self._shown = None

    def _show(self) -> None:
        """Runs in the timer's thread, because nobody may call ``update`` for long."""
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        what, amount = (TextColumn("{task." + field + "}", markup=False) for field in ("description", "fields[amount]"))
        bar = Progress(
            *(what, BarColumn(), amount, TimeRemainingColumn()),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,  # it would go to stderr
        )
        self._shown = bar, bar.add_task(**self._now)
        bar.start()


def byte_amount(done: int, total: int) -> str:
    """``Bar`` of something counted in bytes."""
    return f"{format_size(done)} of {format_size(total)}"


def percent(done: int, total: int) -> str:
    """``Bar`` of something whose unit says nothing to people."""
    return f"{100 * done // total} %"


class Interrupt:
    """While entered, the first Ctrl-C calls ``stop`` and sets ``asked``; the second raises KeyboardInterrupt."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.asked = False
        self._stop = stop

    def __enter__(self) -> Interrupt:
        """Take over SIGINT."""
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._stop()
