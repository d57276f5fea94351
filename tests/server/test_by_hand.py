"""Two long checks with tools that are not among the test requirements.

Run as ``pip install schemathesis "lm-eval[api]" transformers && pytest -m slow tests/server``.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from server_process import SMALL, running

from moestream import LLM

pytestmark = pytest.mark.slow
ROWS = [
    ("What is the capital of France?", [" Paris", " Rome", " Berlin"], 0),
    ("What is 2 + 3?", [" 4", " 5", " 9"], 1),
    ("What is the capital of Japan?", [" Oslo", " Tokyo", " Lima"], 1),
    ("What is 4 + 4?", [" 8", " 7", " 3"], 0),
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
"""


@pytest.fixture
def short():
    """A server whose replies are short, because generated requests ask for anything."""
    with running("demo", "--port", "0", "--context", "128", *SMALL) as started:
        yield started


@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="needs schemathesis")
def test_generated_requests_find_nothing(short, tmp_path):
    """What a schema cannot say (a tool message needs an id) makes valid bodies wrong, so that check is left out."""
    file = tmp_path / "schemathesis.toml"
    file.write_text('[checks.negative_data_rejection]\nexpected-statuses = ["4xx"]\n')  # 413 too
    command = [
        "schemathesis",
        "--config-file",
        str(file),
        "run",
        f"{short.url}/openapi.json",
        "--phases",
        "coverage,fuzzing",
    ]
    command += ["--max-examples", "15", "--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # it leaves a cache
    assert done.returncode == 0, done.stdout[-8000:]
    assert short.request("GET", "/health")[0] == 200


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval[api]")
def test_evaluation_harness_agrees_with_the_library(short, tmp_path):
    """Log likelihoods of every choice, as lm-eval reads them from the server, against the logits of the library."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in ROWS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    with LLM.load("demo", ram="1GB") as llm:
        folder = llm.runtime.folder
        expected = [[_log_likelihood(llm, f"Question: {q}\nAnswer:", choice) for choice in c] for q, c, _ in ROWS]
    settings = f"model=demo,base_url={short.url}/v1/completions,max_length=128,tokenizer_backend=huggingface"
    settings += f",tokenizer={folder}"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", settings]
    command += ["--tasks", "tiny", "--include_path", str(tmp_path), "--log_samples", "--output_path", str(tmp_path)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    subprocess.run(command, check=True, env=env, timeout=300)
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc_id"]] = [float(one[0]) for one in sample["filtered_resps"]]
    assert [found[i] for i in range(len(ROWS))] == [pytest.approx(row, abs=0.3) for row in expected]


def _log_likelihood(llm, context, choice):
    """Sum of the log probabilities of a choice's tokens."""
    import numpy as np

    ids, start = llm.encode(context + choice), len(llm.encode(context))
    logits = llm.logits(ids).astype(np.float64)
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    return float(sum(logprobs[at - 1, ids[at]] for at in range(start, len(ids))))
