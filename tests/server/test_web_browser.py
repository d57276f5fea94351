"""The web page's conversations in headless Chromium, with real servers of the model in the package.

Run as ``apt-get install chromium && pip install playwright axe-playwright-python && pytest -m browser tests/server``.
``MOESTREAM_CHROMIUM`` names another executable, ``MOESTREAM_SHOTS`` a folder for screenshots.
"""

import contextlib
import json
from pathlib import Path

from server_process import SMALL, running
from web_page import ask, endless, needs_browser, replies, running_requests, settled, shot, until, writing

pytestmark = needs_browser
KEY = "secret-key-1"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
HOSTILE = """# Title

<script>window.hurt = 1</script> <img src=x onerror="window.hurt = 2"> ![p](https://evil.example/x.png)
[a](javascript:window.hurt=3) [b](https://example.org) <a href="data:text/html,x">c</a> <svg onload=alert(1)>

| a | b |
|---|---|
| 1 | 2 |

```html
<b onclick="window.hurt = 4">x</b>
```
<iframe src="https://evil.example"></iframe><style>* { display: none }</style>
"""


def test_reply_streams_and_is_kept_in_the_browser(server, visit):
    page = visit(server.url)
    page.evaluate("""() => {
      window.lengths = new Set();
      const look = () => window.lengths.add(document.querySelector(".assistant > .text")?.textContent.length ?? 0);
      new MutationObserver(look).observe(document.getElementById("messages"), { childList: true, subtree: true });
    }""")
    ask(page, "Tell me a story about a fox")
    (reply,) = replies(page)
    assert len(reply) > 40
    assert page.evaluate("window.lengths.size") > 3  # it came in pieces
    assert page.locator(".assistant").get_attribute("aria-busy") == "false"
    assert "tok/s" in page.locator(".receipt summary").inner_text()
    spoken = page.locator("#spoken").text_content()
    assert reply.split("\n")[0] in spoken  # what a screen reader was given
    page.click(".receipt summary")
    assert page.locator(".receipt td").count() > 10
    page.reload()
    page.wait_for_selector("#send:enabled")
    assert replies(page) == [reply]
    assert page.locator("#conversations .open").all_inner_texts() == ["Tell me a story about a fox"]
    shot(page, "reply")


def test_stop_keeps_what_was_written_and_ends_the_request(server, visit):
    page = visit(server.url)
    endless(page)
    ask(page, "Tell me a story", wait=False)
    writing(page)
    while running_requests(server) != 1:
        pass  # what it says may be a quarter of a second old
    page.click("#stop")
    settled(page)
    assert "stopped" in page.locator(".receipt").inner_text()
    (text,) = replies(page)
    assert text
    while running_requests(server):
        pass
    ask(page, "Another one", wait=False)
    until(page, "document.querySelectorAll('.assistant').length == 2")
    writing(page)
    page.keyboard.press("Escape")
    settled(page)
    assert replies(page)[0] == text
    page.reload()
    page.wait_for_selector("#send:enabled")
    assert replies(page)[0] == text


def test_regenerate_and_edit_replace_what_follows(server, visit):
    page = visit(server.url)
    ask(page, "What is the capital of France?")
    ask(page, "And of Italy?")
    before = replies(page)
    assert len(before) == 2
    endless(page, max_tokens=15)
    page.click("text=Regenerate")
    until(page, "document.querySelector('.message:last-child .receipt')?.textContent.includes('cut off')")
    settled(page)
    after = replies(page)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert len(after) == 2
    page.locator(".user button:has-text('Edit')").first.click()
    page.fill(".edit textarea", "What is 2 + 2?")
    page.press(".edit textarea", "Control+Enter")
    until(page, "document.querySelectorAll('.message').length == 2")
    settled(page)
    assert page.locator(".user > .text").all_inner_texts() == ["What is 2 + 2?"]
    assert len(replies(page)) == 1


def test_conversations_go_on_in_the_background(server, visit):
    page = visit(server.url)
    endless(page)
    ask(page, "First", wait=False)
    writing(page)
    page.click("#new")
    assert page.is_visible("#empty")
    ask(page, "Second", wait=False)
    writing(page)
    assert page.locator("#conversations .dot").count() == 2
    page.click("#conversations .open:has-text('First')")
    length = len(replies(page)[0])
    until(page, f"document.querySelector('.running .text').textContent.length > {length}")
    page.click("[aria-label='Rename First']")
    page.evaluate("document.getElementById('stop').click()")  # the field keeps the focus
    settled(page)
    page.keyboard.type("Renamed")  # the end of the reply has not taken the field away
    page.keyboard.press("Enter")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete Second']")
    until(page, "document.getElementById('status').textContent == 'Conversation deleted'")
    assert page.locator("#conversations .open").all_inner_texts() == ["Renamed"]
    while running_requests(server):
        pass  # deleting ended the reply
    page.reload()
    page.wait_for_selector("#conversations .open")
    assert page.locator("#conversations .open").all_inner_texts() == ["Renamed"]


