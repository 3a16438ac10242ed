"""What the tests stand on: real processes, real sockets, a real Redis server; all their own."""

from collections.abc import Iterator
from typing import Protocol
from uuid import uuid4

import pytest
from hypothesis import settings

from tests.fake_groq import FakeGroq
from tests.servers import RedisServer, Service

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")


class StartService(Protocol):
    """Starts a service with some settings; it is ended with the test."""

    def __call__(self, **settings: object) -> Service: ...


@pytest.fixture(scope="module")
def module_groq() -> Iterator[FakeGroq]:
    with FakeGroq() as groq:
        yield groq


@pytest.fixture
def groq(module_groq: FakeGroq) -> FakeGroq:
    """A stand-in for Groq, with no scripts and no memory of other tests."""
    module_groq.reset()
    return module_groq


@pytest.fixture(scope="module")
def service(module_groq: FakeGroq) -> Iterator[Service]:
    """A service with the default settings, without Redis; one for all tests of a module."""
    with Service(GROQ_BASE_URL=module_groq.url) as running:
        yield running


@pytest.fixture
def start_service(groq: FakeGroq) -> Iterator[StartService]:
    """Starts a service of the test's own."""
    started: list[Service] = []

    def start(**settings: object) -> Service:
        settings = {"GROQ_BASE_URL": groq.url, **settings}
        one = Service(**settings)
        started.append(one.__enter__())
        return one

    yield start
    for each in started:
        each.__exit__(None, None, None)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis server of the test's own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def conversation() -> str:
    """The id of a conversation that nobody else has."""
    return uuid4().hex
