"""A short soak; and a client of the soak recognises a reply with the wrong end."""

import sys
from dataclasses import replace

import pytest

from bench.soak_callers import Chat, Received, WrongEnd, end_of, take_stream
from tests.conftest import only_with_coverage
from tests.servers import output_of


@only_with_coverage
@pytest.mark.timeout(180)
def test_a_soak_leaves_nothing_behind_and_its_figures_add_up() -> None:
    command = [sys.executable, "-m", "bench.soak", "--seconds", "20", "--callers", "100"]
    assert "FAILED" not in output_of(command)


GOOD = Chat("sse", "hello")
CUT = replace(GOOD, fault="cut")
TOLD = "the language model service cut the reply short"
DOWN = "the language model service is down; try again in 2 s"
WRONG = {
    "a part of the text": (GOOD, Received(200, "You said:")),
    "another status": (GOOD, Received(502, "You said: hello")),
    "an error without a fault": (GOOD, Received(200, "You said:", TOLD)),
    "a fault without an error": (CUT, Received(200, "You said:")),
    "another fault's error": (replace(GOOD, fault="empty"), Received(200, "", TOLD)),
    "an early fault's status": (replace(GOOD, fault="hung up"), Received(200, "", TOLD)),
    "refused after the first token": (GOOD, Received(503, "You", DOWN)),
    "cancelled by nobody": (GOOD, Received(200, "You", is_cancelled=True)),
    "another text before the cancel": (
        Chat("websocket", "hello", cancel_at=1),
        Received(None, "said", is_cancelled=True),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_end_is_recognised(name: str) -> None:
    with pytest.raises(WrongEnd):
        end_of(*WRONG[name])


@pytest.mark.parametrize("end", [b"", b'event: error\ndata: {"error": 1}\n\ndata: [DONE]\n\n'])
def test_a_stream_ends_with_done_or_with_an_error(end: bytes) -> None:
    with pytest.raises(WrongEnd):
        take_stream(b"data: You\n\n" + end, Received())
