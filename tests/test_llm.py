"""The library from text to text, on tiny real checkpoints streamed from disk."""

import errno
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
from golden_models import FOLDER, GREEDY, PROMPTS, assert_close, golden
from text_models import BACKEND, GREEDILY, NAME, fresh, load

from moestream import SamplingParams
from moestream.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    ConfigError,
    ReadError,
    RequestError,
    TemplateError,
)
from moestream.experts.reader import ReadFailure


@pytest.mark.parametrize("name", ["qwen3-f16-single", "qwen3_5-bf16-fused", NAME])
@pytest.mark.parametrize("cache", ["arena", "page", "none"])
def test_streamed_batch_equals_transformers(name, cache):
    tiny = golden(name)
    with load(FOLDER / name, cache=cache) as llm:
        done = llm.generate([tiny.ids(p)[:-GREEDY] for p in PROMPTS], GREEDILY)
        assert [list(c.token_ids) for c in done] == [tiny.ids(p)[-GREEDY:].tolist() for p in PROMPTS]
        assert sum(c.receipt.bytes_read for c in done) > 0
        assert done[0].text == ""  # no tokenizer in this folder
        assert_close(llm.logits(tiny.ids(1)), tiny.logits(1), tiny.logits_bound, "logits")


def test_same_logits_in_every_cache_mode(folder):
    ids = golden(NAME).ids(1)
    results = []
    for cache in ("arena", "page", "none"):
        with load(folder, cache=cache) as llm:
            results.append(llm.logits(ids))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("chunk", [512, 4])
def test_progress_of_a_prompt_covers_every_chunk_of_it(folder, chunk):
    with load(folder, prefill_chunk=chunk) as llm:
        seen = []
        llm.on_progress = lambda done, total: seen.append((done, total))
        prompt = golden(NAME).ids(1)[:10].tolist()
        llm.generate(prompt, max_tokens=3, ignore_eos=True)
        layers = len(llm.runtime.config.layers)
        steps = -(-len(prompt) // chunk)
        assert len(seen) == steps * layers  # none for decoding
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1] == (layers * len(prompt), layers * len(prompt))
        assert len({total for _, total in seen}) == 1
        llm.on_progress = None
        llm.generate(prompt, max_tokens=1, ignore_eos=True)
        assert len(seen) == steps * layers


def test_text_ids_list_and_stream_agree(llm):
    done = llm.generate("Once upon", GREEDILY)
    assert done.text == llm.decode(done.token_ids)
    assert len(done.token_ids) == GREEDY
    assert done.finish_reason == "length"
    for other in (
        llm.generate(llm.encode("Once upon"), GREEDILY),
        llm.generate(np.array(llm.encode("Once upon")), GREEDILY),
        *llm.generate(["Once upon", llm.encode("Once upon")], GREEDILY),
    ):
        assert (other.text, other.token_ids) == (done.text, done.token_ids)
    text, deltas = fresh(llm.stream("Once upon", GREEDILY))
    assert text == done.text
    assert tuple(i for d in deltas for i in d.token_ids) == done.token_ids
    assert all(d.receipt is None for d in deltas[:-1])
    assert deltas[-1].receipt.new_tokens == GREEDY
    assert deltas[-1].receipt.prompt_tokens == len("Once upon")


def test_stop_string_cuts_the_text(llm):
    text = llm.generate("Once upon", GREEDILY).text
    stop = text[5:8]
    assert len(stop) == 3
    cut = text[: text.index(stop)]
    done = llm.generate("Once upon", GREEDILY, stop=stop)
    assert (done.text, done.finish_reason) == (cut, "stop")
    assert len(done.token_ids) < GREEDY
    last = llm.generate("Once upon", GREEDILY, stop=stop, max_tokens=len(done.token_ids))
    assert (last.text, last.finish_reason, last.receipt.finish_reason) == (cut, "stop", "stop")
    assert fresh(llm.stream("Once upon", GREEDILY, stop=[stop]))[0] == cut


def test_end_token_ends_the_reply_and_is_not_text(llm):
    tokens = llm.generate("Once upon", GREEDILY).token_ids
    done = llm.generate("Once upon", GREEDILY, stop_token_ids=(tokens[4],))
    assert done.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert done.text == llm.decode(done.token_ids[:-1])
    assert llm.tokenizer.token_id("<|im_end|>") in llm.tokenizer.eos_ids