def test_tool_calls_are_shown_and_answered(server, visit):
    page = visit(server.url)
    page.click("#open-settings")
    page.fill("[name=tools]", "[{")
    page.click("button[value=save]")
    assert "not valid JSON" in page.inner_text("#settings-error")
    page.fill("[name=tools]", json.dumps([ADD]))
    page.fill("[name=temperature]", "0")
    page.click("button[value=save]")

    def forced(route):  # the model in the package seldom calls by itself
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"tool_choice": "required"}))

    page.route("**/v1/chat/completions", forced)
    ask(page, "What is 3 + 4? Use add.")
    assert page.locator(".call h3").first.inner_text() == "Calls add"
    called = json.loads(page.locator(".call pre").first.inner_text())
    assert set(called) == {"a", "b"}
    page.unroute("**/v1/chat/completions")
    for field in page.locator(".results textarea").all():
        field.fill("7")
    shot(page, "tools")
    page.click("text=Send results")
    page.wait_for_selector(".tool")
    settled(page)
    assert page.locator(".tool pre").first.inner_text() == "7"
    assert len(page.locator(".assistant").all()) == 2


def test_thoughts_are_folded(visit, tmp_path):
    from moestream import demo

    folder = tmp_path / "thinker"
    folder.mkdir()
    for file in Path(demo.__path__[0]).iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    template.write_text(text + "{%- if add_generation_prompt %}{{ '<think>\\n' }}{%- endif %}")
    with running(str(folder), "--port", "0", *SMALL) as started:
        page = visit(started.url)
        endless(page, max_tokens=30)
        ask(page, "What is 2 + 2?")
        assert page.locator(".thinking summary").inner_text().startswith("Thought")
        assert not page.is_visible(".thought")
        page.click(".thinking summary")
        assert page.locator(".thought").inner_text()
        shot(page, "thinking")


def test_key_is_asked_for(narrow, visit):
    page = visit(narrow.url, ready=False)
    page.wait_for_selector("#settings[open]")
    assert "key" in page.inner_text("#settings-error")
    assert page.evaluate("document.activeElement.name") == "key"
    page.fill("[name=key]", "wrong-key-1")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('settings').open && document.activeElement.name == 'key'")
    page.fill("[name=key]", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:enabled")
    page.click("#open-settings")
    page.fill("[name=max_tokens]", "5")
    page.click("button[value=save]")
    ask(page, "Hello")
    assert replies(page)[0]
    assert page.evaluate("localStorage.getItem('moestream.key')") is None  # kept for the tab only
    until(page, "document.getElementById('count-resident').textContent != ''")


def test_what_a_model_writes_is_never_used_as_html(server, visit):
    page = visit(server.url)
    found = page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("/static/markdown.js");
          const root = document.createElement("div");
          document.body.append(root);
          const view = new MarkdownView(root);
          for (let end = 1; end < text.length; end += 3) view.update(text.slice(0, end), false);
          view.update(text, true);
          const whole = document.createElement("div");
          new MarkdownView(whole).update(text, true);
          const all = [...root.querySelectorAll("*")];
          return {
            tags: [...new Set(all.map((e) => e.tagName.toLowerCase()))],
            attributes: [...new Set(all.flatMap((e) => e.getAttributeNames()))],
            links: [...root.querySelectorAll("a")].map((a) => a.getAttribute("href")),
            text: root.textContent,
            same: root.innerHTML === whole.innerHTML,
          };
        }""",
        HOSTILE,
    )
    assert not {"script", "img", "iframe", "svg", "style", "b"} & set(found["tags"])
    assert not [name for name in found["attributes"] if name.startswith("on") or name in ("src", "style", "id")]
    assert [link for link in found["links"] if link] == ["https://example.org"]
    assert {"table", "pre", "h1"} <= set(found["tags"])
    assert '<b onclick="window.hurt = 4">x</b>' in found["text"]
    assert found["same"]  # pieces make the same as the whole
    assert page.evaluate("window.hurt") is None


def test_server_that_goes_and_comes_back(visit):
    with running("demo", "--port", "0", *SMALL) as first:
        page = visit(first.url)
        endless(page)
        port = first.port
        ask(page, "Hello", wait=False)
        writing(page)
        first.process.kill()
        first.process.wait()
        settled(page)
        assert "lost" in page.locator(".assistant .error").inner_text()
        assert replies(page)[0]
    with contextlib.closing(page), running("demo", "--port", str(port), *SMALL):
        page.click("#open-settings")
        page.fill("[name=max_tokens]", "5")
        page.click("button[value=save]")
        page.wait_for_selector("#send:enabled")
        page.click("text=Try again")
        page.wait_for_selector(".receipt")
        assert page.locator(".assistant .error").count() == 0
