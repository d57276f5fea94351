"""What the engine's thread does between two steps."""

import asyncio
import queue
from types import SimpleNamespace

from moestream import LLM
from moestream.engine.sampling import SamplingParams
from moestream.engine.sequence import Caller
from moestream.server.worker import GATHER_MOST, GATHERINGS, Job, Worker

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


class Inbox:
    """Where each thing comes only to who waits for it; what is left comes during the first step."""

    def __init__(self):
        self.items, self.waits, self.stepped = [], [], False

    def put(self, item):
        self.items.append(item)

    def get(self, timeout):
        self.waits.append(timeout)
        if self.items and (timeout != 0 or self.stepped):
            return self.items.pop(0)
        if timeout is None:
            return None  # nothing is left to do: the worker ends
        raise queue.Empty


def steps_of(prompts, **settings):
    """Prompt lengths in each step of a server that is asked for these, one shortly after the other; and its waits."""
    steps, replies, inbox = [], [[] for _ in prompts], Inbox()

    def load():
        llm = LLM.load("demo", prefetch="off", **settings)

        def note(chunks):
            inbox.stepped = True
            steps.append([count for _, count in chunks])

        llm.runtime.engine.on_step = note
        return llm

    async def run():
        ended = asyncio.Event()
        worker = Worker(load, lambda: ended.set() if worker.state in ("closed", "failed") else None)
        worker._inbox = inbox
        for prompt, reply in zip(prompts, replies, strict=True):
            worker.submit(Job(prompt, GREEDY, None, Caller(), reply.append))
        worker.start()
        await asyncio.wait_for(ended.wait(), 120)
        worker.stop()
        assert worker.error is None

    asyncio.run(run())
    assert all([delta.finish_reason for delta in reply] == [None, None, "length"] for reply in replies)
    return steps, inbox.waits


def test_a_sweep_waits_for_what_is_sent_together():
    """Of a streamed model nearly all experts are read for the first prompt alone, and again for those just behind."""
    steps, waits = steps_of(PROMPTS, cache="none")
    assert steps == [[3, 2, 4], [1, 1, 1], [1, 1, 1]]
    first, *gathering = waits[:4]
    assert first is None
    assert all(0 < seconds <= GATHER_MOST for seconds in gathering)
    assert set(waits[4:]) == {0.0, None}  # replies under way wait for nobody


def test_a_sweep_waits_so_long_at_most(monkeypatch):
    """However many come, one just in time after the other."""
    clock = SimpleNamespace(monotonic=iter([0.0, 2 * GATHERINGS * GATHER_MOST]).__next__)
    monkeypatch.setattr("moestream.server.worker.time", clock)
    steps, waits = steps_of(PROMPTS, cache="none")
    assert steps[0] == [3, 2]  # the third one came too late
    assert waits[2] == 0.0
    assert sorted(count for step in steps[1:] for count in step) == [1, 1, 1, 1, 1, 1, 4]


def test_a_model_in_memory_waits_for_nobody():
    steps, waits = steps_of(PROMPTS, ram="1GB")
    assert steps[0] == [3]
    assert set(waits) == {0.0, None}
