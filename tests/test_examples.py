"""The examples run as they stand, where their tool is installed."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import browser, needs_browser
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import ROOT, Service

__all__ = ["browser"]
EXAMPLES = ROOT / "examples"
TOKENS = ["Two", " lines:\n", "\n- one\u2028\n", "  - two: é", "[DONE]", " data: x"]
"""What a careless parser of event streams loses."""
COMMANDS = {
    "python": [sys.executable, "terminal.py"],
    "node": ["node", "ask.mjs"],
    "go": ["go", "run", "ask.go"],
}


def run(
    command: Sequence[str], url: str, *arguments: str, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(
        [*command, url, *arguments],
        cwd=EXAMPLES,
        input=typed,
        capture_output=True,
        encoding="utf-8",
        timeout=50,  # Go compiles first
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )


@pytest.mark.parametrize("language", COMMANDS)
def test_an_example_prints_the_reply_letter_for_letter(
    service: Service, groq: FakeGroq, language: str
) -> None:
    groq.on("question", Script(TOKENS))
    ended = run(COMMANDS[language], service.url, "question", typed="question\n")
    assert "".join(TOKENS) in ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("script", [Script(status=500), Script(["a", "b"], error_before_token=1)])
@pytest.mark.parametrize("language", COMMANDS)
def test_an_example_tells_of_an_error_before_and_in_the_stream(
    service: Service, groq: FakeGroq, language: str, script: Script
) -> None:
    groq.on("question", script)
    ended = run(COMMANDS[language], service.url, "question", typed="question\n")
    assert "error: the language model service " in ended.stdout + ended.stderr


def test_the_example_with_curl_shows_the_whole_api(service: Service) -> None:
    ended = run(["sh", "curl.sh"], service.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert '{"response":"You said: Hello!"}' in ended.stdout
    assert "data:  again!\n\ndata: [DONE]\n" in ended.stdout
    assert '{"role":"assistant","content":"You said: And again!"}]}' in ended.stdout


@pytest.fixture
def origin() -> Iterator[str]:
    """The origin of a page that is served by another server."""
    handler = functools.partial(Quiet, directory=str(EXAMPLES))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    yield page
    page.close()


@needs_browser
def test_the_example_for_a_browser_chats_stops_and_goes_on(
    start_service: StartService, groq: FakeGroq, origin: str, page: Page
) -> None:
    groq.on("long", Script(["Once", " upon", " a"], hold_before_token=2))
    service = start_service(ALLOWED_ORIGINS=origin)
    page.goto(f"{origin}/browser.html?url={service.url}")
    question, log = page.get_by_label("Message"), page.get_by_role("log")
    question.fill("long")
    question.press("Enter")
    expect(log).to_contain_text("You: long Once upon")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    question.fill("again")
    question.press("Enter")
    expect(log).to_contain_text("You: again You said: again")
    assert groq.asked("again")[0].contents == ["long", "Once upon", "again"]
    groq.on("cut", Script(["Once", " more"], hold_before_token=1))
    question.fill("cut")
    question.press("Enter")
    expect(log).to_contain_text("You: cut Once")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    service.process.kill()
    expect(log).to_contain_text("error: the connection broke before the reply's end")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
