"""Server-sent events, and what to do when the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class Disconnected(Exception):
    """The client has gone."""


def event(value: Any, name: str | None = None) -> str:
    """One event; its data is JSON."""
    return f"{f'event: {name}' + chr(10) if name else ''}data: {json.dumps(value)}\n\n"


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for an answer that is sent as a whole.

    Raises:
        Disconnected: the client left first; ``work`` has been cancelled.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Sends what a generator yields; stops when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], ping: str, ping_seconds: float, close: Callable[[], None]) -> None:
        """Make an answer.

        Args:
            events: The events; its errors are its own to report.
            ping: Sent when nothing happens for ``ping_seconds``.
            ping_seconds: See there.
            close: Called at the end, also when ``events`` has never begun.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._ping = ping.encode()
        self._seconds = ping_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        upcoming = asyncio.ensure_future(anext(self._events, None))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                done, _ = await asyncio.wait(
                    {upcoming, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if gone in done:
                    raise Disconnected
                data = upcoming.result() if done else None
                if done and data is None:
                    break
                body = self._ping if data is None else data.encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if done:
                    upcoming = asyncio.ensure_future(anext(self._events, None))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._close()
            await _end(upcoming, gone)
            await self._events.aclose()


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
