"""llama.cpp through the PyPI wheel ``xllamacpp``: reads prompts and decodes in its server, prints windows as JSON.

Started by ``peer_runs.run_child``; settings as JSON: ``model``, ``threads``, ``in_memory`` and ``phases``. The wheel is
built for AVX2 at most: slower than a llama.cpp built on the machine itself.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import xllamacpp as xlc

VOCABULARY = 512
"""Random tokens come from the first ids, which every file has."""


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the phases one after another on one loaded model; the server's own timings cut off its overhead."""
    phases = settings["phases"]
    params = xlc.CommonParams()
    params.model.path = settings["model"]
    longest = max(phase["tokens"] for phase in phases)
    params.n_ctx, params.n_parallel, params.warmup = longest + 64, 1, False
    params.n_batch = params.n_ubatch = max(64, longest)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    modes = xlc.llama_load_mode
    params.load_mode = modes.LLAMA_LOAD_MODE_NONE if settings["in_memory"] else modes.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = not settings["in_memory"]
    server = xlc.Server(params)
    random = np.random.default_rng(0)
    windows: dict[str, list[tuple[float, float, int]]] = {}
    for phase in phases:
        found = windows[phase["name"]] = []
        for _ in range(phase["settle"] + phase["windows"]):
            prompt, new = (phase["tokens"], 1) if phase["prefill"] else (8, phase["tokens"] + 1)
            reply = server.handle_completions(
                {
                    "prompt": random.integers(0, VOCABULARY, prompt).tolist(),
                    "max_tokens": new,
                    "ignore_eos": True,
                    "temperature": 1e6,
                    "top_k": 0,
                    "top_p": 1.0,
                    "min_p": 0.0,
                    "samplers": ["temperature"],
                    "cache_prompt": False,
                }
            )
            end = time.monotonic()
            timings = reply["timings"]
            took = timings["prompt_ms" if phase["prefill"] else "predicted_ms"] / 1e3
            tokens = timings["prompt_n" if phase["prefill"] else "predicted_n"]
            found.append((end - took, end, tokens))
    return {"phases": windows, "build": xlc.BUILD_INFO, "system": xlc.get_system_info()}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
