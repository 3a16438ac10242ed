"""How many connections a client may have."""

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from chat.config import networks
from chat.errors import TooManyConnections
from chat.places import Places
from tests.conftest import StartService
from tests.servers import PATIENCE, Service, error_and_code, wait_until
from tests.test_connection import upgrade


def test_a_place_is_a_clients_own_and_free_again_when_it_is_left() -> None:
    places = Places(1, TooManyConnections)
    for _ in range(2):
        with places.taken_by("198.51.100.7"), places.taken_by("198.51.100.8"):
            pass


@pytest.mark.parametrize("other", ["2001:db8::2", "2001:db8::ffff:1"])
def test_an_ipv6_client_is_its_network(other: str) -> None:
    places = Places(1, TooManyConnections)
    with (
        places.taken_by("2001:db8::1"),
        pytest.raises(TooManyConnections, match="may have 1;"),
        places.taken_by(other),
    ):
        pass


def test_a_proxy_has_as_many_as_it_needs() -> None:
    places = Places(1, TooManyConnections, networks("10.0.0.0/8"))
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(places.taken_by("10.0.0.1"))


@contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        yield connection


def is_served(connection: socket.socket) -> bool:
    answer = b""
    with suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        while not answer.endswith(b"OK") and (piece := connection.recv(4096)):
            answer += piece
    return answer.startswith(b"HTTP/1.1 200 ")


def has_room(service: Service) -> bool:
    with connected(service) as connection:
        return is_served(connection)


def test_a_connection_beyond_the_limit_is_closed_at_once(start_service: StartService) -> None:
    service = start_service(MAX_CONNECTIONS_PER_CLIENT=3)
    service.http.close()
    with connected(service) as first, connected(service) as second, connected(service) as third:
        assert all(map(is_served, (first, second, third)))
        upgrade(first)
        assert not has_room(service), "an upgrade has given up its place"
        assert is_served(second)
        first.close()
        wait_until(lambda: has_room(service))
        third.close()
        wait_until(lambda: has_room(service))
    wait_until(lambda: has_room(service))
    figures = httpx.get(f"{service.url}/metrics").text
    assert re.search(r'^chat_errors_total{reason="too_many"} [1-9]', figures, re.MULTILINE)


def test_websockets_are_limited_by_the_client_that_a_trusted_proxy_reports(
    start_service: StartService,
) -> None:
    service = start_service(MAX_CONNECTIONS_PER_CLIENT=1, TRUSTED_PROXIES="127.0.0.1")

    def socket_of(client: str) -> ClientConnection:
        return service.socket(additional_headers={"x-forwarded-for": client})

    def may_ask(client: str) -> bool:
        with socket_of(client) as one, suppress(ConnectionClosed):
            one.send("{}")
            return "messages must not be empty" in str(one.recv(PATIENCE))
        return False

    with socket_of("198.51.100.7"):
        with socket_of("198.51.100.7") as second:
            error, code = error_and_code(second)
        assert error == (
            "too many connections at once for one client, which may have 1; close one first"
        )
        assert code == 1013
        assert service.log_line(error="too_many")["client"] == "198.51.100.7"
        assert may_ask("198.51.100.8")
    wait_until(lambda: may_ask("198.51.100.7"))
