"""The command line from outside: a process, its two outputs and its exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from golden_models import FOLDER

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("moestream._native") is None, reason="the native module reads MOESTREAM_ISA"
)
SAMPLING = ("--max-tokens", 8, "--temperature", 0)


def receipt_of(stderr: str) -> str:
    return "\n".join(
        line for line in stderr.splitlines() if line.startswith(("prompt ", "reply ", "experts ", "read "))
    )


def test_run_writes_text_to_stdout_and_receipt_to_stderr(run, model):
    result = run("run", "--model", model, "hello", *SAMPLING)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "prompt " not in result.stdout
    assert "reply     8 tokens" in receipt_of(result.stderr)
    assert "3 of 3 native" in receipt_of(result.stderr)


def test_run_reads_stdin_and_gives_the_same_answer(run, model):
    argument = run("run", "--model", model, "hello", *SAMPLING)
    stdin = run("run", "--model", model, *SAMPLING, input="hello")
    assert stdin.stdout == argument.stdout


@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [
        ("fox " * 75, 0, "reply     8 tokens"),
        ("/" * 5000, 1, "the prompt has"),
        ("\udcff", 1, "the text is not valid Unicode"),
    ],
    ids=["300 characters", "5000 slashes", "not UTF-8"],
)
def test_run_takes_any_argument(run, model, prompt, status, message):
    result = run("run", "--model", model, prompt, "--context", 4000, *SAMPLING)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_prompt_beyond_the_context_is_one_clear_line(run, model):
    result = run("run", "--model", model, "--raw", "--context", 4000, *SAMPLING, input="a long report " * 7200)
    assert result.returncode == 1
    assert "the prompt has 100800 tokens, but the context of 4000" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_stdin_that_is_not_text_is_one_clear_line(model):
    command = [sys.executable, "-m", "moestream", "run", "--model", str(model)]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, input=b"\xff\xfe\x00", capture_output=True, timeout=60, check=False, env=env)
    assert result.returncode == 2
    assert b"the prompt on stdin is not text" in result.stderr
    assert b"Traceback" not in result.stderr


def test_raw_skips_the_chat_template(run, model):
    def facts(*args):
        result = run("run", "--model", model, "hello", "--json", *SAMPLING, *args)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    raw, chat = facts("--raw"), facts()
    assert raw["receipt"]["prompt_tokens"] == len("hello")
    assert chat["receipt"]["prompt_tokens"] == len("user:hello|assistant:")
    assert raw["receipt"]["new_tokens"] == 8


def test_seed_makes_sampling_repeatable(run, model):
    def text(seed):
        return run("run", "--model", model, "hello", "--max-tokens", 24, "--temperature", 2, "--seed", seed).stdout

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_fewer_experts_are_named_as_lossy(run, model):
    result = run("run", "--model", model, "hello", "--active-experts", 2, "--cache", "page", *SAMPLING)
    assert result.returncode == 0, result.stderr
    assert "LOSSY     active-experts 2 of 3" in result.stderr


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--model", "/nowhere", "hi"], 1, "/nowhere is not a model folder"),
        (["--model", "{model}", "--ram", "lots", "hi"], 2, "'lots' is not a size; write for example 8GB"),
        (["--model", "{model}", "--ram", "1MB", "hi"], 1, "the memory budget is 1.0 MB, but at least"),
        (["--model", "{model}", "--cache", "ram", "hi"], 2, "'ram' is not one of"),
        (["--model", "{model}", "--top-p", "3", "hi"], 1, "top_p must be"),
        (["--model", "{model}", "--active-experts", "99", "hi"], 2, "active_experts is 99"),
        (["--model", "{model}", " "], 2, "there is no prompt"),
        (["{model}"], 2, "is a model folder, not a prompt; write: moestream run PROMPT --model"),
    ],
)
def test_errors_are_one_clear_message(run, model, args, status, message):
    result = run("run", *(arg.replace("{model}", str(model)) for arg in args))
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(model, monkeypatch, run):
    monkeypatch.setenv("MOESTREAM_DEBUG", "1")
    result = run("run", "--model", "/nowhere", "hi")
    assert "Traceback" in result.stderr
    assert "CheckpointError" in result.stderr


def test_damaged_shard_is_an_error(run, model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4096])
    result = run("run", "--model", tmp_path, "hi")
    assert result.returncode == 1
    assert str(shard) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_interrupt_ends_the_reply_and_keeps_the_receipt(model):
    command = [sys.executable, "-m", "moestream", "run", "--model", str(model), "hello", "--max-tokens", "3000"]
    process = subprocess.Popen(
        [*command, "--temperature", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the reply has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "ended by cancelled" in err
    assert "Traceback" not in err


def test_interrupt_in_chat_ends_only_the_reply(model):
    command = [sys.executable, "-m", "moestream", "chat", "--model", str(model), "--private", "--temperature", "1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdout.read(1)  # the reply has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("hello\n/bye\n", timeout=60)
    assert process.returncode == 0, err
    counts = [int(tokens) for tokens in re.findall(r"\[(\d+) tokens", err)]
    assert len(counts) == 2  # asked again
    assert counts[0] < 3000
    assert "stays in the conversation" in err
    assert "Traceback" not in err


def test_closed_pipe_is_not_an_error_message(model):
    command = f"{sys.executable} -m moestream run --model {model} hello --max-tokens 2000 | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert "Traceback" not in result.stderr


def test_chat_keeps_history_and_ends_with_bye(run, model):
    result = run("chat", "--private", "--model", model, *SAMPLING, input="hello\nmore\n/clear\nhello\n/bye\nhello\n")
    assert result.returncode == 0, result.stderr
    once = run("chat", "--private", "--model", model, *SAMPLING, input="hello\n").stdout
    assert once.strip()
    assert result.stdout.startswith(once)
    assert result.stdout.endswith(once)
    prompts = [int(tokens) for tokens in re.findall(r"prompt (\d+)", result.stderr)]
    assert len(prompts) == 3  # what follows /bye is not read
    assert prompts[1] > prompts[0] == prompts[2]


def test_chat_goes_on_after_an_error(run, model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    refusing = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad words') }}{% endif %}"
    refusing += "{{ m.content }}{% endfor %}:"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": refusing}))
    result = run(
        "chat",
        "--private",
        "--model",
        tmp_path,
        "--context",
        400,
        *SAMPLING,
        input=f"hello\nbad\n{'x' * 500}\nmore\n/bye\n",
    )
    assert result.returncode == 0, result.stderr
    assert "no bad words" in result.stderr
    assert "the conversation has" in result.stderr
    assert result.stderr.count("tok/s") == 2  # hello and more: what failed left the conversation
    assert "Traceback" not in result.stderr


def test_inspect_names_what_matters(run):
    result = run("inspect", FOLDER / "qwen3_5-mlx4", "--ram", "300MB")
    assert result.returncode == 0, result.stderr
    for text in ("qwen3_5_moe", "3 x delta_net + moe, 1 x attention + moe", "7 a layer", "affine-4 g64", "300.0 MB"):
        assert text in result.stdout


def test_inspect_counts_bytes(run):
    facts = json.loads(run("inspect", FOLDER / "qwen3-f16-single", "--json").stdout)
    assert facts["expert_bytes"] == 3 * 40 * 104 * 2
    assert facts["expert_bytes_per_token"] == 2 * facts["experts_per_token"] * facts["expert_bytes"]
    assert facts["experts_bytes"] == 2 * 7 * facts["expert_bytes"]
    assert facts["memory"]["total"] <= facts["memory"]["budget"]


def test_inspect_says_what_a_small_budget_lacks(run, model):
    result = run("inspect", model, "--ram", "5MB")
    assert result.returncode == 0, result.stderr
    assert "the memory budget is 5.0 MB, but at least" in result.stdout


def test_doctor_reports_the_machine(run, tmp_path):
    result = run("doctor", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["cpu"]["usable"] >= 1
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["backends"]["reference"]["available"]
    assert not facts["backends"]["gpu"]["available"]
    if facts["backends"]["cpu"]["available"]:
        assert facts["cpu"]["isa"] in facts["cpu"]["isa_supported"]
        assert facts["disk"]["bytes_per_s_8mb"] > 0
    assert list(tmp_path.iterdir()) == []  # the probe's file is gone


@pytest.fixture
def no_native(tmp_path, monkeypatch):
    """Processes that start now cannot import the native module, as after an install without a compiler."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['moestream._native'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("no_native")
