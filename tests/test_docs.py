"""What the documents show is true: their exchanges are replayed, what they name exists."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields

import pytest

from chat.config import Settings
from chat.errors import ChatError, reasons
from tests.fake_groq import FakeGroq, Script
from tests.servers import PATIENCE, ROOT, Service, closing_code, free_port
from tests.test_monitoring import ALERTS

API = (ROOT / "docs/api.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
README = (ROOT / "README.md").read_text()
HELLO = "Hello!"


@dataclass
class Situation:
    """What a block's first line says of the service and of Groq."""

    settings: dict[str, object] = field(default_factory=dict)
    script: Script = field(default_factory=Script)
    before: Callable[[Service, FakeGroq], AbstractContextManager[object]] = lambda service, groq: (
        nullcontext()
    )
    """Brings it about; ended after the block."""


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
        service.log_line(message="draining: no more traffic should come here")
        yield


@contextmanager
def probed(service: Service, groq: FakeGroq) -> Iterator[None]:
    """Groq fails, and is left alone while a probe runs."""
    groq.on("held", Script(hold_before_status=True))
    service.chat("anything")

    def probe() -> None:
        while not groq.asked("held"):
            service.chat("held")

    with ThreadPoolExecutor() as pool:
        probing = pool.submit(probe)
        groq.wait_for_request("held")
        yield
        groq.release()
        probing.result()


def after_a_chat(service: Service, groq: FakeGroq) -> AbstractContextManager[object]:
    service.chat("anything")
    return nullcontext()


