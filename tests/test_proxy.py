"""The configurations of docs/proxy.md: real proxies in front of two real replicas."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

from chat.config import Settings
from tests.fake_groq import FakeGroq, Script
from tests.servers import PATIENCE, ROOT, Caller, Process, Service, body, free_port, wait_until
from tests.test_cancellation import ask

DOCUMENT = (ROOT / "docs/proxy.md").read_text()
DRAIN_DELAY = re.findall(r"`DRAIN_DELAY=(\d)`", DOCUMENT)[0]
SETTINGS = Settings(groq_api_key="key")
COMMANDS = {"nginx": ["-e", "stderr", "-g", "daemon off;", "-c"], "haproxy": ["-db", "-f"]}
TRANSPORTS = ("json", "sse", "websocket")
RESTARTING = "the service is restarting; try again in a moment"


def configuration(proxy: str) -> str:
    """Return the complete file that the document shows."""
    (text,) = re.findall(rf"^```{proxy}\n(.*?)^```$", DOCUMENT, re.M | re.S)
    return str(text)


def seconds(text: str, name: str) -> float:
    ((count, unit),) = re.findall(rf"\b{name}[ =](\d+)(ms|)", text)
    return float(count) / (1000 if unit else 1)


@pytest.fixture(scope="module")
def replicas(module_groq: FakeGroq) -> Iterator[list[Service]]:
    settings = {"GROQ_BASE_URL": module_groq.url, "TRUSTED_PROXIES": "127.0.0.1"}
    settings |= {"DRAIN_DELAY": DRAIN_DELAY, "KEEP_ALIVE_INTERVAL": "3600"}
    with ExitStack() as stack:
        yield [stack.enter_context(Service(**settings)) for _ in range(2)]


@pytest.fixture(scope="module", params=COMMANDS)
def proxy(
    request: pytest.FixtureRequest,
    replicas: list[Service],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Caller]:
    """A proxy with the documented file, whose addresses and directories are replaced."""
    name, front, folder = request.param, Caller(free_port()), tmp_path_factory.mktemp("proxy")
    executable = shutil.which(name) or f"/usr/sbin/{name}"
    if not Path(executable).exists():
        pytest.skip(f"{name} is not installed")
    kinds = ("client_body", "fastcgi", "proxy", "scgi", "uwsgi")
    text = configuration(name)
    for documented, here in {
        "listen 80;": f"listen 127.0.0.1:{front.port};",
        "bind :80 ": f"bind 127.0.0.1:{front.port} ",
        "127.0.0.1:8000": f"127.0.0.1:{replicas[0].port}",
        "127.0.0.1:8001": f"127.0.0.1:{replicas[1].port}",
        "/run/nginx.pid": f"{folder}/pid",
        "http {": " ".join(["http {", *(f"{kind}_temp_path {folder};" for kind in kinds)]),
    }.items():
        text = text.replace(documented, here)
    (folder / "configuration").write_text(text)
    with ExitStack() as stack:
        command = [executable, *COMMANDS[name], str(folder / "configuration")]
        stack.callback(Process(command).end)
        stack.enter_context(front.http)
        wait_until(front.is_up)
        yield front


def tokens_of(proxy: Caller, transport: str, content: str, stack: ExitStack) -> Iterator[str]:
    """Ask, and yield each token as it arrives."""
    if transport == "sse":
        _, events = stack.enter_context(proxy.stream(content))
        yield from (event.data for event in events)
    elif transport == "websocket":
        websocket = stack.enter_context(proxy.socket())
        websocket.send(json.dumps(body(content)))
        while "token" in (message := json.loads(websocket.recv(PATIENCE))):
            yield message["token"]
        yield message.get("error", "[DONE]")
    else:
        yield from (proxy.reply(content), "[DONE]")


@pytest.mark.parametrize("transport", ["sse", "websocket"])
def test_each_token_arrives_before_groq_sends_the_next(
    proxy: Caller, groq: FakeGroq, transport: str
) -> None:
    tokens = ["a", " b", "c", "\n", "d"]
    for gap in range(1, len(tokens)):
        groq.reset()
        groq.on("slow", Script(tokens, hold_before_token=gap))
        with ExitStack() as stack:
            received = tokens_of(proxy, transport, "slow", stack)
            assert [next(received) for _ in range(gap)] == tokens[:gap]
            groq.release()
            assert list(received) == [*tokens[gap:], "[DONE]"]


@pytest.mark.parametrize("transport", [*TRANSPORTS, "websocket, cut"])
@pytest.mark.parametrize("held", [None, 0, 1], ids=["no status", "no token", "mid-stream"])
def test_groqs_connection_is_closed_when_the_client_leaves_while_groq_is_silent(
    proxy: Caller, groq: FakeGroq, conversation: str, transport: str, held: int | None
) -> None:
    groq.on("silent", Script(hold_before_status=held is None, hold_before_token=held))
    with ExitStack() as stack:
        leave = ask(transport, proxy, "silent", conversation, stack)
        request = groq.wait_for_request("silent")
        leave()
        assert request.closed.wait(5), "long before an event stream begins of itself"
    assert not request.answered


def test_chats_reuse_idle_connections(proxy: Caller, replicas: list[Service]) -> None:
    ports = [replica.port for replica in replicas]
    own = {each.laddr for each in psutil.Process().net_connections("tcp")}

    def idle() -> set[Any]:
        found = [psutil.Process(each.process.pid).net_connections("tcp") for each in replicas]
        used = [each for each in chain(*found) if each.status == "ESTABLISHED"]
        return {each.raddr for each in used if each.laddr.port in ports} - own

    def ten_chats_open_none() -> bool:
        before = idle()
        assert [proxy.reply("short") for _ in range(10)] == ["You said: short"] * 10
        return bool(before) and idle() <= before

    wait_until(ten_chats_open_none)  # at times, haproxy closes one, or has its check in between


def test_the_time_limits_fit_those_of_the_service() -> None:
    nginx, haproxy = configuration("nginx"), configuration("haproxy")
    for text, name in ((nginx, "keepalive_timeout"), (haproxy, "pool-purge-delay")):
        assert seconds(text, name) < SETTINGS.keep_alive_timeout
    names = ("timeout client", "timeout server")
    patience = [seconds(nginx, "proxy_read_timeout"), *(seconds(haproxy, name) for name in names)]
    assert min(patience) > max(SETTINGS.reply_timeout, SETTINGS.keep_alive_interval)
    assert seconds(haproxy, "inter") < float(DRAIN_DELAY)


def test_the_client_and_the_host_are_those_that_the_proxy_saw(
    proxy: Caller, replicas: list[Service]
) -> None:
    headers = {"origin": proxy.url, "x-forwarded-for": "203.0.113.7", "x-request-id": proxy.url}
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(transport=transport, base_url=proxy.url, headers=headers) as client:
        assert [client.post("/chat", json=body("short")).status_code for _ in range(2)] == [200] * 2
    for replica in replicas:
        assert replica.log_line(request_id=proxy.url)["client"] == "127.0.0.2"


def test_a_rolling_restart_fails_no_chat(
    proxy: Caller, groq: FakeGroq, replicas: list[Service]
) -> None:
    groq.default = Script(interval=0.02)
    end = Event()

    def chat(transport: str) -> set[str]:
        received = set()
        while not end.is_set():
            with ExitStack() as stack:
                received.add("".join(tokens_of(proxy, transport, "short", stack)))
        return received

    with ThreadPoolExecutor(12) as pool:
        callers = [pool.submit(chat, transport) for transport in TRANSPORTS * 4]
        try:
            for replica in replicas:
                assert replica.process.end() == 0
                replica.start()
                # Traffic is back long before nginx's default `fail_timeout`.
                replica.process.wait_for_line(lambda line: "POST /chat 200" in line, timeout=5)
        finally:
            end.set()
    whole = {"You said: short[DONE]"}
    for transport, caller in zip(TRANSPORTS * 4, callers, strict=True):
        # A message on a WebSocket that was opened just before the drain is refused as a whole.
        assert caller.result() - ({RESTARTING} if transport == "websocket" else set()) == whole
