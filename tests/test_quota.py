"""What Groq's headers say about its quota."""

import pytest

from chat.llm.groq import exhausted_for, parse_duration

DAY = 86_400


def test_a_duration_is_read_as_groq_writes_it() -> None:
    durations = {"2m59.56s": 179.56, "547ms": 0.547, "1h2m3s": 3723, "1d": DAY, "9d": DAY, "0s": 0}
    for text, seconds in durations.items():
        assert parse_duration(text) == pytest.approx(seconds), text
    for text in ("", "soon", "12", "-1s", "1s and more", "9" * 400 + "s"):
        assert parse_duration(text) == 0, text


def quota(kind: str, remaining: object, reset: str) -> dict[str, str]:
    return {f"x-ratelimit-remaining-{kind}": str(remaining), f"x-ratelimit-reset-{kind}": reset}


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (200, {}, 0),
        (200, {"retry-after": "600"}, 0),
        (429, {"retry-after": "600"}, 600),
        (429, {"retry-after": "2.5"}, 3),
        (429, {"retry-after": "100000"}, DAY),
        *((429, headers, 0) for headers in ({}, {"retry-after": "0"}, {"retry-after": "soon"})),
        (200, quota("tokens", 5000, "22.5s"), 0),
        (200, quota("tokens", 0, "22.5s"), 22.5),
        (200, quota("requests", 0, "2h"), 7200),
        (200, quota("tokens", 0, "999999999d"), DAY),
        (200, quota("tokens", 0, "soon"), 0),
        (200, quota("tokens", "none", "1s"), 0),
        (200, {**quota("tokens", 0, "9s"), **quota("requests", 0, "3s")}, 9),
        (429, {"retry-after": "5", **quota("tokens", 0, "9s")}, 9),
        (429, {"retry-after": "50", **quota("tokens", 0, "9s")}, 50),
    ],
    ids=str,
)
def test_a_model_is_exhausted_until_the_latest_moment_that_a_response_names(
    status: int, headers: dict[str, str], seconds: float
) -> None:
    assert exhausted_for(status, headers) == seconds