NOTHING_LEFT = (("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "1h"))
PAUSE = Script(["Once", " upon", " a"], hold_before_token=2)

SITUATIONS = {
    "": Situation(),
    "Groq sends a token with a newline": Situation(script=Script(["- one\n- two"])),
    "Groq fails after two tokens": Situation(script=Script(["You", " said"], error_before_token=2)),
    "Groq pauses after two tokens": Situation(script=PAUSE),
    "RATE_LIMIT=1/hour": Situation({"RATE_LIMIT": "1/hour"}),
    "CONTEXT_TOKENS=1030": Situation({"CONTEXT_TOKENS": 1030}),
    "BODY_TIMEOUT=1": Situation({"BODY_TIMEOUT": 1}),
    "MAX_BODY_BYTES=50": Situation({"MAX_BODY_BYTES": 50}),
    "MAX_CONCURRENT_PER_CLIENT=1, and a reply runs": Situation(
        {"MAX_CONCURRENT_PER_CLIENT": 1}, before=running_reply
    ),
    "MAX_CONCURRENT=1, and a reply runs": Situation({"MAX_CONCURRENT": 1}, before=running_reply),
    "This replica ends": Situation(before=ending),
    "HISTORY_STORE=redis, and Redis is not there": Situation(
        {"HISTORY_STORE": "redis", "REDIS_ADDR": f"127.0.0.1:{free_port()}"}
    ),
    "Groq answers with status 500": Situation(script=Script(status=500)),
    "Groq answers with status 429": Situation(
        script=Script(status=429, headers=(("retry-after", "30"),))
    ),
    "Groq refuses the key": Situation(script=Script(status=401)),
    "Groq is not there": Situation({"GROQ_BASE_URL": f"http://127.0.0.1:{free_port()}/v1"}),
    "Groq hangs up in its reply": Situation(script=Script(["You", " said"], cut_before_token=2)),
    "Groq sends nonsense": Situation(script=Script(body=b"<html>")),
    "Groq sends an empty reply": Situation(script=Script([])),
    "The model thinks up all of MAX_TOKENS": Situation(
        script=Script([], reasoning=["hm"], finish_reason="length")
    ),
    "Groq failed so often that it is left alone": Situation(
        {"GROQ_CIRCUIT_FAILURES": 1}, Script(status=500), probed
    ),
    "Groq's quota is used up": Situation(script=Script(headers=NOTHING_LEFT), before=after_a_chat),
    "Groq is silent": Situation({"GROQ_TIMEOUT": 0.3}, Script(hold_before_status=True)),
}


def test_operations_tells_of_every_setting_metric_reason_and_alert(service: Service) -> None:
    words = set(re.findall(r"\w+", OPERATIONS))
    assert {each.name.upper() for each in fields(Settings)} <= words
    metrics = re.findall(r"^# TYPE (\w+)", service.http.get("/metrics").text, re.M)
    ours = {name for name in metrics if not name.startswith(("python_", "process_"))}
    table, _, _ = section("Reading the metrics").partition("| `reason` |")
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == ours
    alerts = dict(re.findall(r"^### (\w+)\n\n(\w+)\.", section("The alerts"), re.M))
    expected = {rule["alert"]: rule["labels"]["severity"] for rule in ALERTS}
    assert {name: severity.lower() for name, severity in alerts.items()} == expected


def test_operations_tells_of_every_reason_with_its_status() -> None:
    told = set[tuple[str, str]]()
    for row in re.findall(r"^\| (`[a-z_`, ]+) \| ([\d, ]+) \|", OPERATIONS, re.M):
        told |= {(reason, row[1]) for reason in re.findall(r"\w+", row[0])}
    assert {reason for reason, _ in told} == reasons()
    statuses = {each.reason: each.status for each in descendants(ChatError)}
    for reason, shown in told:
        assert str(statuses[reason]) in shown, reason


def descendants(root: type[ChatError]) -> Iterator[type[ChatError]]:
    for each in root.__subclasses__():
        yield each
        yield from descendants(each)


def section(heading: str) -> str:
    return OPERATIONS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_log_line_has_the_fields_that_a_real_one_has(service: Service) -> None:
    service.tokens(HELLO)
    (shown,) = re.findall(r"^```json\n(.*)\n```$", OPERATIONS, re.M)
    assert list(json.loads(shown)) == list(service.log_line(endpoint="/chat"))


DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("*/README.md"),
    *ROOT.glob("deploy/*/README.md"),
]


def test_every_file_that_the_documents_name_exists() -> None:
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:chat|tests|bench|deploy|docs)/[\w./-]+)`", document.read_text()
        ):
            assert (ROOT / name).exists(), (document.name, name)


def test_every_link_between_the_documents_leads_somewhere() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            path, _, anchor = link.partition("#")
            if "://" in path:
                continue
            target = document if not path else document.parent / path
            assert target.exists(), (document.name, link)
            assert not anchor or anchor in anchors(target.read_text()), (document.name, link)


def anchors(document: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", document, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(document: str) -> Iterator[tuple[str, str, str]]:
    """Yield the kind of each block with an exchange, the situation that it names, and its text."""
    for kind, text in re.findall(r"^```(console|websocket)\n(.*?)^```$", document, re.M | re.S):
        first, _, rest = text.partition("\n")
        yield (kind, first[2:], rest) if first.startswith("# ") else (kind, "", text)


def named(document: str) -> set[str]:
    return {situation for _, situation, _ in blocks(document)}


def test_every_situation_is_shown() -> None:
    assert named(API) | named(README) == SITUATIONS.keys()


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_exchanges_are_as_shown(groq: FakeGroq, name: str) -> None:
    situation = SITUATIONS[name]
    groq.default = situation.script
    settings = {"GROQ_BASE_URL": groq.url, **situation.settings}
    try:
        with Service(**settings) as service, situation.before(service, groq):
            for kind, named, text in [*blocks(README), *blocks(API)]:
                if named == name:
                    replay = replay_console if kind == "console" else replay_websocket
                    replay(text, service)
    finally:
        groq.default = Script()


def replay_console(text: str, service: Service) -> None:
    for exchange in text.removeprefix("$ ").split("\n$ "):
        command, _, shown = exchange.partition("\n")
        got = curl(command, service)
        if shown.startswith("HTTP/"):
            assert_as_shown(got, shown)
        else:
            assert got.strip() == shown.strip()


def curl(command: str, service: Service) -> str:
    line = shlex.split(command.replace("localhost:8000", f"127.0.0.1:{service.port}"))
    assert line[0] == "curl"
    ended = subprocess.run(line, capture_output=True, timeout=PATIENCE, check=True)
    return ended.stdout.decode().replace("\r\n", "\n")


def assert_as_shown(got: str, shown: str) -> None:
    """Compare the status, the headers that are shown, and the body."""
    got_head, _, got_body = without_varying(got).strip().partition("\n\n")
    shown_head, _, shown_body = without_varying(shown).strip().partition("\n\n")
    assert set(shown_head.split("\n")) <= set(got_head.split("\n")), got
    assert got_body.strip() == shown_body.strip()


def without_varying(text: str) -> str:
    """Leave out how an hour counts down, and the status's name, which is Python's to choose."""
    text = re.sub(r"(HTTP/1.1 \d+) .*", r"\1", text)
    return re.sub(r"\b35\d\d\b", "3600", text)


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
