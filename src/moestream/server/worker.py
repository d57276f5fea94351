"""The one thread that owns the model: it loads it and runs its steps for all requests.

Requests come in through an inbox; what they get goes back to the event loop, all of a step at once.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moestream.engine.engine import Ids
from moestream.engine.sampling import Constraint, SamplingParams
from moestream.engine.sequence import Caller
from moestream.errors import MoestreamError, RequestError
from moestream.llm import LLM
from moestream.server.activity import Activity
from moestream.text.replies import Delta, Replies, Reply

LOG = logging.getLogger("moestream.server")

GATHER = 1e-12
"""Seconds to wait for company, for each byte of experts that a sweep reads: a hundredth of its time at 10 GB/s."""
GATHER_MOST = 0.02
"""Some times what lies between requests that are sent together: up to 5 ms where they make new connections."""
GATHERINGS = 10
"""Company that comes in time makes for another wait, up to so many."""

Sink = Callable[[Delta | MoestreamError], None]
"""Takes each delta of a reply, on the event loop; an error is the end of it."""


@dataclass(slots=True, eq=False)
class Job:
    """One sequence asked for."""

    ids: Ids
    params: SamplingParams
    constraint: Constraint | None
    caller: Caller
    sink: Sink
    reply: Reply | None = None
    """Set by the worker; the loop may read its sequence after the last delta."""


class Worker:
    """Runs a model in a thread of its own. Methods are called on the event loop."""

    def __init__(self, load_model: Callable[[], LLM], on_state: Callable[[], None]) -> None:
        """Make a worker.

        Args:
            load_model: Called in the thread.
            on_state: Called on the event loop whenever ``state`` has changed.
        """
        self.state: Literal["loading", "ready", "failed", "closed"] = "loading"
        self.llm: LLM | None = None
        self.activity: Activity | None = None
        self.error: BaseException | None = None
        self._load_model = load_model
        self._on_state = on_state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._replies: Replies | None = None
        self._jobs: list[Job] = []  # of the thread
        self._thread = threading.Thread(target=self._run, name="moestream-engine", daemon=True)

    @property
    def load(self) -> tuple[int, int]:
        """Sequences (in the batch, waiting for a place)."""
        replies = [job.reply for job in list(self._jobs)]
        waiting = sum(reply is not None and reply.sequence.usage.started is None for reply in replies)
        return len(replies) - waiting, waiting

    def start(self) -> None:
        """Begin to load."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a sequence."""
        self._inbox.put(lambda: self._begin(job))

    def cancel(self, job: Job) -> None:
        """End a sequence before its next token; it gets no more deltas."""
        self._inbox.put(lambda: self._forget(job))

    def cancel_all(self) -> None:
        """End every sequence before its next token, with the finish reason ``"cancelled"``."""
        if self._replies is not None:
            self._replies.cancel()

    def stop(self) -> None:
        """End the thread after the step that runs; waits for it."""
        self._inbox.put(None)
        self.cancel_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._load_model() as llm:
                self.llm = llm
                self.activity = Activity(llm.runtime.engine)
                self._replies = Replies(llm.runtime.engine, llm.tokenizer, llm.runtime.receipt)
                self._become("ready")
                self._serve(llm, self._replies)
            self._become("closed")
        except BaseException as error:  # reported by whoever started the server
            self.error = error
            self._become("failed")

    def _become(self, state: Literal["ready", "failed", "closed"]) -> None:
        self.state = state
        self._tell(self._on_state)

    def _serve(self, llm: LLM, replies: Replies) -> None:
        gather = min(GATHER_MOST, GATHER * llm.runtime.plan.streamed)
        while self._listen(gather):
            if self.activity is not None:
                self.activity.begin_step()
            try:
                replies.step()
            except Exception as error:  # of no single request: whatever runs has lost its place
                LOG.exception("a step failed")
                self._fail_all(RequestError(f"the step failed: {type(error).__name__}: {error}"))
            if self.activity is not None:
                self.activity.end_step()
            self._deliver()
        replies.close()

    def _listen(self, gather: float) -> bool:
        """Do what is asked for before the next step; False when there is to be none.

        Whoever comes just after a sweep began waits for all of it, and then nearly all experts are read again for its
        own prompt. So where nothing runs yet, the sweep begins when nobody has come for ``gather`` seconds. Beside
        replies under way nothing waits: what comes during their step is taken together.
        """
        until = None
        while True:
            patience = 0.0 if self._jobs else None
            if self._jobs and gather and not self.load[0]:
                now = time.monotonic()
                until = until or now + GATHERINGS * gather
                patience = max(0.0, min(gather, until - now))
            try:
                action = self._inbox.get(timeout=patience)
            except queue.Empty:
                return True
            if action is None:
                return False
            action()

    def _begin(self, job: Job) -> None:
        assert self._replies is not None
        try:
            job.reply = self._replies.submit(job.ids, job.params, job.constraint, job.caller)
        except MoestreamError as error:
            self._pour([(job, error)])
            return
        self._jobs.append(job)

    def _forget(self, job: Job) -> None:
        if job in self._jobs:
            assert self._replies is not None
            assert job.reply is not None
            self._jobs.remove(job)
            self._replies.release(job.reply)

    def _deliver(self) -> None:
        """Hand on what a step has added to the replies."""
        out: list[tuple[Job, Delta | MoestreamError]] = []
        for job in list(self._jobs):
            assert job.reply is not None
            while job.reply.pending:
                delta = job.reply.pending.popleft()
                error = job.reply.sequence.error
                out.append((job, delta if error is None or delta.finish_reason is None else error))
                if delta.finish_reason is not None:
                    self._forget(job)
        if out:
            self._pour(out)

    def _fail_all(self, error: MoestreamError) -> None:
        jobs = list(self._jobs)
        for job in jobs:
            self._forget(job)
        self._pour([(job, error) for job in jobs])

    def _pour(self, out: list[tuple[Job, Delta | MoestreamError]]) -> None:
        """Hand on to the event loop."""

        def pour() -> None:
            for job, delta in out:
                job.sink(delta)

        self._tell(pour)

    def _tell(self, what: Callable[[], None]) -> None:
        """Call something on the event loop, unless it has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            LOG.debug("the event loop is closed")
