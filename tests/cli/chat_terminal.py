"""A chat in a process of its own, at a terminal of 80 x 24 that remembers what scrolled away."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from fcntl import ioctl
from struct import pack
from termios import TIOCSWINSZ

import pyte


class ChatTerminal:
    """Types at ``moestream chat`` and waits for what its screen shows."""

    def __init__(self, *args: object, term: str = "xterm-256color", chats: object = None) -> None:
        self.screen = pyte.HistoryScreen(80, 24, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        self._fd, theirs = pty.openpty()
        ioctl(theirs, TIOCSWINSZ, pack("HHHH", 24, 80, 0, 0))
        env = os.environ | {"TERM": term, "MOESTREAM_CHATS": str(chats)}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            env.pop(name, None)
        command = [sys.executable, "-m", "moestream", "chat", *map(str, args)]
        own_terminal = dict(start_new_session=True, preexec_fn=lambda: ioctl(0, 0x540E, 0))  # TIOCSCTTY: for Ctrl-C
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, **own_terminal)
        os.close(theirs)

    def __enter__(self) -> ChatTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._fd)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def text(self) -> str:
        """All lines, those that scrolled away first."""
        scrolled = ["".join(line[x].data for x in range(80)).rstrip() for line in self.screen.history.top]
        return "\n".join([*scrolled, *(line.rstrip() for line in self.screen.display)])

    def wait(self, *wanted: str, after: str = "", count: int = 1) -> str:
        """The text once it shows all of that, so often, after the last ``after``."""
        deadline = time.monotonic() + 60
        while True:
            seen = self.text().rpartition(after)[2] if after else self.text()
            if all(seen.count(text) >= count for text in wanted):
                return seen
            if not self._read(deadline):
                raise AssertionError(f"{wanted} is not on the screen:\n{self.text()}")

    def end(self) -> int:
        """Wait for the end of the process; its exit status."""
        deadline = time.monotonic() + 60
        while self._read(deadline):
            pass
        return self.process.wait(timeout=10)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # the process has ended
            return False
        self._answer(data)
        self._stream.feed(data)
        return bool(data)

    def _answer(self, data: bytes) -> None:
        """Terminals say where their cursor is when asked."""
        for _ in range(data.count(b"\x1b[6n")):
            self.type(f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R")
