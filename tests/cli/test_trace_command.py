"""moestream trace: record a run, make a synthetic one, replay both."""

from __future__ import annotations

import json

import pytest
import typer.testing

from moestream.cli.main import app
from moestream.experts.trace import load_trace


@pytest.fixture(scope="module")
def recorded(run, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "hello.safetensors"
    args = ("--max-tokens", 6, "--temperature", 0, "--batch", 2, "--prefill-chunk", 8)
    result = run("trace", "record", model, "-o", path, *args, input="hello\n\nfox\n")
    assert result.returncode == 0, result.stderr
    assert not result.stdout
    assert str(path) in result.stderr
    return path


def test_record_runs_each_line_of_stdin(recorded):
    trace = load_trace(recorded)
    assert trace.model == "model"
    assert set(trace.segments[:, 1].tolist()) == {0, 1}
    replies = trace.segments[trace.segments[:, 3] == 0]
    assert len(replies) <= 2 * 5


def test_replay_prints_a_table_and_a_plot(run, recorded):
    result = run("trace", "replay", recorded, "--policy", "lru", "--policy", "lfru:8", "--slots", "1/2", "--slots", 9)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(str(recorded))
    assert lines[1].split() == ["slots", "of", "all", "lru", "lfru:8", "belady"]
    assert [line.split()[0] for line in lines[2:4]] == [str(load_trace(recorded).experts * 4 // 2), "9"]
    assert "hit rate (%) against slots" in result.stdout
    assert "xx lfru:8" in result.stdout


def test_replay_of_several_files_as_json(run, recorded, tmp_path):
    made = tmp_path / "made.safetensors"
    shape = ("--experts", 16, "--active", 2, "--layers", 3, "--tokens", 60, "--prompt-tokens", 20)
    assert run("trace", "synthetic", "-o", made, *shape).returncode == 0
    result = run("trace", "replay", recorded, made, "--slots", "50%", "--json")
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout)
    assert (first["file"], second["file"]) == (str(recorded), str(made))
    assert (second["experts"], second["layers"], second["active"], second["tokens"]) == (16, [0, 1, 2], 2, 60)
    assert [(o["policy"], o["slots"]) for o in second["outcomes"]] == [("lru", 24), ("lfru", 24), ("belady", 24)]
    best = second["outcomes"][-1]
    assert all(o["hit_rate"] <= best["hit_rate"] and o["misses"] >= best["misses"] for o in second["outcomes"])


def invoke(*args):
    return typer.testing.CliRunner().invoke(app, ["trace", *map(str, args)], input="hi")


@pytest.mark.parametrize("slots", ["0", "-1", "1/0x", "0/3", "0.1%", "many", "5%%"])
def test_slots_that_are_no_number_are_refused(recorded, slots):
    result = invoke("replay", recorded, f"--slots={slots}")
    assert "--slots" in str(result.exception)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("replay", "/nowhere"), "/nowhere: cannot be opened"),
        (("replay", __file__), "exceeds the limit"),
        (("record", "demo", "-o", "/nowhere/t"), "--output: /nowhere/t cannot be written"),
        (("record", "demo", "-o", "t", "-p", " "), "there is no prompt"),
        (("synthetic", "-o", "/nowhere/t"), "--output: /nowhere/t cannot be written"),
        (("synthetic", "-o", "t", "--experts", 4), "active must lie in"),
    ],
)
def test_errors_name_what_is_wrong(args, message):
    assert message in str(invoke(*args).exception)
