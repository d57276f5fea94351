"""Real servers of the model in the package, each a process of its own, and the real clients."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest
from server_process import SMALL, Server, running
from web_page import CHROMIUM


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
        "MOESTREAM_ALLOW_PRIORITY": "true",
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


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens pages that must not complain, nor ask anybody but their server."""
    contexts, problems = [], []

    def opened(url, *, width=1280, height=800, ready=True, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on(
            "console",
            lambda m: (
                problems.append(m.text) if m.type == "error" and not m.text.startswith("Failed to load") else None
            ),
        )
        page.on("request", lambda r: None if r.url.startswith(url) else problems.append(f"asked {r.url}"))
        page.goto(url)
        if ready:
            page.wait_for_selector("#send:enabled")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems
