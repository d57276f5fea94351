"""The lock of the engine: re-entrant, and nobody is kept out."""

import threading

from moestream.text.turns import Turns


def test_whoever_asks_goes_before_the_next_step():
    turns, served, steps = Turns(), threading.Event(), 0

    def run_steps():
        nonlocal steps
        while not served.is_set():
            with turns.step(unless=lambda: False):
                steps += 1

    thread = threading.Thread(target=run_steps)
    thread.start()
    for _ in range(100):
        with turns:
            before = steps
            sum(range(10_000))
            assert steps == before
    served.set()
    thread.join(60)
    assert not thread.is_alive()


def test_waiting_ends_when_another_has_done_the_work():
    turns, work, asked, results = Turns(), [], threading.Event(), []

    def wait():
        def done():
            asked.set()
            return bool(work)

        with turns.step(unless=done) as due:
            results.append(due)

    thread = threading.Thread(target=wait)
    with turns:
        thread.start()
        assert asked.wait(60)
        with turns:  # again, by the same thread
            work.append(1)
    thread.join(60)
    assert results == [False]


def test_an_interrupted_owner_can_let_go():
    turns = Turns()
    turns.__enter__()
    turns.__enter__()
    turns.forget()
    turns.forget()
    got = threading.Event()

    def use():
        with turns:
            got.set()

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(60)
    assert got.is_set()
