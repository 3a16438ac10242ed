"""What has to hold at the end of a soak; each check returns the problems that it has found."""

from collections.abc import Iterator
from statistics import median

from bench.soak_callers import FAULTS, TRANSPORTS, Caller, Seen
from tests.servers import Service

LEVEL_MEMORY = 2 << 20
"""Bytes by which the median of the last quarter may lie above that of the third: the allocator's
noise. A leak of 150 bytes a reply is more, in ten minutes."""

Problems = list[str]
Figure = tuple[str, float, float, float]
"""What is counted, how much it is, and its bounds."""


def untried(seen: Seen) -> Problems:
    """Name what has never happened, and so has not been tried."""
    ends = {(transport, end) for transport in TRANSPORTS for end in ("completed", "vanished")}
    never = {*ends, ("websocket", "cancelled")} - seen.ends.keys()
    return [*map(" ".join, never), *(FAULTS.keys() - seen.faults.keys())]


def miscounted(service: Service, seen: Seen, arrived: int) -> Problems:
    """Compare the metrics with what the callers have seen and what has arrived at Groq."""
    figures = list(_groq_figures(service, seen, arrived))
    for transport in TRANSPORTS:
        figures += _figures_of(transport, service, seen)
    return [
        f"{what}: {counted:g} in place of {least:g} to {most:g}"
        for what, counted, least, most in figures
        if not least <= counted <= most
    ]


def _figures_of(transport: str, service: Service, seen: Seen) -> Iterator[Figure]:
    """
    A vanished caller does not know how the reply ended, nor always whether there was one; but of
    all of them, one at least has left in time to cancel it.
    """

    def replies(outcome: str) -> float:
        return service.metric("chat_replies_total", stream_type=transport, outcome=outcome)

    requests = service.metric("chat_requests_total", stream_type=transport)
    completed, cancelled, failed, vanished = (
        seen.ends[transport, end] for end in ("completed", "cancelled", "failed", "vanished")
    )
    failed += seen.ends[transport, "refused"]
    known = completed + cancelled + failed
    from_good = vanished - seen.vanished_from_fault[transport]
    ended = replies("completed") + replies("cancelled") + replies("failed")
    yield f"{transport}: requests", requests, known + seen.begun[transport], known + vanished
    yield f"{transport}: replies", ended, requests, requests
    yield f"{transport}: completed", replies("completed"), completed, completed + from_good
    yield f"{transport}: cancelled", replies("cancelled"), cancelled + 1, cancelled + vanished
    yield f"{transport}: failed", replies("failed"), failed, failed + vanished


def _groq_figures(service: Service, seen: Seen, arrived: int) -> Iterator[Figure]:
    """Each reply asks Groq once, but for those that the circuit breaker refuses."""
    vanished, from_fault = seen.total("vanished"), seen.vanished_from_fault.total()
    asked = service.metric("groq_requests_total")
    completed = service.metric("groq_requests_total", outcome="completed")
    failed = asked - completed - service.metric("groq_requests_total", outcome="cancelled")
    refused = service.metric("chat_replies_total", outcome="failed") - failed
    replies = service.metric("chat_replies_total", outcome="completed")
    yield "Groq: completed", completed, replies, replies
    yield "Groq: failed", failed, seen.total("failed"), seen.total("failed") + from_fault
    yield "Groq: not asked", refused, seen.total("refused"), seen.total("refused") + vanished
    yield "Groq: arrived", arrived, completed + failed, asked


def broken_conversations(service: Service, callers: list[Caller], max_exchanges: int) -> Problems:
    """Name those that are not the newest acknowledged exchanges, whole and in their order."""
    return [x.conversation for x in callers if not _is_as_acknowledged(service, x, max_exchanges)]


def _is_as_acknowledged(service: Service, caller: Caller, max_exchanges: int) -> bool:
    messages = service.messages(caller.conversation)
    if [each["role"] for each in messages] != ["user", "assistant"] * (len(messages) // 2):
        return False
    contents = [each["content"] for each in messages]
    stored = list(zip(contents[::2], contents[1::2], strict=True))
    known = [each for each in stored if each not in caller.possible]
    forgotten = len(caller.acknowledged) - len(known)
    return caller.acknowledged[forgotten:] == known and (
        forgotten == 0 or len(stored) == max_exchanges
    )


def growing_memory(samples: list[int]) -> Problems:
    *_, third, fourth = quarters = memory_by_quarters(samples)
    return [f"bytes by quarters: {quarters}"] if fourth - third > LEVEL_MEMORY else []


def memory_by_quarters(samples: list[int]) -> list[float]:
    """Return the median of each quarter of the run."""
    size = len(samples) // 4
    return [median(samples[start : start + size]) for start in range(0, 4 * size, size)]
