"""Conversations: what every store of them can do."""

from collections.abc import Sequence
from typing import Protocol

from chat.messages import Exchange

SHARED = "shared"  # the conversation of all clients that name none; too short for a client's own id


class History(Protocol):
    """Each operation is atomic; storing outlasts its caller and raises no `HistoryUnavailable`."""

    async def read(self, conversation: str) -> Sequence[Exchange]: ...  # a snapshot, oldest first
    # Adds exchanges, or with `anew` puts them in place of the others; drops the oldest.
    async def store(self, conversation: str, exchanges: Sequence[Exchange], anew: bool) -> None: ...
    async def forget(self, conversation: str) -> None: ...  # whether or not there is one
    async def aclose(self) -> None: ...  # waits for what is still being stored
