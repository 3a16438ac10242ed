"""What a lookup in the history and in the token counts costs, with few conversations and many."""

import time

from chat.history import Exchange, MemoryHistory
from chat.messages import Message
from chat.tokens import TokenCounts

SIZES = (10, 10_000)
EXCHANGES = 10
LOOKUPS = 2_000


def exchange(conversation: int, number: int) -> Exchange:
    text = f"conversation {conversation}, message {number}"
    return Exchange((Message("user", text), Message("assistant", text + " replied")))


async def lookup_microseconds() -> dict[str, float]:
    """Return the cost of reading, appending and counting, each in microseconds."""
    figures = {}
    for conversations in SIZES:
        history = MemoryHistory(
            max_exchanges=20, max_conversations=10_000, max_bytes=1 << 30, ttl=86_400
        )
        counts = TokenCounts("a-model", None)
        for conversation in range(conversations):
            for number in range(EXCHANGES):
                await history.append(str(conversation), exchange(conversation, number))
            reply = exchange(conversation, 0).messages[1]
            counts.learn([], [], prompt_tokens=0, reply=reply, reply_tokens=5)
        lookup, append, count = 0.0, 0.0, 0.0
        for number in range(LOOKUPS):
            conversation = number * 7919 % conversations
            started_at = time.perf_counter()
            await history.read(str(conversation))
            read_at = time.perf_counter()
            await counts.count(exchange(conversation, 0).messages[1:])
            counted_at = time.perf_counter()
            await history.append(str(conversation), exchange(conversation, number))
            lookup += read_at - started_at
            count += counted_at - read_at
            append += time.perf_counter() - counted_at
        for name, seconds in (("read", lookup), ("count", count), ("append", append)):
            figures[f"{name}_us_at_{conversations}"] = seconds / LOOKUPS * 1e6
    return figures