def test_doctor_without_native_module_says_how_to_fix_it(run, tmp_path):
    result = run("doctor", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "slow fallback" in result.stdout
    assert "apt-get install g++" in result.stdout


@pytest.mark.usefixtures("no_native")
def test_run_without_native_module_warns_in_one_line_and_answers(run, model):
    result = run("run", "--model", model, "hello", *SAMPLING)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    warning, *_ = result.stderr.splitlines()
    assert warning.startswith("moestream: warning: slow fallback: numpy computes")
    assert "backend   reference" in result.stderr


def test_doctor_rejects_a_missing_folder(run):
    result = run("doctor", "/nowhere")
    assert result.returncode == 1
    assert "/nowhere: is not a folder" in result.stderr


@needs_native
def test_doctor_and_bench_name_a_wrong_instruction_set(run, monkeypatch):
    monkeypatch.setenv("MOESTREAM_ISA", "sse9")
    for command in (("doctor", "--no-disk"), ("bench", "demo")):
        result = run(*command)
        assert result.returncode == 1
        assert result.stderr.startswith("moestream: MOESTREAM_ISA must be ")
        assert len(result.stderr.strip().splitlines()) == 1


def test_startup_imports_nothing_heavy():
    code = "import sys, moestream.cli.main; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "rich", "tokenizers", "jinja2", "psutil"} & set(result.stdout.split())


def test_version_is_the_installed_one(run):
    from importlib.metadata import version

    assert run("--version").stdout.strip() == f"moestream {version('moestream')}"


def test_the_demo_model_answers_from_disk(run):
    result = run("run", "What is the capital of France?", "--temperature", 0, "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "Paris" in answer["text"]
    assert answer["receipt"]["bytes_read"] > 0
    assert answer["receipt"]["experts_used"] == answer["receipt"]["experts_native"]
