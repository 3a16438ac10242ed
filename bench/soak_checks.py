"""What must hold at the end of a soak; each check returns the problems that it has found."""

from collections.abc import Iterator, Sequence
from statistics import median

from bench.soak_callers import FAULTS, TRANSPORTS, Caller, Seen
from tests import servers

# Bytes by which the median of the last quarter may exceed that of the third: the allocator's noise.
LEVEL_MEMORY = 2 << 20  # in ten minutes, a leak of 150 bytes per reply exceeds it

Problems = list[str]
Figure = tuple[str, float, float, float]  # what was counted, the count, and its bounds


def untried(seen: Seen) -> Problems:
    """Name what has never happened."""
    ends = {(transport, end) for transport in TRANSPORTS for end in ("completed", "vanished")}
    never = {*ends, ("websocket", "cancelled")} - seen.ends.keys()
    never |= {("answered", "here"), ("answered", "elsewhere")} - (+seen.resumed).keys()
    return [*map(" ".join, never), *(FAULTS.keys() - seen.faults.keys())]


def miscounted(
    service: servers.Caller, other: servers.Caller, seen: Seen, arrived: int
) -> Problems:
    """Compare the metrics with what the callers have seen and what has reached Groq."""
    figures = [*_groq_figures(service, seen, arrived), *_resuming_figures(service, other, seen)]
    figures += [figure for each in TRANSPORTS for figure in _figures_of(each, service, seen)]
    return [
        f"{what}: {counted:g}, expected {least:g} to {most:g}"
        for what, counted, least, most in figures
        if not least <= counted <= most
    ]


def _figures_of(transport: str, service: servers.Caller, seen: Seen) -> Iterator[Figure]:
    """
    Yield the figures of one transport.

    A vanished caller does not know how the reply ended, nor always whether there was one; but at
    least one of them has left in time to cancel it.
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


def _groq_figures(service: servers.Caller, seen: Seen, arrived: int) -> Iterator[Figure]:
    """Yield Groq's: each reply asks it once, unless the circuit breaker is open."""
    vanished, from_fault = seen.total("vanished"), seen.vanished_from_fault.total()
    asked = service.metric("groq_requests_total")
    completed = service.metric("groq_requests_total", outcome="completed")
    failed = asked - completed - service.metric("groq_requests_total", outcome="cancelled")
    refused = service.metric("chat_replies_total", outcome="failed") - failed
    replies = service.metric("chat_replies_total", outcome="completed")
    yield "Groq: completed", completed, replies, replies
    yield "Groq: failed", failed, seen.total("failed"), seen.total("failed") + from_fault
    yield "Groq: not asked", refused, seen.total("refused"), seen.total("refused") + vanished
    resent = seen.faults["hung up"]  # at most, on a new connection if it was a pooled one
    yield "Groq: arrived", arrived, completed + failed, asked + resent


def _resuming_figures(
    service: servers.Caller, other: servers.Caller, seen: Seen
) -> Iterator[Figure]:
    """Yield those of resuming, which never begins a reply, and counts when it has found one."""
    yield "elsewhere: requests", other.metric("chat_requests_total"), 0, 0
    yield "unattended", service.metric("chat_replies_unattended"), 0, 0
    for replica, place in ((service, "here"), (other, "elsewhere")):
        found = replica.metric("chat_resumes_total", result=place)
        least, most = (seen.resumed[result, place] for result in ("answered", "asked"))
        yield f"{place}: resumes", found, least, most


def broken_conversations(
    service: servers.Caller, callers: Sequence[Caller], max_exchanges: int
) -> Problems:
    """Name those that do not hold the newest acknowledged exchanges, complete and in order."""
    return [x.conversation for x in callers if not _is_as_acknowledged(service, x, max_exchanges)]


def _is_as_acknowledged(service: servers.Caller, caller: Caller, max_exchanges: int) -> bool:
    messages = service.messages(caller.conversation)
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        return False
    contents = [message["content"] for message in messages]
    stored = list(zip(contents[::2], contents[1::2], strict=True))
    known = [exchange for exchange in stored if exchange not in caller.possible]
    forgotten = len(caller.acknowledged) - len(known)
    return (
        caller.acknowledged[forgotten:] == known
        and len(set(stored)) == len(stored)
        and (forgotten == 0 or len(stored) == max_exchanges)
    )


def growing_memory(samples: list[int]) -> Problems:
    *_, third, fourth = quarters = memory_by_quarters(samples)
    return [f"bytes by quarters: {quarters}"] if fourth - third > LEVEL_MEMORY else []


def memory_by_quarters(samples: list[int]) -> list[float]:
    """Return the median of each quarter of a run."""
    size = len(samples) // 4
    return [median(samples[start : start + size]) for start in range(0, 4 * size, size)]
