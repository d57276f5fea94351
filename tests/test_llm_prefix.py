"""The prefix cache from the outside: turns of a conversation, files between runs, budgets."""

from itertools import pairwise

import pytest
from text_models import load as load_model

from moestream.errors import BudgetError, ConfigError

HEAD = 20
"""Tokens the template writes after the last message, at most."""

LONG = "one two three four five six seven eight nine ten " * 4


def load(folder, **settings):
    return load_model(folder, **({"context": 1024} | settings))


def turns(llm, count=3):
    """The receipts of a conversation's turns."""
    messages, receipts = [], []
    for _ in range(count):
        messages.append({"role": "user", "content": LONG})
        done = llm.chat(messages, max_tokens=4, temperature=0)
        messages.append({"role": "assistant", "content": done.text})
        receipts.append(done.receipt)
    return receipts


def test_follow_up_turns_prefill_only_what_is_new(folder):
    with load(folder, prefix_cache="50MB") as llm:
        receipts = turns(llm)
    assert receipts[0].cached_tokens == 0
    for before, after in pairwise(receipts):
        assert before.prompt_tokens - HEAD <= after.cached_tokens < after.prompt_tokens
        assert any(f"({after.cached_tokens} cached)" in line for line in after.lines())


def test_off_unless_asked_for(folder):
    with load(folder) as llm:
        assert [r.cached_tokens for r in turns(llm, 2)] == [0, 0]


def test_files_serve_the_next_process(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESTREAM_PREFIXES", str(tmp_path))
    with load(folder, prefix_cache="50MB", prefix_disk="50MB") as llm:
        first = turns(llm, 1)[0]
    with load(folder, prefix_cache="50MB", prefix_disk="50MB") as llm:
        again = turns(llm, 1)[0]
    assert first.cached_tokens == 0
    assert again.cached_tokens >= first.prompt_tokens - HEAD
    with load(folder, prefix_cache="50MB", prefix_disk="50MB", exact=False) as llm:
        assert turns(llm, 1)[0].cached_tokens == 0  # other settings, other states


def test_memory_of_prefixes_is_part_of_the_budget(folder):
    with load(folder, ram="2GB", prefix_cache=None) as llm:
        assert llm.runtime.plan.prefixes == 2_000_000_000 // 16
        assert llm.runtime.plan.total <= 2_000_000_000
    with pytest.raises(BudgetError, match="lower --prefix-cache"):
        load(folder, ram="2GB", prefix_cache="3GB")


@pytest.mark.parametrize(("settings", "says"), [({"prefix_cache": -1}, "prefix_cache"), ({"prefix_disk": 9}, "memory")])
def test_wrong_sizes_are_named(folder, settings, says):
    with pytest.raises(ConfigError, match=says):
        load(folder, **settings)
