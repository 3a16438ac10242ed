"""What Groq's headers tell of its quota, and how long a request has to wait for it."""

import pytest

from chat.quota import Quota, parse_duration
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


def tokens(limit: int | None, remaining: int, reset: str) -> dict[str, str]:
    headers = {"x-ratelimit-remaining-tokens": str(remaining), "x-ratelimit-reset-tokens": reset}
    return headers if limit is None else {**headers, "x-ratelimit-limit-tokens": str(limit)}


def quota_with(headers: dict[str, str]) -> tuple[Quota, Clock]:
    clock = Clock()
    quota = Quota(clock=clock)
    quota.note(headers)
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
    quota.note({"x-ratelimit-remaining-tokens": "none", "x-ratelimit-reset-tokens": "1s"})
    assert quota.wait_for(100) == 0


def test_a_nonsensical_reset_locks_nobody_out_for_ever() -> None:
    quota, clock = quota_with(tokens(None, 0, "999999999d"))
    assert quota.wait_for(100) == 86_400
    clock.now += 60
    assert quota.wait_for(100) == 0, "a probe"
    assert quota.wait_for(100) > 80_000
    quota.note(tokens(8000, 8000, "0s"))
    assert quota.wait_for(100) == 0
