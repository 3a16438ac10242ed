"""The fixtures of all tests: real processes, real sockets and a real Redis server of their own."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import uuid4

import pytest
from hypothesis import settings

from tests.fake_groq import FakeGroq
from tests.servers import RedisServer, Service

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")

only_with_coverage = pytest.mark.skipif(
    os.environ.get("COVERAGE") != "1", reason="takes long; runs with COVERAGE=1"
)
StartService = Callable[..., Service]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests."""
    return "asyncio"


@pytest.fixture(scope="module")
def module_groq() -> Iterator[FakeGroq]:
    with FakeGroq() as groq:
        yield groq


@pytest.fixture
def groq(module_groq: FakeGroq) -> FakeGroq:
    """A stand-in for Groq without scripts or requests of other tests."""
    module_groq.reset()
    return module_groq


@pytest.fixture(scope="module")
def service(module_groq: FakeGroq) -> Iterator[Service]:
    """A service with the default settings and without Redis, shared by the tests of a module."""
    with Service(GROQ_BASE_URL=module_groq.url) as running:
        yield running


@pytest.fixture
def start_service(groq: FakeGroq) -> Iterator[StartService]:
    """Start services with the given settings, for this test alone."""
    with ExitStack() as stack:

        def start(**settings: object) -> Service:
            settings = {"GROQ_BASE_URL": groq.url, **settings}
            return stack.enter_context(Service(**settings))

        yield start


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis server for this test alone."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def conversation() -> str:
    """The id of a new conversation."""
    return uuid4().hex
