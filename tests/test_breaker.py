"""The circuit breaker: when it opens, which requests it lets through, and when it closes again."""

import pytest

from chat.errors import GroqCircuitOpen
from chat.llm.client import CLOSED, FIRST_PAUSE, HALF_OPEN, LONGEST_PAUSE, OPEN, CircuitBreaker
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("a-model", 3, clock)


@pytest.fixture
def open_breaker(breaker: CircuitBreaker) -> CircuitBreaker:
    for _ in range(3):
        breaker.check()
        breaker.failure()
    return breaker


def is_refused(breaker: CircuitBreaker, retry_after: int) -> bool:
    with pytest.raises(GroqCircuitOpen) as refused:
        breaker.check()
    return refused.value.status == 503 and refused.value.retry_after == retry_after


def test_only_consecutive_failures_open_it(breaker: CircuitBreaker) -> None:
    for _ in range(5):
        breaker.failure()
        breaker.failure()
        breaker.success()
    breaker.check()
    for state in (CLOSED, CLOSED, OPEN):
        breaker.failure()
        assert breaker.state == state
    assert is_refused(breaker, retry_after=1)


def test_after_a_pause_a_single_request_goes_as_a_probe_and_another_if_it_has_no_result(
    open_breaker: CircuitBreaker, clock: Clock
) -> None:
    for _ in range(3):
        clock.now += FIRST_PAUSE
        open_breaker.check()
        assert open_breaker.state == HALF_OPEN
        assert is_refused(open_breaker, retry_after=1)


def test_a_probe_that_succeeds_closes_it_for_a_whole_run_and_resets_the_pause(
    open_breaker: CircuitBreaker, clock: Clock
) -> None:
    for end in (open_breaker.failure, open_breaker.success):
        clock.now += 2 * FIRST_PAUSE
        open_breaker.check()
        end()
    for state in (CLOSED, CLOSED, OPEN):
        open_breaker.failure()
        assert open_breaker.state == state
    assert is_refused(open_breaker, retry_after=1)


def test_each_probe_that_fails_doubles_the_pause_up_to_the_longest(
    open_breaker: CircuitBreaker, clock: Clock
) -> None:
    for pause in (1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE):
        assert is_refused(open_breaker, retry_after=int(pause))
        clock.now += pause - 0.01
        assert is_refused(open_breaker, retry_after=1)
        clock.now += 0.01
        open_breaker.check()
        open_breaker.failure()


def test_what_fails_while_it_is_open_does_not_put_off_the_probe(
    open_breaker: CircuitBreaker, clock: Clock
) -> None:
    clock.now += FIRST_PAUSE / 2
    open_breaker.failure()
    clock.now += FIRST_PAUSE / 2
    open_breaker.check()
    assert open_breaker.state == HALF_OPEN
