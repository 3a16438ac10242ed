"""The documents are correct: their exchanges are replayed, and whatever they name exists."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pkgutil import resolve_name

import msgspec
import pytest

import server
from chat.config import Settings
from chat.errors import ChatError
from tests.fake_groq import FakeGroq, Script
from tests.servers import PATIENCE, ROOT, Service, closing_code, free_port
from tests.test_errors import classes
from tests.test_monitoring import ALERTS

API = (ROOT / "docs/api.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()


@dataclass
class Situation:
    """What the first line of a block says about the service and Groq."""

    script: Script = field(default_factory=Script)
    settings: dict[str, object] = field(default_factory=dict)  # those that it does not name itself
    before: Callable[[Service, FakeGroq], AbstractContextManager[object]] | None = None
    is_lasting: bool = False  # whether the service stays changed by it


@contextmanager
def running_reply(service: Service, groq: FakeGroq) -> Iterator[None]:
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        yield
        groq.release()
        list(events)


@contextmanager
def ending(service: Service, groq: FakeGroq) -> Iterator[None]:
    with running_reply(service, groq):
        service.process.send_signal(signal.SIGTERM)
        service.log_line(message="draining: traffic should go elsewhere")
        yield


@contextmanager
def after_a_chat(service: Service, groq: FakeGroq) -> Iterator[None]:
    service.chat("anything")
    yield


NOTHING_LEFT = (("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1h"))
LIMITED = Script(status=429, headers=(("retry-after", "30"),))
ONLY_REASONING = Script([], reasoning=["hm"], finish_reason="length")
PAUSE = Script(["Once", " upon", " a"], hold_before_token=2)
NOWHERE = f"127.0.0.1:{free_port()}"

SITUATIONS = {
    "Groq sends a token with a newline": Situation(Script(["- one\n- two"])),
    "Groq fails after two tokens": Situation(Script(["You", " said"], error_before_token=2)),
    "Groq pauses after two tokens": Situation(PAUSE),
    "The reply reaches MAX_TOKENS": Situation(Script(["Once", " upon"], finish_reason="length")),
    **dict.fromkeys(
        ("", "RATE_LIMIT=1/hour", "CONTEXT_TOKENS=1030", "BODY_TIMEOUT=1", "MAX_BODY_BYTES=50"),
        Situation(),
    ),
    "MAX_CONCURRENT_PER_CLIENT=1, and a reply is in progress": Situation(before=running_reply),
    "MAX_CONCURRENT=1, and a reply is in progress": Situation(before=running_reply),
    "This replica is shutting down": Situation(before=ending),
    "HISTORY_STORE=redis, and Redis is unreachable": Situation(settings={"REDIS_ADDR": NOWHERE}),
    "Groq responds with status 500": Situation(Script(status=500)),
    "Groq responds with status 429": Situation(LIMITED, is_lasting=True),
    "Groq rejects the key": Situation(Script(status=401)),
    "Groq is unreachable": Situation(settings={"GROQ_BASE_URL": f"http://{NOWHERE}"}),
    "Groq hangs up in a reply": Situation(Script(["You", " said"], cut_before_token=2)),
    "Groq sends garbage": Situation(Script(body=b"<html>")),
    "Groq sends an empty reply": Situation(Script([])),
    "The model's reasoning uses up MAX_TOKENS": Situation(ONLY_REASONING),
    "The circuit breaker is open": Situation(
        Script(status=500), {"GROQ_CIRCUIT_FAILURES": 1}, after_a_chat
    ),
    "Groq's quota is exhausted": Situation(Script(headers=NOTHING_LEFT), {}, after_a_chat),
    "Groq is silent": Situation(Script(hold_before_status=True), {"GROQ_TIMEOUT": 0.3}),
}


def test_every_route_is_in_the_table_of_the_api_and_every_situation_is_shown() -> None:
    table = API.partition("\n## ")[0]
    listed = set(re.findall(r"`(?:[A-Z]+ )?(/[^`]*)`", table.partition("| | |")[2]))
    assert listed == {route.path_format for route in server.ROUTES}
    assert {situation for _, situation, _ in blocks(API)} == SITUATIONS.keys()


def test_every_setting_is_in_one_table_with_its_default() -> None:
    assert settings_in(section("Settings")) == DEFAULTS
    assert set(re.findall(r"^([A-Z_]+)=", OPERATIONS, re.M)) <= DEFAULTS.keys()  # lines to copy


def settings_in(document: str) -> dict[str, str]:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]+)`? \|", document, re.M)
    return {name: default.strip() for name, default in rows}


def shown(default: object) -> str:
    if default in ("", msgspec.NODEFAULT):
        return "required" if default else "empty"
    return (f"{default:.10g}" if isinstance(default, float) else str(default)).lower()


DEFAULTS = {field.name.upper(): shown(field.default) for field in msgspec.structs.fields(Settings)}


def test_operations_describes_every_metric_and_alert(service: Service) -> None:
    metrics = re.findall(r"^# TYPE (\w+)", service.http.get("/metrics").text, re.M)
    ours = {name for name in metrics if not name.startswith(("python_", "process_"))}
    table, _, _ = section("Reading the metrics").partition("| `reason` |")
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == ours
    alerts = dict(re.findall(r"^### (\w+)\n\n(\w+)\.", section("The alerts"), re.M))
    expected = {rule["alert"]: rule["labels"]["severity"] for rule in ALERTS}
    assert {name: severity.lower() for name, severity in alerts.items()} == expected


def test_operations_describes_every_reason_with_its_statuses(service: Service) -> None:
    rows = re.findall(r"^\| (`[a-z_`, ]+) \| ([\d, ]+) \|", OPERATIONS, re.M)
    described = {name: shown for names, shown in rows for name in re.findall(r"\w+", names)}
    metrics = service.http.get("/metrics").text
    assert set(described) == set(re.findall(r'chat_errors_total\{reason="(\w+)"\}', metrics))
    for error in classes(ChatError):
        if "reason" in vars(error):
            assert str(error.status) in described.get(error.reason, str(error.status)), error


def section(heading: str) -> str:
    return OPERATIONS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_example_log_line_has_the_fields_of_a_real_one(service: Service) -> None:
    service.tokens("Hello!")
    (shown,) = re.findall(r"^```json\n(.*)\n```$", OPERATIONS, re.M)
    assert list(json.loads(shown)) == list(service.log_line(endpoint="/chat", method="POST"))


def test_every_file_link_and_import_in_the_documents_has_a_target() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("deploy/*/*.md")):
        text = document.read_text()
        for name in re.findall(r"`((?:chat|tests|bench|deploy|docs)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), (document.name, name)
        for name in re.findall(r"\bchat\.[\w.]+:\w+", text):
            assert resolve_name(name), (document.name, name)
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), (document.name, link)
            assert not anchor or anchor in anchors(target.read_text()), (document.name, link)


def anchors(document: str) -> set[str]:
    """Return the anchors that GitHub creates for the headings."""
    headings = re.findall(r"^#+ (.+)$", document, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(document: str) -> Iterator[tuple[str, str, str]]:
    """Yield the kind, the situation and the text of each block with an exchange."""
    for kind, text in re.findall(r"^```(console|websocket)\n(.*?)^```$", document, re.M | re.S):
        first, _, rest = text.partition("\n")
        yield (kind, first[2:], rest) if first.startswith("# ") else (kind, "", text)


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_exchanges_are_as_shown(groq: FakeGroq, service: Service, name: str) -> None:
    situation = SITUATIONS[name]
    groq.default = situation.script
    settings = situation.settings | dict(re.findall(r"([A-Z_]+)=([\w/]+)", name))
    with ExitStack() as stack:
        if settings or situation.before or situation.is_lasting:
            service = stack.enter_context(Service(**{"GROQ_BASE_URL": groq.url, **settings}))
        if situation.before:
            stack.enter_context(situation.before(service, groq))
        for kind, named, text in blocks(API):
            if named == name:
                REPLAYS[kind](text, service)


def replay_console(text: str, service: Service) -> None:
    for exchange in text.removeprefix("$ ").split("\n$ "):
        command, _, shown = exchange.partition("\n")
        line = shlex.split(command.replace("localhost:8000", f"127.0.0.1:{service.port}"))
        assert line[0] == "curl"
        got = subprocess.check_output(line, timeout=PATIENCE, stderr=subprocess.DEVNULL)
        shown_head, shown_body = head_and_body(shown)
        got_head, got_body = head_and_body(got.decode().replace("\r\n", "\n"))
        assert set(shown_head) <= set(got_head), got
        assert got_body == shown_body


def head_and_body(text: str) -> tuple[list[str], str]:
    """Return the status, the headers and the body, without what varies."""
    if not text.startswith("HTTP/"):
        return [], text.strip()
    text = re.sub(r"(HTTP/1.1 \d+) .*", r"\1", text)  # the name depends on Python
    text = re.sub(r"\b35\d\d\b", "3600", text)  # an hour counts down
    head, _, body = text.strip().partition("\n\n")
    return head.split("\n"), body.strip()


def replay_websocket(text: str, service: Service) -> None:
    with service.socket() as socket:
        for line in text.splitlines():
            direction, _, shown = line.partition(" ")
            if direction == ">":
                socket.send(b"" if shown == "binary" else shown)
            elif direction == "<":
                assert socket.recv(PATIENCE) == shown
            else:
                assert line == f"closed with {closing_code(socket)}"


REPLAYS = {"console": replay_console, "websocket": replay_websocket}