def test_seeded_samples_repeat_alone_and_in_a_batch(llm):
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=12)
    alone = llm.generate("abc", params).token_ids
    assert alone == llm.generate(["xyz, a longer neighbour", "abc"], params)[1].token_ids
    assert alone != llm.generate("abc", params, seed=12).token_ids


def test_fast_mode_repeats_a_request_alone_whatever_the_cache(folder):
    params, seen = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True), set()
    for settings in ({}, {"ram": "1GB"}, {"cache": "page"}, {"cache": "none"}):
        with load(folder, exact=False, **settings) as llm:
            seen |= {llm.generate("Once upon a time", params).token_ids for _ in range(2)}
    assert len(seen) == 1


def test_logprobs(llm):
    done = llm.generate("abc", GREEDILY, logprobs=3)
    assert [p.token for p in done.logprobs] == list(done.token_ids)
    logits = llm.logits([*llm.encode("abc"), *done.token_ids[:-1]])[2:]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose([p.logprob for p in done.logprobs], expected.max(axis=1), atol=1e-4)
    assert llm.generate("abc", GREEDILY).logprobs is None


def test_chat_renders_and_parses(llm):
    messages = [{"role": "user", "content": "hi"}]
    text = llm.render(messages)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    done = llm.chat(messages, GREEDILY)
    assert done.token_ids == llm.generate(llm.tokenizer.encode(text, special=False), GREEDILY).token_ids
    assert done.reply.content == done.text
    assert done.receipt.prompt_tokens == 3 + len("user\nhi\nassistant\n")
    thought = llm.chat(messages, GREEDILY, template={"think": True})
    assert thought.reply.reasoning == thought.text.strip()  # it never closes the thought
    assert thought.reply.content == ""
    streamed, deltas = fresh(llm.stream_chat(messages, GREEDILY, tools=[{"name": "f"}]))
    assert streamed == llm.chat(messages, GREEDILY, tools=[{"name": "f"}]).text
    assert deltas[-1].reply.content == streamed


class FailingReader:
    """A reader on which the n-th and all later tickets fail with EIO; everything else is the real one's."""

    def __init__(self, reader, healthy):
        self.reader, self.healthy = reader, healthy

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def wait(self, min_count, timeout):
        done, failed = self.reader.wait(min_count, timeout)
        good = [t for t in done if t < self.healthy]
        return good, failed + [ReadFailure(t, errno.EIO, 0, 4096) for t in done if t >= self.healthy]


