"""The examples run unchanged, where their tool is installed."""

import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import browser, needs_browser
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import ROOT, Process, Service, free_port

__all__ = ["browser"]
EXAMPLES = ROOT / "examples"
# Text that a careless parser of event streams loses.
TOKENS = ["Two", " lines:\n", "\n- one\u2028\n", "  - two: é", "[DONE]", " data: x"]
COMMANDS = {
    "python": [sys.executable, "ask.py"],
    "terminal": [sys.executable, "terminal.py"],
    "node": ["node", "ask.mjs"],
    "go": ["go", "run", "ask.go"],
    "java": ["java", "Ask.java"],  # its client offers an upgrade to h2c
}


def test_every_example_is_listed_and_has_fewer_than_forty_lines() -> None:
    for path in EXAMPLES.glob("*.[!m]*"):
        assert f"| [{path.name}]" in (EXAMPLES / "README.md").read_text()
        assert path.read_text().count("\n") < 40, path.name


def run(*line: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which(line[0]) is None:
        pytest.skip(f"{line[0]} is not installed")
    settings: dict[str, Any] = {"cwd": EXAMPLES, "capture_output": True, "encoding": "utf-8"}
    settings["env"] = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(line, input=typed, timeout=50, check=False, **settings)  # Go compiles


@pytest.mark.parametrize("language", COMMANDS)
def test_an_example_prints_the_exact_reply_and_any_error(
    service: Service, groq: FakeGroq, language: str
) -> None:
    groq.on("question", Script(TOKENS, finish_reason="length"))
    ended = run(*COMMANDS[language], service.url, "question", typed="question\n")
    assert re.search(re.escape("".join(TOKENS)) + r"\W+truncated\W.*length", ended.stdout)
    assert (ended.returncode, ended.stderr) == (0, "")
    for script in (Script(status=500), Script(["a", "b"], error_before_token=1)):
        groq.on("question", script)
        ended = run(*COMMANDS[language], service.url, "question", typed="question\n")
        assert re.search(r"error\W+the language model ", ended.stdout + ended.stderr), script
        assert ended.returncode == (language != "terminal")


def test_the_curl_example_shows_the_whole_api_of_the_demo() -> None:
    port = free_port()
    demo = Process([sys.executable, "-m", "tests.demo"], {"PORT": port})
    demo.wait_for_line(lambda line: line.startswith("Press Ctrl-C"))
    ended = run("sh", "curl.sh", f"http://127.0.0.1:{port}")
    demo.end()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert '{"response":"You said: Hello!"}' in ended.stdout
    assert "data:  again!\n\ndata: [DONE]\n" in ended.stdout
    assert '{"role":"assistant","content":"You said: And again!"}]}' in ended.stdout


@needs_browser
def test_the_browser_example_chats_stops_and_continues(
    browser: Browser, start_service: StartService, groq: FakeGroq
) -> None:
    groq.on("long", Script(["Once", " upon", " a"], hold_before_token=2))
    service = start_service(ALLOWED_ORIGINS="*")
    page = browser.new_page()
    page.goto(f"file://{EXAMPLES}/browser.html?url={service.url}")
    log, message = page.get_by_role("log"), page.get_by_label("Message")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    message.fill("long")
    message.press("Enter")
    expect(log).to_contain_text("You: long Once upon")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    message.fill("again")
    message.press("Enter")
    expect(log).to_contain_text("You: again You said: again")
    assert groq.asked("again")[0].contents == ["long", "Once upon", "again"]
    service.process.kill()
    expect(log).to_contain_text("error: the connection broke")
