"""The circuit breaker: when it opens, whom it lets through, and when it closes again."""

from contextlib import suppress
from itertools import count

import pytest

from chat.breaker import FIRST_PAUSE, LONGEST_PAUSE, CircuitBreaker, State
from chat.errors import (
    GroqDown,
    GroqError,
    GroqRateLimited,
    GroqRefused,
    GroqReplyBroken,
    GroqUnreachable,
)
from tests.clock import Clock

names = (f"a-model-{number}" for number in count())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(next(names), 3, clock=clock)


def fail(breaker: CircuitBreaker, error: GroqError | None = None) -> None:
    with pytest.raises(GroqError), breaker.request():
        raise error or GroqUnreachable()


def state_of(breaker: CircuitBreaker) -> State:
    return breaker.state  # asked anew: a type checker takes a property for a constant


def open_it(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        fail(breaker)


def test_a_run_of_failures_opens_it(breaker: CircuitBreaker) -> None:
    open_it(breaker)
    assert state_of(breaker) is State.OPEN
    with pytest.raises(GroqDown) as refused, breaker.request():
        pytest.fail("let through")
    assert refused.value.retry_after == 1
    assert refused.value.status == 503


def test_an_answer_ends_a_run(breaker: CircuitBreaker) -> None:
    for _ in range(5):
        fail(breaker)
        fail(breaker)
        with breaker.request() as succeed:
            succeed()
    assert state_of(breaker) is State.CLOSED


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_refusal_is_no_failure(breaker: CircuitBreaker, status: int) -> None:
    for _ in range(10):
        fail(breaker, GroqRefused(status, None))
    assert state_of(breaker) is State.CLOSED


def test_a_limit_tells_nothing_of_the_model_behind_it(breaker: CircuitBreaker) -> None:
    for _ in range(10):
        fail(breaker, GroqRateLimited(None))
    assert state_of(breaker) is State.CLOSED
    for _ in range(3):
        fail(breaker)
        fail(breaker, GroqRateLimited(None))
    assert state_of(breaker) is State.OPEN


def test_after_a_pause_one_request_goes_as_a_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    open_it(breaker)
    clock.now += FIRST_PAUSE
    with breaker.request() as succeed:
        assert state_of(breaker) is State.HALF_OPEN
        with pytest.raises(GroqDown), breaker.request():
            pytest.fail("let through beside the probe")
        succeed()
        assert state_of(breaker) is State.CLOSED
        fail(breaker)  # one failure while the probe's reply still streams
        with breaker.request():
            assert state_of(breaker) is State.CLOSED


def test_while_a_probe_hangs_others_are_told_to_wait_for_longer_and_longer(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    def told() -> int | None:
        with pytest.raises(GroqDown) as refused:
            breaker.check()
        return refused.value.retry_after

    open_it(breaker)
    clock.now += 3600  # nobody came
    with breaker.request():
        assert told() == 1
        clock.now += 20
        assert told() == 20


def test_a_probe_that_fails_doubles_the_pause_up_to_the_longest(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_it(breaker)
    pause = FIRST_PAUSE
    for _ in range(8):
        clock.now += pause - 0.01
        with pytest.raises(GroqDown), breaker.request():
            pytest.fail("let through too early")
        clock.now += 0.01
        fail(breaker)
        pause = min(2 * pause, LONGEST_PAUSE)
    assert pause == LONGEST_PAUSE


def test_a_probe_whose_caller_leaves_makes_room_for_the_next(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    open_it(breaker)
    clock.now += FIRST_PAUSE
    with pytest.raises(KeyboardInterrupt), breaker.request():
        raise KeyboardInterrupt
    assert state_of(breaker) is State.OPEN
    with breaker.request():
        assert state_of(breaker) is State.HALF_OPEN


def test_what_fails_late_does_not_put_off_the_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    with suppress(GroqError), breaker.request():
        open_it(breaker)
        clock.now += FIRST_PAUSE / 2
        raise GroqUnreachable
    clock.now += FIRST_PAUSE / 2
    with breaker.request():
        assert state_of(breaker) is State.HALF_OPEN


def test_what_goes_wrong_after_an_answer_is_no_failure(breaker: CircuitBreaker) -> None:
    for _ in range(10):
        with suppress(GroqError), breaker.request() as succeed:
            succeed()
            raise GroqUnreachable
    assert state_of(breaker) is State.CLOSED


def test_what_fails_late_does_not_double_the_pause_of_a_probe(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    with suppress(GroqError), breaker.request():
        open_it(breaker)
        clock.now += FIRST_PAUSE
        with breaker.request():
            raise GroqUnreachable
    clock.now += 2 * FIRST_PAUSE
    with breaker.request():
        assert state_of(breaker) is State.HALF_OPEN


@pytest.mark.parametrize("error", [GroqRefused(522, None), GroqReplyBroken("sent nonsense")])
def test_what_a_broken_proxy_says_does_not_close_it(
    breaker: CircuitBreaker, clock: Clock, error: GroqError
) -> None:
    open_it(breaker)
    clock.now += FIRST_PAUSE
    fail(breaker, error)
    assert state_of(breaker) is State.OPEN
