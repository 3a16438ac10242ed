"""The service in front of the real Groq; only where GROQ_API_KEY is set."""

import json
import os
from collections.abc import Iterator

import pytest

from tests.servers import Service, body

KEY = os.environ.get("GROQ_API_KEY")
pytestmark = pytest.mark.skipif(not KEY, reason="GROQ_API_KEY is not set")
QUESTION = "Reply with the single word: pong"


@pytest.fixture(scope="module")
def real() -> Iterator[Service]:
    with Service(GROQ_API_KEY=KEY, MAX_TOKENS=500) as service:
        yield service


def test_groq_replies_as_json(real: Service, conversation: str) -> None:
    assert "pong" in real.reply(QUESTION, conversation).lower()


def test_groq_replies_as_a_stream_of_several_tokens(real: Service, conversation: str) -> None:
    tokens = real.tokens("Count from one to ten in words.", conversation)
    assert len(tokens) > 5
    assert "ten" in "".join(tokens).lower()


def test_groq_replies_over_a_websocket_and_remembers(real: Service, conversation: str) -> None:
    with real.socket() as socket:
        text = ""
        for question in ("My name is Ada.", "What is my name? One word."):
            socket.send(json.dumps(body(question, conversation)))
            text = ""
            while "token" in (message := json.loads(socket.recv(30))):
                text += message["token"]
            assert message == {"done": "true"}
    assert "Ada" in text


def test_groqs_usage_is_learned(real: Service) -> None:
    real.reply(QUESTION)
    assert real.metric("chat_tokens_total", direction="prompt") > 10
