"""The soak, for a short time; and that a caller knows a reply that has ended in the wrong way."""

import subprocess
import sys
from dataclasses import replace

import pytest

from bench.soak_callers import Chat, Received, WrongEnd, end_of, take_stream
from tests.servers import ROOT

SECONDS = 20


@pytest.mark.timeout(180)
def test_a_soak_leaves_nothing_behind_and_its_figures_add_up() -> None:
    command = [sys.executable, "-m", "bench.soak", "--seconds", str(SECONDS), "--callers", "100"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=170, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


GOOD = Chat("sse", "hello")
CUT = replace(GOOD, fault="cut")
TOLD = "the language model service cut its reply short"
DOWN = "the language model service is down; try again in 2 s"
RIGHT = {
    "completed": (GOOD, Received(200, "You said: hello")),
    "failed": (CUT, Received(200, "You said:", TOLD)),
    "refused": (CUT, Received(503, "", DOWN)),
    "cancelled": (
        Chat("websocket", "hello", cancel_at=1),
        Received(None, "You", is_cancelled=True),
    ),
}
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


@pytest.mark.parametrize("end", RIGHT)
def test_a_right_end_is_known(end: str) -> None:
    assert end_of(*RIGHT[end]) == end


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_end_is_known(case: str) -> None:
    with pytest.raises(WrongEnd):
        end_of(*WRONG[case])


@pytest.mark.parametrize(
    "stream",
    [
        b"data: You\n\n",
        b'data: You\n\nevent: error\ndata: {"error": "no"}\n\ndata: [DONE]\n\n',
    ],
)
def test_a_stream_ends_with_done_or_with_an_error(stream: bytes) -> None:
    with pytest.raises(WrongEnd):
        take_stream(stream, Received())
