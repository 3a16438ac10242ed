"""A real browser, Debian's Chromium, with the chat page open."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.fake_groq import FakeGroq, Script
from tests.servers import PATIENCE, Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")

HOSTILE = """\
<script>document.title = "owned"</script>
<img src=x onerror="document.title='owned'"> **<b>bold</b>** `<i>code</i>`

[click](javascript:document.title='owned') [data](data:text/html,<script>alert(1)</script>)
[line](java
script:alert(1)) <javascript:alert(1)> <svg/onload=alert(1)>
![image](https://example.invalid/track.png)

- <iframe src="https://example.invalid/"></iframe>

| <style>*{display:none}</style> | b |
| --- | --- |
| <a href="javascript:alert(1)">x</a> | &lt;b&gt; |

```html"><img src=x onerror=alert(1)>
</code></pre><script>document.title = "owned"</script>
```
"""

RICH = """\
# Title
Some *text* with `code`, a [link](https://example.org/) and ~~more~~.

1. one
   - inner
2. two

> quote

| left | right |
| --- | ---: |
| a | 1 |

```js
const long = "a line that is much too long for the screen of any phone, so that it has to scroll";
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox does not work for root, who runs the tests in a container.
    options = ["--no-sandbox"] if os.getuid() == 0 else []
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture
def chat(browser: Browser, service: Service, groq: FakeGroq) -> Iterator["Chat"]:
    with open_chat(browser, service) as opened:
        yield opened


class Chat:
    """The page as its user sees it: by labels and roles."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.message = page.get_by_role("textbox", name="Message")
        self.stop = page.get_by_role("button", name="Stop the reply")
        self.again = page.get_by_role("button", name="Try again")
        self.edit = page.get_by_role("button", name="Edit the message")
        self.cancel = page.get_by_role("button", name="Cancel")
        self.log = page.get_by_role("log")
        self.questions = self.log.locator(".bubble")
        self.replies = self.log.locator(".reply .text")
        self.status = page.locator("#status")

    def say(self, text: str) -> None:
        self.message.fill(text)
        self.message.press("Enter")

    def ask(self, text: str) -> Locator:
        """Say something, and wait for the end of the reply."""
        before = self.finished.count()
        self.say(text)
        expect(self.finished).to_have_count(before + 1)
        return self.replies.last

    @property
    def finished(self) -> Locator:
        return self.log.locator(".reply[data-state=done]")

    @property
    def conversation(self) -> str:
        stored = self.page.evaluate("sessionStorage.getItem('conversation')")
        return str(json.loads(stored)["id"])


def begin_reply(chat: Chat, groq: FakeGroq) -> None:
    """Ask for a reply that pauses after "a" and ends as "ab" once Groq is released."""
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")


@contextmanager
def open_chat(browser: Browser, service: Service, **options: Any) -> Iterator[Chat]:
    """Open the page; fail at the end after any error or request to another host."""
    with closing_context(browser, **options) as context:
        page = context.new_page()
        faults: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(service.url)
        yield Chat(page)
        expected = r"Failed to load resource"
        expected += r"|Autofocus processing was blocked|was preloaded"  # on a busy machine
        assert not [fault for fault in faults if not re.search(expected, fault)]
        assert not [url for url in asked if not url.startswith(service.url)]


@contextmanager
def closing_context(browser: Browser, **options: Any) -> Iterator[BrowserContext]:
    context = browser.new_context(reduced_motion="reduce", **options)
    context.set_default_timeout(PATIENCE * 1000)
    try:
        yield context
    finally:
        context.close()
