"""Several requests at once, cancelling and interrupts, on a tiny real checkpoint streamed from disk."""

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from golden_models import GREEDY
from text_models import GREEDILY, fresh, load


def test_interleaved_streams_and_threads_share_steps(llm):
    expected = {p: llm.generate(p, GREEDILY).text for p in ("abc", "Once upon a time", "zzz")}
    streams = {p: llm.stream(p, GREEDILY) for p in expected}
    texts = dict.fromkeys(expected, "")
    for deltas in itertools.zip_longest(*streams.values()):
        for prompt, delta in zip(streams, deltas, strict=True):
            texts[prompt] += delta.text if delta else ""
    assert texts == expected
    results = {}
    threads = [
        threading.Thread(target=lambda p=p: results.update({p: llm.generate(p, GREEDILY).text})) for p in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == expected


def test_closing_a_stream_cancels_it(llm):
    stream = llm.stream("abc", GREEDILY)
    next(stream)
    assert not llm.runtime.engine.idle
    stream.close()
    assert llm.runtime.engine.idle
    llm.stream("abc", GREEDILY)  # never started: nothing runs
    assert llm.runtime.engine.idle


def test_interrupt_leaves_the_model_usable(llm):
    expected = llm.generate("abc", GREEDILY).text
    calls = itertools.count()

    def interrupt(layer, residual):
        if next(calls) == 9:  # in the middle of a step
            raise KeyboardInterrupt

    llm.runtime.model.observe = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("abc", GREEDILY))
    finally:
        llm.runtime.model.observe = None
    assert llm.runtime.engine.idle
    assert llm.generate("abc", GREEDILY).text == expected


@pytest.mark.parametrize("cache", ["arena", "none"])
def test_interrupts_at_any_moment_leave_the_model_usable(folder, cache):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    moments = np.random.default_rng(0).uniform(0.0005, 0.01, 12)
    try:
        with load(folder, cache=cache, ram="2GB") as llm:
            expected = llm.generate("Once upon", GREEDILY).token_ids
            for moment in moments:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, moment)
                    list(llm.stream("Once upon", GREEDILY, max_tokens=100))
                    time.sleep(moment)
                assert llm.runtime.engine.idle
                assert llm.generate("Once upon", GREEDILY).token_ids == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_cancel_ends_replies_with_what_they_have(llm):
    calls = itertools.count()

    def cancel(layer, residual):  # as a signal handler would, while a step runs
        if next(calls) == 9:
            llm.cancel()

    llm.runtime.model.observe = cancel
    try:
        text, deltas = fresh(llm.stream("abc", GREEDILY))
    finally:
        llm.runtime.model.observe = None
    assert deltas[-1].finish_reason == "cancelled"
    assert 0 < deltas[-1].receipt.new_tokens < GREEDY
    assert llm.generate("abc", GREEDILY).text.startswith(text)


def test_a_cancel_before_the_first_token_is_kept(llm):
    stream = llm.stream("abc", GREEDILY)
    llm.cancel()
    text, deltas = fresh(stream)
    assert (text, len(deltas)) == ("", 1)
    assert deltas[0].finish_reason == "cancelled"
    assert deltas[0].receipt.new_tokens == 0
    assert llm.generate("abc", GREEDILY).finish_reason == "length"  # asked for afterwards


def test_threads_that_stream_take_turns(llm):
    tokens, ready, lead = 200, threading.Barrier(2), {}
    counts = [0, 0]

    def read(me):
        stream = llm.stream("abc", GREEDILY, max_tokens=tokens)
        next(stream)
        ready.wait(60)
        for _ in stream:
            counts[me] += 1
        lead.setdefault("other", counts[1 - me])  # of the first to end

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [tokens - 1] * 2
    assert lead["other"] > tokens // 10


DAEMON = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
from text_models import load
llm = load(sys.argv[1])
begun = threading.Event()
llm.on_progress = lambda done, total: begun.set()
def work():
    while True:
        llm.generate("Hello", max_tokens=200, ignore_eos=True)
threading.excepthook = lambda args: print(args.exc_value)
threading.Thread(target=work, daemon=True).start()
begun.wait()
time.sleep(0.05)
"""


def test_a_daemon_thread_that_generates_does_not_crash_the_exit(folder):
    command = [sys.executable, "-c", DAEMON, str(folder), str(Path(__file__).parents[1])]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
