"""Run Mixture-of-Experts language models far larger than memory, streaming the experts from SSD.

    from moestream import LLM

    with LLM.load("path/to/model", ram="8GB") as llm:
        for delta in llm.stream("Tell me a story about a fox"):
            print(delta.text, end="", flush=True)

Names are imported when first used, so that ``import moestream`` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestream.engine.receipt import Receipt
    from moestream.engine.sampling import SamplingParams
    from moestream.errors import (
        BackendError,
        BudgetError,
        CheckpointError,
        ConfigError,
        MoestreamError,
        NonFiniteLogitsError,
        ReadError,
        RequestError,
        TemplateError,
    )
    from moestream.llm import LLM
    from moestream.text.replies import Completion, Delta
    from moestream.text.tools import ParsedReply, ToolCall

__version__ = "0.1.0"

_HOMES = {
    "LLM": "moestream.llm",
    "Completion": "moestream.text.replies",
    "Delta": "moestream.text.replies",
    "ParsedReply": "moestream.text.tools",
    "Receipt": "moestream.engine.receipt",
    "SamplingParams": "moestream.engine.sampling",
    "ToolCall": "moestream.text.tools",
}

__all__ = [
    "LLM",
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Delta",
    "MoestreamError",
    "NonFiniteLogitsError",
    "ParsedReply",
    "ReadError",
    "Receipt",
    "RequestError",
    "SamplingParams",
    "TemplateError",
    "ToolCall",
]


if not TYPE_CHECKING:  # for mypy it would hide the submodules

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'moestream' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES.get(name, "moestream.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
