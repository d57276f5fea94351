"""Prompts that begin alike: what is reused, that it changes nothing, budgets, damaged files."""

from itertools import pairwise

import numpy as np
import pytest
from golden_models import Golden, ResidentExperts

from moestream.engine.engine import Engine
from moestream.engine.prefix import PrefixCache
from moestream.engine.prefix_files import PrefixFiles
from moestream.engine.sampling import SamplingParams
from moestream.models.registry import parse_config
from moestream.models.snapshots import PAGE
from moestream.models.weights import map_weights

pytestmark = pytest.mark.parametrize("tiny", ["qwen3-f16-single", "qwen3_5-f32-single"], indirect=True)
PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
END = 7  # ends a message
PLENTY = 1 << 30


class Setup:
    """Engines of one model, each with a cache of its own."""

    def __init__(self, tiny, ops, folder):
        config, names = parse_config(tiny.checkpoint.config)
        self.model = tiny.model(ops, ResidentExperts(tiny.checkpoint, map_weights(tiny.checkpoint, config, names)))
        self.recurrent = any(plan.mixer == "delta_net" for plan in config.layers)
        self.vocab = config.vocab_size
        self.folder = folder

    def engine(self, budget=PLENTY, files=None, chunk=512):
        self.cache = PrefixCache(budget, self.recurrent, {END}, files) if budget else None
        return Engine(self.model, vocab_size=self.vocab, context=1024, prefill_chunk=chunk, prefixes=self.cache)

    def files(self, budget=PLENTY):
        return PrefixFiles(self.folder, budget, self.model.new_states())

    def ids(self, length, seed, ends=()):
        ids = np.random.default_rng(seed).integers(END + 1, self.vocab, length)
        ids[list(ends)] = END
        return ids.tolist()


@pytest.fixture
def setup(tiny: Golden, exact_ops, tmp_path):
    return Setup(tiny, exact_ops, tmp_path)


def ask(engine, *prompts):
    sequences = [engine.add(p, PARAMS) for p in prompts]
    while not engine.idle:
        engine.step()
    assert all(s.finish_reason == "length" for s in sequences)
    return sequences


@pytest.mark.parametrize("chunk", [512, 61])
def test_next_turn_reads_only_what_is_new(setup, chunk):
    engine = setup.engine(chunk=chunk)
    first = setup.ids(200, 0, ends=[90, 194])
    (one,) = ask(engine, first)
    assert one.cached == 0
    verbatim = [*first, *one.tokens, *setup.ids(30, 1)]  # the client repeats the reply as it was
    rewritten = [*first[:195], *setup.ids(40, 2)]  # the template drops a part of it
    other = [*first[:91], *setup.ids(60, 3)]  # another conversation under the same system prompt
    for prompt, shared in ((verbatim, 204), (rewritten, 195), (other, 91)):
        (again,) = ask(engine, prompt)
        assert again.cached == shared
        assert again.tokens == ask(setup.engine(0), prompt)[0].tokens


def test_states_are_those_of_reading_everything(setup):
    """Up to float order: a chunk that begins elsewhere adds in another order."""
    first = setup.ids(150, 0, ends=[140])
    second = [*first[:141], *setup.ids(50, 1)]
    engine = setup.engine()
    ask(engine, first)
    sequence = engine.add(second, PARAMS)
    engine.step()
    alone = setup.engine(0)
    whole = alone.add(second, PARAMS)
    alone.step()
    assert (sequence.cached, whole.cached) == (141, 0)
    for a, b in zip(sequence.states.layers, whole.states.layers, strict=True):
        for name in ("k", "v", "conv", "s"):
            if hasattr(a, name):
                rows = (slice(None), slice(len(second)) if name in "kv" else slice(None))
                np.testing.assert_allclose(getattr(a, name)[rows], getattr(b, name)[rows], rtol=2e-4, atol=2e-4)


def test_where_prompts_part_is_noticed(setup):
    """Without messages a shared beginning shows when the second prompt comes, and serves the third."""
    head = setup.ids(130, 0)
    engine = setup.engine()
    cached = [ask(engine, head + setup.ids(50, seed))[0].cached for seed in (1, 2, 3)]
    assert cached == ([0, 0, 130] if setup.recurrent else [0, 130, 130])


def test_same_prompt_again_computes_one_token(setup):
    prompt = setup.ids(120, 0)
    engine = setup.engine()
    tokens = [ask(engine, prompt)[0].tokens for _ in range(2)]
    assert tokens[0] == tokens[1]
    assert ask(engine, prompt)[0].cached == 119


def test_a_prompt_serves_others_while_it_is_still_answered(setup):
    prompt = setup.ids(120, 0, ends=[110])
    engine = setup.engine()
    first = engine.add(prompt, PARAMS)
    engine.step()
    (second,) = ask(engine, prompt)
    assert second.cached == (111 if setup.recurrent else 119)
    assert second.tokens == first.tokens


def test_prompts_sent_together_read_what_they_share_once(setup):
    """As agents do that start several others at once; a prompt that shares little does not wait."""
    system = setup.ids(300, 0, ends=[299])
    prompts = [system + setup.ids(40 + seed, seed + 1) for seed in range(4)]
    other = system[:100] + setup.ids(300, 9)
    engine = setup.engine()
    sequences = ask(engine, *prompts, other)
    assert [s.cached for s in sequences] == [0, 300, 300, 300, 0]
    for sequence, prompt in zip(sequences, [*prompts, other], strict=True):
        assert sequence.tokens == ask(setup.engine(0), prompt)[0].tokens


