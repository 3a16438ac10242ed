"""The service in front of the real Groq; only where GROQ_API_KEY is set."""

import json
import os
from collections.abc import Iterator

import pytest

from tests.servers import Service, body

KEY = os.environ.get("GROQ_API_KEY")
pytestmark = pytest.mark.skipif(not KEY, reason="GROQ_API_KEY is not set")


@pytest.fixture(scope="module")
def real() -> Iterator[Service]:
    with Service(GROQ_API_KEY=KEY, MAX_TOKENS=500) as service:
        yield service


def test_groq_replies_as_json_and_counts(real: Service, conversation: str) -> None:
    assert "pong" in real.reply("Reply with the single word: pong", conversation).lower()
    assert real.metric("chat_tokens_total", direction="prompt") > 10


def test_groq_replies_as_a_stream_of_several_tokens(real: Service, conversation: str) -> None:
    tokens = real.tokens("Count from one to ten in words.", conversation)
    assert len(tokens) > 5
    assert "ten" in "".join(tokens).lower()


def test_groq_replies_over_a_websocket_and_remembers(real: Service, conversation: str) -> None:
    real.reply("My name is Ada.", conversation)
    with real.socket() as socket:
        socket.send(json.dumps(body("What is my name? One word.", conversation)))
        text = ""
        while "token" in (message := json.loads(socket.recv(30))):
            text += message["token"]
    assert message == {"done": "true"}
    assert "Ada" in text
