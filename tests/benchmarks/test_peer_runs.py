"""Programs are run, understood and reported: commands, outputs, failures, ratios."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from peer_machine import Ceilings, Sampler, mean, withhold
from peer_report import best, judge, summarise, table
from peer_runs import Phase, Variant, bench_command, bench_windows, can_repack, measure, parse_bench, run_bench

PREFILL, DECODE = Phase("prefill-512", True, 512, 1, 1), Phase("decode", False, 32, 1, 2)
LLAMA_CPP = "  --no-warmup  skip\n  -lm, --load-mode <auto|none|mmap>\n  --repack <0|1>  (default: 1)\n"
IK = "  -mmp, --mmap <0|1>\n  -w, --warmup <0|1>\n  -rtr, --run-time-repack <0|1>\n"
TESTS = [
    {"n_prompt": 512, "n_gen": 0, "samples_ns": [6_000_000_000, 5_000_000_000], "build_commit": "abc"},
    {"n_prompt": 0, "n_gen": 32, "samples_ns": [3_000_000_000, 1_000_000_000, 2_000_000_000], "build_commit": "abc"},
]

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the comparison reads /proc and /sys")


def command(help_text: str, variant: Variant, in_memory: bool, *phases: Phase) -> str:
    return " ".join(bench_command(Path("/b"), help_text, Path("/m.gguf"), variant, phases, in_memory))


def test_commands_speak_the_words_of_each_llama_bench() -> None:
    variant = Variant("x", "q4_0", 2, repack=True)
    assert command(LLAMA_CPP, variant, True, PREFILL, DECODE) == (
        "/b -m /m.gguf -o json -t 2 -r 3 -p 512 -n 32 -b 512 -ub 512 --load-mode none --repack 1 --no-warmup"
    )
    assert command(IK, variant, True, DECODE) == "/b -m /m.gguf -o json -t 2 -r 3 -p 0 -n 32 -mmp 0 -rtr 1 -w 0"
    plain = Variant("x", "q4_k", 4, passive=True)
    assert command(LLAMA_CPP, plain, False, DECODE).endswith("--load-mode mmap --repack 0 --no-warmup")
    assert command(IK, plain, False, DECODE).endswith("-mmp 1 -rtr 0 -w 0")
    assert command("-m, --model", plain, False, DECODE) == "/b -m /m.gguf -o json -t 4 -r 3 -p 0 -n 32"
    assert [can_repack(text) for text in (LLAMA_CPP, IK, "-mmp")] == [True, True, False]


def test_output_is_found_between_other_lines() -> None:
    assert parse_bench(f"loading [1/2]\n{json.dumps(TESTS, indent=2)}\nbye [\n") == TESTS
    for text in ("", "error: no such file\n", '[\n{"n_prompt": 512,'):
        with pytest.raises(ValueError, match=r"JSON|delimiter|Expecting"):
            parse_bench(text)


def test_windows_are_counted_back_from_the_moment_of_printing() -> None:
    found = bench_windows(TESTS, [100.0, 110.0], (DECODE, PREFILL))
    assert found["prefill-512"] == [(89.0, 95.0, 512), (95.0, 100.0, 512)]
    assert found["decode"] == [(104.0, 107.0, 32), (107.0, 108.0, 32), (108.0, 110.0, 32)]


def fake(tmp_path: Path, code: str) -> list[str]:
    script = tmp_path / "fake.py"
    script.write_text(code)
    return [sys.executable, str(script)]


@linux
def test_a_program_is_timed_by_what_it_prints(tmp_path) -> None:
    tests = json.dumps([{"n_prompt": 0, "n_gen": 32, "samples_ns": [100_000_000] * 3}], indent=1)
    code = f"import time\ntime.sleep(0.4)\nprint({tests!r}, flush=True)\ntime.sleep(0.2)"
    start = time.monotonic()
    finished = run_bench(fake(tmp_path, code), Variant("x", "q4_0", 1), (DECODE,), tmp_path, 30)
    assert finished.error is None
    result = measure(finished, DECODE)
    assert result["rates"] == pytest.approx([320.0, 320.0])
    assert result["tokens"] == 64
    assert result["bytes_per_token"] >= 0
    end = finished.phases["decode"][-1][1]
    assert start + 0.4 <= end <= start + finished.seconds - 0.2  # when it was printed, not when the program ended


@linux
def test_failures_and_timeouts_are_results(tmp_path) -> None:
    variant = Variant("x", "q4_0", 1)
    failing = fake(tmp_path, "import sys; print('boo'); sys.exit('no such model')")
    error = measure(run_bench(failing, variant, (DECODE,), tmp_path, 30), DECODE)["error"]
    assert error == "ended with 1: no such model"
    silent = fake(tmp_path, "print('nothing to say')")
    assert "no JSON" in measure(run_bench(silent, variant, (DECODE,), tmp_path, 30), DECODE)["error"]
    slow = fake(tmp_path, "import time; time.sleep(60)")
    assert measure(run_bench(slow, variant, (DECODE,), tmp_path, 0.3), DECODE) == {"error": "timed out after 0.3 s"}


@linux
def test_the_sampler_sees_the_processor_time_of_a_process() -> None:
    sampler = Sampler(os.getpid(), None)
    start, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.3:
        pass
    end = time.monotonic()
    time.sleep(0.15)
    usage = sampler.between(start, end)
    assert 0.2 <= usage.cores * usage.seconds <= 0.6
    assert usage.others >= -0.1
    assert usage.bytes_read == usage.in_flight == 0


@linux
def test_withheld_memory_is_given_back() -> None:
    with withhold(0), withhold(1 << 24):
        pass
    with pytest.raises(SystemExit, match="--withhold"), withhold(1 << 60):
        pass


# ------------------------------------------------------------------------------------------------ the report


def record(engine: str, number: int, rates: list[float], **more: object) -> dict[str, object]:
    base = {"case": "30b", "phase": "decode", "routing": "skewed", "withheld": 0, "read_ahead": "default"}
    result = {
        "rates": rates,
        "tokens": 10,
        "bytes_per_token": 2e6,
        "seconds_per_token": 0.1,
        "in_flight": 0.5,
        "cores": 2.0,
        "disturbed": False,
        "ceilings": {"disk": 1e9, "memory": 40e9, "int8": 1e12},
    }
    made = base | {"engine": engine, "variant": "2 threads", "tuned": False, "round": number} | result | more
    judge(made, {"dense_bytes": 1e9, "expert_bytes": 1e9, "flops": 4e9, "head_flops": 1e9}, 1.0, 1)
    return made


def test_a_decoded_token_is_judged_by_what_binds() -> None:
    made = record("x", 1, [10.0])
    assert made["limit"] == "memory"
    assert made["percent"] == pytest.approx(50)  # 2 GB at 40 GB/s in 100 ms
    assert record("x", 1, [10.0], bytes_per_token=80e6)["limit"] == "disk"


def test_a_prompt_is_judged_by_its_share_of_the_weights() -> None:
    made = record("x", 1, [100.0], seconds_per_token=0.01)
    judge(made, {"dense_bytes": 1e9, "expert_bytes": 1e9, "flops": 4e9, "head_flops": 1e9}, 20.0, 100)
    assert made["floors"]["memory"] == pytest.approx((1e9 + 20e9) / 100 / 40e9)
    assert made["floors"]["arithmetic"] == pytest.approx((3e9 + 1e7) / 1e12)


def test_ratios_compare_the_same_round() -> None:
    records = [
        record("moestream", 1, [20.0]),
        record("peer", 1, [10.0]),
        record("moestream", 2, [9.0]),  # the machine was half as fast
        record("peer", 2, [5.0, 4.0, 5.0]),
    ]
    (rows,) = summarise(records).values()
    assert [row["engine"] for row in rows] == ["moestream", "peer"]
    assert rows[1]["ours_is"] == pytest.approx((2 + 9 / 5) / 2)
    assert rows[1]["tok_s"] == 5.0
    assert (rows[1]["low"], rows[1]["high"]) == (4.0, 10.0)


def test_disturbed_runs_count_only_where_there_is_no_other() -> None:
    records = [
        record("peer", 1, [3.0], disturbed=True),
        record("peer", 2, [10.0]),
        record("x", 1, [1.0], disturbed=True),
    ]
    (rows,) = summarise(records).values()
    assert [(row["engine"], row["tok_s"], row["disturbed"]) for row in rows] == [
        ("peer", 10.0, False),
        ("x", 1.0, True),
    ]
    assert "disturbed" in table(summarise(records))[-1]


def test_failures_are_shown_and_the_best_setting_goes_on() -> None:
    failed = {k: v for k, v in record("peer", 1, []).items() if k not in ("rates", "percent", "limit", "floors")}
    records = [
        record("moestream", 1, [20.0]),
        record("peer", 1, [10.0], variant="repacked"),
        record("peer", 1, [12.0], variant="plain", read_ahead="128", tuned=True),
        failed | {"error": "timed out after 600 s", "variant": "4 threads"},
    ]
    summary = summarise(records)
    text = "\n".join(table(summary))
    assert "| peer 4 threads | timed out after 600 s |" in text
    assert "| peer plain, read-ahead 128 KB | 12.00 (12.00, 12.00) | 1.67x |" in text
    assert list(best(records).values()) == ["moestream 2 threads", "peer plain, read-ahead 128 KB"]
    other = record("peer", 1, [1.0], withheld=13_000_000_000)
    assert len(summarise([*records, other])) == 2  # another amount of memory is another comparison


def test_the_mean_of_ceilings() -> None:
    assert mean([Ceilings(1, 2, 3), Ceilings(3, 4, 5)]) == Ceilings(2, 3, 4)
