"""The page's view of the machine, on phones, by keyboard and without eyes, in headless Chromium.

See test_web_browser.py for how to run it.
"""

import importlib.util
import re

import pytest
from web_page import ask, endless, needs_browser, replies, settled, shot, until, writing

pytestmark = needs_browser


def map_pixels(page):
    return page.evaluate("document.getElementById('map').toDataURL()")


def test_map_moves_while_the_machine_works(server, visit):
    page = visit(server.url, width=1400)
    page.wait_for_selector("#map")
    until(page, "document.getElementById('count-resident').textContent != ''")
    assert page.inner_text("#map-shape") == "12 layers × 40"
    endless(page)
    page.wait_for_timeout(1500)
    still = map_pixels(page)
    assert map_pixels(page) == still
    ask(page, "Tell me a story", wait=False)
    writing(page)
    until(page, "Number(document.getElementById('tok-rate').textContent) > 1")
    seen = {map_pixels(page)}
    for _ in range(4):
        page.wait_for_timeout(300)
        seen.add(map_pixels(page))
    assert len(seen | {still}) > 3
    assert page.inner_text("#running") == "1"
    assert float(page.inner_text("#hit-rate")) > 0
    shares = [page.inner_text(f"#share-{name}") for name in ("wait", "experts", "rest", "idle")]
    assert 97 <= sum(int(share.removesuffix(" %")) for share in shares) <= 103
    page.click("#enlarge")
    shot(page, "map")
    page.click("#stop")
    settled(page)


def test_map_without_eyes_and_without_a_mouse(server, visit):
    page = visit(server.url, width=1400, reduced_motion="reduce")
    until(page, "document.getElementById('count-resident').textContent != ''")
    ask(page, "What is 2 + 2?")
    page.wait_for_timeout(700)
    page.focus("#map")
    page.keyboard.press("Home")
    assert re.fullmatch(r"Layer 0, expert 0: (in memory|on disk|being read), .*", page.inner_text(".tip"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("PageDown")
    assert page.inner_text(".tip").startswith("Layer 1, expert 1:")
    page.keyboard.press("End")
    assert page.inner_text(".tip").startswith("Layer 11, expert 39:")
    page.keyboard.press("Escape")
    assert not page.is_visible(".tip")
    until(page, "/: [1-9][0-9]* of 480 are in memory/.test(document.getElementById('map').ariaLabel)")
    page.click("#map-table summary")
    until(page, "document.querySelectorAll('#map-rows tr').length == 12")
    resident = [int(row) for row in page.locator("#map-rows tr td:nth-child(3)").all_inner_texts()]
    assert sum(resident) == int(page.inner_text("#count-resident"))
    page.locator("#map").hover(position={"x": 60, "y": 10})
    assert page.inner_text(".tip").startswith("Layer 0, expert ")


def test_nobody_is_watched_while_nobody_looks(server, visit):
    page = visit(server.url, width=1400)
    until(page, "document.getElementById('count-resident').textContent != ''")
    with page.expect_event("requestfailed", lambda r: r.url.endswith("/live")):
        page.click("#close-live")
    assert page.evaluate("document.activeElement.id") == "toggle-live"
    with page.expect_request("**/v1/moestream/live"):
        page.click("#toggle-live")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(server, visit, scheme):
    page = visit(server.url, width=390, height=780, has_touch=True, is_mobile=True, color_scheme=scheme)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert not page.is_visible("#list")
    page.fill("#prompt", "What is the capital of France?")
    page.tap("#send")
    settled(page)
    assert replies(page)[0]
    assert fits()
    shot(page, f"phone-{scheme}")
    page.tap("#toggle-live")
    page.wait_for_selector("#map:visible")
    until(page, "document.getElementById('count-resident').textContent != ''")
    assert fits()
    page.locator("#map").scroll_into_view_if_needed()
    page.locator("#map").tap(position={"x": 80, "y": 30})
    assert page.is_visible(".tip")
    assert page.inner_text(".tip").startswith("Layer ")
    shot(page, f"phone-live-{scheme}")
    page.tap("#toggle-list")
    assert page.is_visible("#list")
    assert not page.is_visible("#live")
    assert fits()
    page.tap("#conversations .open")
    assert not page.is_visible("#list")
    page.tap("#open-settings")
    assert fits()
    box = page.locator("#settings").bounding_box()
    assert box["width"] <= 390
    shot(page, f"phone-settings-{scheme}")


def test_page_by_keyboard(server, visit):
    page = visit(server.url)
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value("#prompt") == "Two\nlines"
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator(".user > .text").inner_text() == "Two\nlines"
    names = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")]
      .filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.outerHTML)""")
    assert names == []  # everything that can be used has a name


@pytest.mark.skipif(importlib.util.find_spec("axe_playwright_python") is None, reason="needs axe-playwright-python")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_page_passes_axe(server, visit, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    def check():
        page.wait_for_timeout(400)
        assert Axe().run(page).response["violations"] == []

    page = visit(server.url, width=width, color_scheme=scheme)
    check()
    ask(page, "What is the capital of France?")
    check()
    if width < 800:
        page.click("#toggle-live")
        page.wait_for_selector("#map:visible")
        check()
        page.click("#toggle-list")
    check()
    page.click("#open-settings")
    check()
