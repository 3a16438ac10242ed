"""The README tells what is true: every setting, route and status in it exists, and the reverse."""

import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import server
from chat.config import Settings
from chat.middleware import UNMATCHED
from tests.servers import Service

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]+)`? \|", README, re.MULTILINE))
    expected = {field.name.upper(): shown(field.default) for field in fields(Settings)}
    assert {name: value.strip() for name, value in rows.items()} == expected


def shown(default: object) -> str:
    if default is MISSING:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    if default in (None, (), ""):
        return "empty"
    return f"{default:.10g}" if isinstance(default, float) else str(default)


def test_every_route_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| (?:`[A-Z]+ |WebSocket `)(/[^`]*)` \|", README, re.MULTILINE))
    assert listed == {
        getattr(route, "path", None)
        for route in server.ROUTES
        if getattr(route, "name", None) != UNMATCHED
    }


def test_the_websocket_script_runs(service: Service) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = script.replace("localhost:8000", f"127.0.0.1:{service.port}")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        encoding="utf-8",
        timeout=10,
        check=True,
    )
    text, end = ended.stdout.strip().split("\n")
    assert text == "You said: Hello!"
    assert json.loads(end.replace("'", '"')) == {"done": "true"}
