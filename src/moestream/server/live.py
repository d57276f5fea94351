"""``/v1/moestream/live``: the machine at work, for the web page and whoever wants to look."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from moestream import stored_plan
from moestream.experts import activity
from moestream.llm import LLM
from moestream.server.errors import json_response
from moestream.server.openai_chat import PING
from moestream.server.service import Service
from moestream.server.sse import EventStream, event

PATH = "/v1/moestream/live"
SECONDS = 0.25
"""Between two events of a stream."""
PEAK_SECONDS = 1.0
"""The highest rate of reading is that of so long a time: single reads end in bursts."""


class Live:
    """Looks at engine and store from outside, at most once every ``SECONDS`` however many watch."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._taken = float("-inf")
        self._last: dict[str, Any] = {}
        self._ceiling = _Ceiling()

    def look(self) -> dict[str, Any]:
        """What is going on now."""
        now = time.monotonic()
        if now - self._taken >= 0.9 * SECONDS:
            self._taken, self._last = now, self._look(now)
        return self._last

    def _look(self, now: float) -> dict[str, Any]:
        worker = self._service.worker
        state = "stopping" if self._service.draining else worker.state
        if state != "ready" or worker.llm is None or worker.activity is None:
            return {"state": state}
        runtime = worker.llm.runtime
        stats, (running, waiting) = runtime.store.stats(), worker.load
        return {
            "state": state,
            "time": now,
            "experts": runtime.store.experts,
            "cells": base64.b64encode(activity.cells(runtime.store).tobytes()).decode(),
            "slots": runtime.slots,
            "slot_bytes": runtime.setup.slot_bytes,
            "cache": runtime.setup.cache,
            "running": running,
            "waiting": waiting,
            "max_batch": runtime.plan.max_batch,
            "prompt": worker.activity.prompt(),
            "steps": asdict(worker.activity.totals()),
            "store": asdict(stats),
            "disk_ceiling": self._ceiling.update(worker.llm, now, stats.bytes_read),
        }

    async def events(self) -> AsyncGenerator[str]:
        """Events until the server stops; an unchanged ``cells`` is left out."""
        shown = None
        while True:
            now = self.look()
            cells = now.get("cells")
            yield event(now if cells != shown else {name: now[name] for name in now if name != "cells"})
            shown = cells
            if now["state"] not in ("loading", "ready"):
                return
            await asyncio.sleep(SECONDS)


class _Ceiling:
    """What the disk can do: what ``plan --measure`` probed, or the most that was seen, whichever is more."""

    def __init__(self) -> None:
        self._probed: tuple[float, str] | None = None
        self._reads: deque[tuple[float, int]] = deque()  # (time, bytes read so far)
        self._seen = 0.0

    def update(self, llm: LLM, now: float, nbytes: int) -> dict[str, Any]:
        """Bytes a second, and where that comes from; ``nbytes`` were read until ``now``."""
        if self._probed is None:
            self._probed = probed_rate(llm.runtime.folder)
        self._reads.append((now, nbytes))
        while len(self._reads) > 2 and now - self._reads[1][0] >= PEAK_SECONDS:
            self._reads.popleft()
        then, before = self._reads[0]
        if now - then >= PEAK_SECONDS:
            self._seen = max(self._seen, (nbytes - before) / (now - then))
        rate, day = self._probed
        return {"rate": rate, "measured": day} if rate >= self._seen else {"rate": self._seen, "measured": None}


def probed_rate(folder: Path) -> tuple[float, str]:
    """(bytes a second, day) of the best probe of the stored plan of a model; (0, "") without a plan."""
    plan = stored_plan.find(folder)
    if plan is None:
        return 0.0, ""
    try:
        turns = [turn for candidate in plan.measured["candidates"] for turn in candidate["turns"]]
        return max(float(turn["disk"]) for turn in turns), plan.day
    except (KeyError, TypeError, ValueError):  # the file is the user's
        return 0.0, ""


def add_live(app: FastAPI, service: Service) -> None:
    """Add the route."""
    live = Live(service)

    @app.get(
        PATH,
        tags=["status"],
        responses={200: {"content": {"text/event-stream": {}}}, 401: {"description": "The key is missing or wrong"}},
    )
    async def moestream_live(request: Request) -> Response:
        """Resident experts, those being read, and counters, once; an endless stream with Accept: text/event-stream.

        `cells` is base64 of one byte for each expert, layer after layer, `experts` of each: bit 7: being read, bit 6:
        in memory, the others: how much it was used lately; a stream leaves it out where nothing has changed. `store`
        and `steps` count since the start, so two answers give rates. `disk_ceiling` is bytes a second: the best probe
        of `moestream plan --measure`, of the day `measured`, or, where that is null, the most that was seen here.
        """
        if request.headers.get("accept", "") == "text/event-stream":
            return EventStream(live.events(), PING, service.settings.ping_seconds, lambda: None)
        return json_response(live.look())