def test_failing_disk_ends_only_the_requests_that_needed_it(folder):
    """The second request arrives when the disk has failed; what the first needs is in memory."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    text = "Quite another text, 123 <|im_end|>?"
    with load(folder) as llm:
        assert llm.runtime.plan.slots == llm.runtime.plan.experts
        expected = llm.generate("a", params).token_ids
        asked = llm.runtime.store.stats().misses
        llm.runtime.store.reader = FailingReader(llm.runtime.reader, asked)
        good, bad = llm.generate(["a", text], params)
        assert good.token_ids == expected
        assert good.error is None
        assert bad.finish_reason == "error"
        assert isinstance(bad.error, ReadError)
        assert "Input/output error" in str(bad.error)
        with pytest.raises(ReadError, match="Input/output error"):
            llm.generate(text, params)
        with pytest.raises(ReadError, match="Input/output error"):
            list(llm.stream(text, params))


def test_file_truncated_while_running_is_an_error_not_a_crash(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with load(tmp_path, cache="none") as llm:
        llm.generate("abc", GREEDILY)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(ReadError, match=r"model\.safetensors.*truncated"):
            llm.generate("abc", GREEDILY)


def test_receipt_is_json_and_names_lossy_settings(folder):
    with load(folder, active_experts=2) as llm:
        receipt = llm.generate("abc", GREEDILY).receipt
        values = json.loads(json.dumps(receipt.to_dict()))
        assert values["lossy"] == ["active-experts 2 of 3"]
        assert "active-experts 2 of 3" in receipt.lines()[0]
        assert values["peak_rss"] > 1 << 20
        assert values["hits"] + values["misses"] > 0
        assert values["budget"] == 2_000_000_000


def test_recommended_sampling(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    config = tmp_path / "generation_config.json"
    config.write_text('{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}')
    with load(tmp_path) as llm:
        assert llm.default_params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    config.write_text('{"top_k": -1}')
    with load(tmp_path) as llm:
        assert llm.default_params.top_k == 0
    config.write_text('{"do_sample": false}')
    with load(tmp_path) as llm:
        assert llm.default_params.temperature == 0
    config.write_text('{"top_p": "x"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p"):
        load(tmp_path)


def test_budget_too_small_is_refused_before_anything_is_read(folder):
    with pytest.raises(BudgetError, match="at least"):
        load(folder, ram="1MB", progress=lambda *_: pytest.fail("started reading"))


def test_progress_reaches_the_end(folder):
    seen = []
    load(folder, progress=lambda what, done, total: seen.append((done, total))).close()
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"ram": "8 bananas"}, "ram"), ({"ram": 0}, "ram"), ({"cache": "disk"}, "cache"), ({"threads": 0}, "threads"),
     ({"threads": "4"}, "threads must be a whole number"), ({"threads": 1025}, "threads must be at most 1024"),
     ({"io_threads": None}, "io_threads"), ({"prefill_chunk": 2.5}, "prefill_chunk"),
     ({"max_batch": True}, "max_batch"), ({"exact": "yes"}, "exact"),
     ({"context": 10**9}, "context"), ({"active_experts": 99}, "active_experts"), ({"backend": "gpu"}, "backend")],
)  # fmt: skip
def test_wrong_settings_are_named(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, **arguments)


def test_wrong_requests(llm):
    for prompt in ("", [], [[]], [1, 10**9], ["a", []], 3, None, ["a", 1], "a" * 256):
        with pytest.raises(RequestError):
            llm.generate(prompt, GREEDILY)
    with pytest.raises(RequestError, match="unknown sampling parameter top_q; known: temperature"):
        llm.generate("a", top_q=1)
    with pytest.raises(RequestError, match="params must be SamplingParams, got dict"):
        llm.generate("a", {"temperature": 0})
    with pytest.raises(RequestError, match="256 tokens, but the context of 256"):
        llm.stream([1] * 256)
    assert llm.runtime.engine.idle


def test_without_tokenizer_or_template():
    with load(FOLDER / NAME) as llm:
        assert llm.generate([1, 2], GREEDILY).text == ""
        for call in (lambda: llm.generate("a"), lambda: llm.encode("a"), lambda: llm.generate([1], stop="x")):
            with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
                call()
        with pytest.raises(TemplateError, match="base model"):
            llm.chat([{"role": "user", "content": "hi"}])


def test_closed_model_refuses_and_gives_its_memory_back(folder):
    llm = load(folder)
    arena, model = weakref.ref(llm.runtime.store.arena), weakref.ref(llm.runtime.model)
    stream = llm.stream("abc", GREEDILY)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        list(stream)
    for call in (lambda: llm.generate("abc"), lambda: llm.logits([1]), lambda: llm.runtime):
        with pytest.raises(RequestError, match="closed"):
            call()
    del stream
    assert arena() is None
    assert model() is None


def test_missing_native_kernels_warn_once_and_work(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "moestream.ops.cpu", raising=False)
    monkeypatch.delattr("moestream._native", raising=False)
    monkeypatch.setitem(sys.modules, "moestream._native", None)
    with pytest.warns(UserWarning, match=r"slow fallback: .* reinstall") as caught:
        llm = load(folder, backend="auto")
    assert len(caught) == 1
    assert llm.generate("abc", GREEDILY).receipt.setup.backend == "reference"
    llm.close()
    with pytest.raises(BackendError, match="reinstall"):
        load(folder, backend="cpu")


@pytest.mark.skipif(BACKEND == "reference", reason="the native module reads MOESTREAM_ISA")
def test_a_wrong_instruction_set_is_named(folder, monkeypatch):
    monkeypatch.setenv("MOESTREAM_ISA", "sse9")
    code = f"from moestream import LLM; LLM.load({str(folder)!r}, ram='2GB')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: MOESTREAM_ISA must be portable, neon, avx2 or avx512, got 'sse9'" in result.stderr


def test_import_is_light():
    code = "import moestream, sys; print(sorted({'numpy', 'tokenizers', 'jinja2', 'psutil'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
