"""What Groq's headers tell of its quota, and how long a request has to wait for it."""

import pytest

from chat.quota import PROBE_INTERVAL, Quota, parse_duration, parse_retry_after
from tests.clock import Clock


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2m59.56s", 179.56),
        ("547ms", 0.547),
        ("7.66s", 7.66),
        ("1h2m3s", 3723),
        ("1d", 86_400),
        ("0s", 0),
        ("", None),
        ("soon", None),
        ("12", None),
        ("-1s", None),
        ("1s and more", None),
        ("9" * 400 + "s", None),
    ],
)
def test_a_duration_is_read_as_groq_writes_it(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("2.5", 3),
        ("99999", 86_400),
        ("100000", 86_400),
        ("9" * 400, 86_400),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 01 Jan 1970 00:01:10 GMT", 10),
        ("Sat, 31 Jan 1970 00:00:00 GMT", 86_400),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 86_400),
        ("Mon, 01 Jan 2024 00:00:99999999999999999999", None),
        ("soon", None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_retry_after_is_read_as_seconds_or_date_up_to_a_day(
    value: str, seconds: int | None
) -> None:
    assert parse_retry_after(value, now=60) == seconds


def tokens(limit: int | None, remaining: int, reset: str) -> dict[str, str]:
    headers = {"x-ratelimit-remaining-tokens": str(remaining), "x-ratelimit-reset-tokens": reset}
    return headers if limit is None else {**headers, "x-ratelimit-limit-tokens": str(limit)}


def quota_with(headers: dict[str, str]) -> tuple[Quota, Clock]:
    clock = Clock()
    quota = Quota(clock=clock)
    quota.note(200, headers)
    return quota, clock


def test_nothing_is_waited_for_until_groq_tells() -> None:
    assert Quota().wait_for(1_000_000) == 0


def test_what_is_left_is_not_waited_for() -> None:
    quota, _ = quota_with(tokens(8000, 5000, "22.5s"))
    assert quota.wait_for(5000) == 0


def test_what_is_missing_fills_up_steadily() -> None:
    quota, clock = quota_with(tokens(8000, 2000, "45s"))
    assert quota.wait_for(4000) == pytest.approx(15)
    clock.now += 10
    assert quota.wait_for(4000) == pytest.approx(5)
    clock.now += 5
    assert quota.wait_for(4000) == 0


def test_without_a_limit_it_is_full_at_the_reset() -> None:
    quota, clock = quota_with(tokens(None, 0, "3s"))
    assert quota.wait_for(100) == pytest.approx(3)
    clock.now += 3
    assert quota.wait_for(100) == 0


def test_what_never_fits_is_for_groq_to_refuse() -> None:
    quota, _ = quota_with(tokens(8000, 0, "60s"))
    assert quota.wait_for(8001) == 0


def test_requests_count_beside_tokens() -> None:
    quota, _ = quota_with(
        {
            "x-ratelimit-limit-requests": "1000",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "24h",
            **tokens(8000, 8000, "0s"),
        }
    )
    assert quota.wait_for(100) == pytest.approx(86.4)


def test_what_is_asked_for_at_the_same_moment_is_set_aside() -> None:
    quota, _ = quota_with(tokens(8000, 4000, "30s"))
    with quota.reserve(3000):
        assert quota.wait_for(1000) == 0
        assert quota.wait_for(3000) == pytest.approx(15)
    assert quota.wait_for(3000) == 0


def test_nonsense_is_passed_over() -> None:
    quota, _ = quota_with(tokens(None, 0, "soon"))
    quota.note(200, {"x-ratelimit-remaining-tokens": "none", "x-ratelimit-reset-tokens": "1s"})
    assert quota.wait_for(100) == 0


def test_a_nonsensical_reset_locks_nobody_out_for_ever() -> None:
    quota, clock = quota_with(tokens(None, 0, "999999999d"))
    assert quota.wait_for(100) == 86_400
    clock.now += 60
    assert quota.wait_for(100) == 0, "a probe"
    assert quota.wait_for(100) > 80_000
    quota.note(200, tokens(8000, 8000, "0s"))
    assert quota.wait_for(100) == 0


def test_what_a_429_refuses_for_a_while_is_waited_for() -> None:
    quota, clock = quota_with(tokens(8000, 8000, "0s"))
    quota.note(429, {"retry-after": "600", **tokens(8000, 8000, "0s")})
    assert quota.wait_for(100) == 600
    clock.now += 59
    assert quota.wait_for(100) == 541
    clock.now += 541
    assert quota.wait_for(100) == 0


def test_a_single_request_finds_out_whether_all_is_still_refused() -> None:
    quota, clock = quota_with({})
    quota.note(429, {"retry-after": "100000"})
    clock.now += PROBE_INTERVAL
    assert quota.wait_for(100) == 0, "a probe"
    assert quota.wait_for(100) > 80_000
    quota.note(200, {})
    assert quota.wait_for(100) == 0


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0"}, {"retry-after": "soon"}])
def test_a_429_that_does_not_say_for_how_long_holds_for_itself(headers: dict[str, str]) -> None:
    quota, _ = quota_with({})
    quota.note(429, headers)
    assert quota.wait_for(100) == 0
