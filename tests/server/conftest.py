"""Real servers of the model in the package, each a process of its own, and the real clients."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest
from server_process import SMALL, Server, running


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server without a key."""
    with running("demo", "--port", "0", "--ping", "0.2", *SMALL) as started:
        yield started


@pytest.fixture(scope="session")
def narrow() -> Iterator[Server]:
    """A server with a key that runs one request and lets one wait, set up by its environment."""
    env = {
        "MOESTREAM_API_KEY": "secret-key-1",
        "MOESTREAM_MAX_BATCH": "1",
        "MOESTREAM_QUEUE": "1",
        "MOESTREAM_MAX_BODY": "20000",
        "MOESTREAM_PORT": "0",
        "MOESTREAM_ALLOWED_ORIGIN": "https://chat.example.org",
    }
    with running("demo", *SMALL, env=env) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made
