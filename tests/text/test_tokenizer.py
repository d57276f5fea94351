"""Incremental decoding equals decoding at once, never shows half a character, and honours stop strings."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from moestream.errors import CheckpointError, RequestError
from moestream.text.tokenizer import REPLACEMENT, TextStream, Tokenizer, read_json

SAMPLES = [
    "Hello world, hello tokens!",
    "naïve café 你好世界",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 ok 👍🏽.",
    " leading  spaces\n\ttabs",
    "end of 🦊",
]


def byte_level():
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES[:1] * 10, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def byte_fallback():
    """Like SentencePiece: words with a leading mark, unknown characters as bytes."""
    words = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        *"▁Hello wrd,!.abcdefghijklmnopqrstuvwxyz",
    ]
    tokenizer = HfTokenizer(
        models.BPE({w: i for i, w in enumerate(dict.fromkeys(words))}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte-level": Tokenizer(byte_level(), (), {}), "byte-fallback": Tokenizer(byte_fallback(), (), {})}


def pieces(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    return [stream.push(i) for i in ids] + [stream.finish()], stream


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES)
def test_stream_equals_whole_and_shows_whole_characters(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert len(ids) > len(text) / 6
    parts, _ = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) == text
    assert not any(REPLACEMENT in part for part in parts)
    assert sum(bool(part) for part in parts) > 1


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    text=st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=[REPLACEMENT, "▁"]), min_size=1, max_size=30
    )
)
@settings(max_examples=100, deadline=None)
def test_any_text_streams(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    parts, _ = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any(REPLACEMENT in part for part in parts)


@given(ids=st.lists(st.integers(0, 299), max_size=60))
@settings(max_examples=200, deadline=None)
def test_random_tokens_do_not_pile_up(ids):
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer)
    shown = ""
    for token in ids:
        shown += stream.push(token)
        assert len(stream._fresh) < 9
    shown += stream.finish()
    valid = tokenizer.decode(ids)
    if REPLACEMENT not in valid:
        assert shown == valid
    assert len(shown.replace(REPLACEMENT, "")) <= len(valid)


def test_cut_character_at_the_end_is_marked():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("ok 🦊")[:-1]
    parts, _ = pieces(tokenizer, ids)
    assert "".join(parts[:-1]) == "ok "
    assert set(parts[-1]) == {REPLACEMENT}


def test_special_tokens_are_hidden_and_keep_spaces():
    tokenizer = TOKENIZERS["byte-level"]
    end = tokenizer.token_id("<|end|>")
    ids = [*tokenizer.encode("a"), end, *tokenizer.encode(" b")]
    assert "".join(pieces(tokenizer, ids)[0]) == "a b"
    sp = TOKENIZERS["byte-fallback"]
    hello, world = sp.token_id("▁Hello"), sp.token_id("▁world")
    assert "".join(pieces(sp, [hello, 10**6, world])[0]) == "Hello world"  # an id outside the vocabulary shows nothing


def naive_stop(text, stop):
    """Cut before the stop string that is complete first (of several, before the longest)."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    text=st.text("ab\n.", max_size=40),
    stop=st.lists(st.text("ab\n.", min_size=1, max_size=5), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_equal_the_naive_cut(text, stop):
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, stop)
    shown = ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert naive_stop(text, stop).startswith(shown)  # nothing shown is taken back
    shown += stream.finish()
    assert shown == naive_stop(text, stop)
    assert (stream.stopped is not None) == any(s in text for s in stop)


def test_stop_string_over_several_tokens_ends_the_stream():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("one\nUser: two")
    parts, stream = pieces(tokenizer, ids, ["\nUser:"])
    assert "".join(parts) == "one"
    assert stream.stopped == "\nUser:"


def test_load_collects_end_tokens(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    end = byte_level().token_to_id("<|end|>")
    (tmp_path / "config.json").write_text('{"eos_token_id": null, "text_config": {"eos_token_id": 7}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, true, "x"]}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert Tokenizer.load(tmp_path).eos_ids == {5, 6, 7, end}
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json must hold a JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_lone_surrogate_is_refused():
    with pytest.raises(RequestError, match="not valid Unicode"):
        TOKENIZERS["byte-level"].encode("\ud800")


def test_a_text_the_tokenizer_cannot_take_and_a_file_that_cannot_be_read_are_named(tmp_path):
    backend = HfTokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))  # which is not in the vocabulary
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot encode"):
        Tokenizer(backend, [], {}).encode("b")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_json(tmp_path / ("x" * 300))
