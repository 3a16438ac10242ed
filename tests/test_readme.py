"""The README is short and correct: its exchanges, scripts, settings, figures and sketch."""

import json
import re
import subprocess
import sys

import pytest

from chat.config import Settings, load_settings
from tests.servers import PATIENCE, ROOT, Service
from tests.test_docs import DEFAULTS, blocks, replay_console, settings_in

README = (ROOT / "README.md").read_text()
OUTPUT, SKETCH = re.findall(r"```text\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_names_the_commands_that_ci_runs_and_every_folder_of_the_code() -> None:
    assert 120 <= README.count("\n") <= 160
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make (\w+)", README, re.M))
    assert {"demo", "test"} <= named <= set(re.findall(r"^(\w+):", makefile, re.M))
    assert "\nmake test" in (ROOT / ".ci/run").read_text()
    folders = {f"chat/{path.parent.name}/" for path in ROOT.glob("chat/*/__init__.py")}
    shown = re.findall(r"^server\.py|chat/\w+(?:/|\.py)", SKETCH, re.M)
    assert set(shown) == folders | {"server.py", "chat/service.py", "chat/replies.py"}


def test_its_exchanges_and_scripts_are_as_shown(service: Service) -> None:
    for _, _, text in blocks(README):
        replay_console(text, service)
    translated, script = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    translation = translated.splitlines()[-1]  # the line above it is for OpenAI's client
    given = "import httpx; messages = [{'role': 'user', 'content': 'Hello!'}]"
    for code, output in (
        (f"{given}; print({translation})", "You said: Hello!\n"),
        (script, OUTPUT),
    ):
        line = [sys.executable, "-c", code.replace("localhost:8000", service.url[7:])]
        printed = subprocess.check_output(line, timeout=PATIENCE)
        assert printed.decode() == output


def test_its_dozen_settings_are_those_of_the_example_file_with_their_defaults() -> None:
    file, rows = ROOT / ".env.example", settings_in(README)
    assert rows.items() <= DEFAULTS.items()
    assert set(re.findall(r"^([A-Z_]+)=", file.read_text(), re.M)) == rows.keys()
    given = {"GROQ_API_KEY": "key"}
    assert load_settings(given, file) == Settings(groq_api_key="key", redis_addr="")


def test_its_figures_are_about_those_of_the_benchmark() -> None:
    figures = json.loads((ROOT / "bench/results.json").read_text())["figures"]
    ours = {name: figures[name]["service"] for name in ("idle", "paced", "first token", "json")}
    idle, paced, first, many = (next(iter(figures.values())) for figures in ours.values())
    first -= figures["first token"]["direct"]["median_ms"]
    shown = re.findall(r"^\| [\w ]+ \| ([\d.,]+) ", README, re.M)[1:]
    numbers = [float(figure.replace(",", "")) for figure in shown]
    assert numbers == pytest.approx([idle, paced, first, many], rel=0.2)
