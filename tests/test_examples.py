"""The examples run unchanged, where their tool is installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from tests.browser import browser, needs_browser
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import ROOT, Service, running

__all__ = ["browser"]
EXAMPLES = ROOT / "examples"
# Text that a careless parser of event streams loses.
TOKENS = ["Two", " lines:\n", "\n- one\u2028\n", "  - two: é", "[DONE]", " data: x"]
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
    settings: dict[str, Any] = {"cwd": EXAMPLES, "capture_output": True, "encoding": "utf-8"}
    settings["env"] = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    line = [*command, url, *arguments]
    return subprocess.run(line, input=typed, timeout=50, check=False, **settings)  # Go compiles


@pytest.mark.parametrize("language", COMMANDS)
def test_an_example_prints_the_exact_reply_and_any_error(
    service: Service, groq: FakeGroq, language: str
) -> None:
    groq.on("question", Script(TOKENS, finish_reason="length"))
    ended = run(COMMANDS[language], service.url, "question", typed="question\n")
    assert "".join(TOKENS) + " (truncated: " in ended.stdout
    assert (ended.returncode, ended.stderr) == (0, "")
    for script in (Script(status=500), Script(["a", "b"], error_before_token=1)):
        groq.on("question", script)
        ended = run(COMMANDS[language], service.url, "question", typed="question\n")
        assert "error: the language model service " in ended.stdout + ended.stderr, script


def test_the_curl_example_shows_the_whole_api(service: Service) -> None:
    ended = run(["sh", "curl.sh"], service.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert '{"response":"You said: Hello!"}' in ended.stdout
    assert "data:  again!\n\ndata: [DONE]\n" in ended.stdout
    assert '{"role":"assistant","content":"You said: And again!"}]}' in ended.stdout


@pytest.fixture
def origin() -> Iterator[str]:
    """The origin of another server, which serves the examples."""
    files = Mount("/", StaticFiles(directory=EXAMPLES))
    with running(Starlette(routes=[files])) as (host, port):
        yield f"http://{host}:{port}"


@needs_browser
def test_the_browser_example_chats_stops_and_continues(
    browser: Browser, start_service: StartService, groq: FakeGroq, origin: str
) -> None:
    groq.on("long", Script(["Once", " upon", " a"], hold_before_token=2))
    service = start_service(ALLOWED_ORIGINS=origin)
    page = browser.new_page()
    page.goto(f"{origin}/browser.html?url={service.url}")
    log = page.get_by_role("log")

    def ask(text: str) -> None:
        page.get_by_label("Message").fill(text)
        page.get_by_label("Message").press("Enter")

    ask("long")
    expect(log).to_contain_text("You: long Once upon")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    ask("again")
    expect(log).to_contain_text("You: again You said: again")
    assert groq.asked("again")[0].contents == ["long", "Once upon", "again"]
    groq.on("cut", Script(["Once", " more"], hold_before_token=1))
    ask("cut")
    expect(log).to_contain_text("You: cut Once")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    service.process.kill()
    expect(log).to_contain_text("error: the connection broke before the reply's end")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