def test_nobody_waits_for_what_is_kept_already(setup):
    system = setup.ids(300, 0, ends=[299])
    engine = setup.engine()
    ask(engine, system + setup.ids(20, 1))
    sequences = [engine.add(system + setup.ids(20, seed), PARAMS) for seed in (2, 3)]
    engine.step()
    assert [(s.cached, len(s.tokens)) for s in sequences] == [(300, 1)] * 2
    engine.abort_all()


def test_budget_is_kept_and_the_oldest_goes(setup):
    engine = setup.engine()
    ask(engine, setup.ids(120, 0))
    budget = 3 * setup.cache.nbytes
    engine = setup.engine(budget)
    prompts = [setup.ids(120, seed) for seed in range(6)]
    for prompt in prompts:
        ask(engine, prompt)
        assert 0 < setup.cache.nbytes <= budget
    assert ask(engine, prompts[5])[0].cached > 0
    assert ask(engine, prompts[0])[0].cached == 0
    tiny_budget = setup.engine(100)
    assert [ask(tiny_budget, prompts[0])[0].cached for _ in range(2)] == [0, 0]
    assert setup.cache.nbytes == 0


def test_pages_are_shared(setup):
    """A conversation of many turns costs its length once, not once per turn."""
    engine = setup.engine()
    prompt, sizes = setup.ids(3 * PAGE, 0), []
    for seed in range(1, 9):
        ask(engine, prompt)
        sizes.append(setup.cache.nbytes)
        prompt = [*prompt, *setup.ids(PAGE, seed)]
    fixed = sum(s.conv.nbytes + s.s.nbytes for s in setup.model.new_states().delta_states())
    page = setup.model.new_states()
    page.reserve(PAGE)
    page_nbytes = page.nbytes - fixed
    for before, after in pairwise(sizes):
        assert after - before <= 3 * fixed + 4 * page_nbytes  # one or two more full pages, and unfinished ones


def test_outlives_the_process(setup):
    prompt = setup.ids(150, 0, ends=[140])
    engine = setup.engine(files=setup.files())
    (one,) = ask(engine, prompt)
    setup.cache.close()
    engine = setup.engine(files=setup.files())
    (again,) = ask(engine, prompt)
    assert again.cached == (141 if setup.recurrent else 149)
    assert again.tokens == one.tokens


def test_what_memory_drops_the_folder_keeps(setup):
    prompts = [setup.ids(150, seed) for seed in range(3)]
    engine = setup.engine(files=setup.files())
    ask(engine, prompts[0])
    engine = setup.engine(setup.cache.nbytes, setup.files())
    for prompt in prompts:
        ask(engine, prompt)
    assert all(ask(engine, prompt)[0].cached == 149 for prompt in prompts)


def test_folder_has_a_budget(setup):
    engine = setup.engine(files=setup.files())
    ask(engine, setup.ids(150, 0))
    setup.cache.close()
    size = sum(path.stat().st_size for path in setup.folder.iterdir())
    for seed in range(1, 5):
        engine = setup.engine(files=setup.files(2 * size))
        ask(engine, setup.ids(150, seed))
        setup.cache.close()
        assert sum(path.stat().st_size for path in setup.folder.iterdir()) <= 2 * size


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign", "rename"])
def test_damaged_files_are_named_and_read_again(setup, damage):
    prompt = setup.ids(150, 0)
    engine = setup.engine(files=setup.files())
    (one,) = ask(engine, prompt)
    setup.cache.close()
    files = len(list(setup.folder.iterdir()))
    for path in list(setup.folder.iterdir()):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 1
        elif damage == "cut":
            del content[-100:]
        elif damage == "foreign":
            content = bytearray(b"not a snapshot")
        path.write_bytes(content)
        if damage == "rename":
            path.rename(path.with_stem("0" * 32))
    with pytest.warns(UserWarning, match="not a usable prefix"):
        (again,) = ask(setup.engine(files=setup.files()), prompt)
    assert (again.cached, again.tokens) == (0, one.tokens)
    assert len(list(setup.folder.iterdir())) < files


def test_states_of_another_shape_are_refused(setup):
    prompt = setup.ids(150, 0)
    engine = setup.engine(files=setup.files())
    ask(engine, prompt)
    setup.cache.close()
    for path in setup.folder.iterdir():
        with np.load(path) as arrays:
            changed = {name: array if name == "tokens" else array[..., :-1] for name, array in arrays.items()}
        np.savez(path, **changed)
    with pytest.warns(UserWarning, match="not a usable prefix"):
        assert ask(setup.engine(files=setup.files()), prompt)[0].cached == 0


def test_an_interrupted_step_leaves_nothing_behind(setup):
    engine = setup.engine()
    sequence = engine.add(setup.ids(150, 0), PARAMS)
    engine.step()
    kept = setup.cache.nbytes

    def interrupt(layer, x):
        raise KeyboardInterrupt

    setup.model.observe = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    setup.model.observe = None
    assert sequence.finish_reason == "cancelled"
    assert setup.cache.nbytes == kept
