"""What tests of the web page share: finding Chromium, and what people do on a page."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("MOESTREAM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright (PyPI)"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
]


def until(page, condition):
    """Wait until JavaScript is true; Playwright's own way needs eval, which the page forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def shot(page, name):
    if folder := os.environ.get("MOESTREAM_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def ask(page, text, *, wait=True):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        settled(page)


def settled(page):
    page.wait_for_selector("#send:visible")


def endless(page, **more):
    """So hot that hardly a reply ends by itself; through the dialog, as people do it."""
    page.click("#open-settings")
    for name, value in {"temperature": 50, "top_k": 0, "top_p": 1, **more}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("button[value=save]")


def writing(page):
    until(page, "document.querySelector('.running .text')?.textContent.length > 20")


def replies(page):
    return page.locator(".assistant > .text").all_inner_texts()


def running_requests(server):
    return server.request("GET", "/v1/moestream/live")[2]["running"]
