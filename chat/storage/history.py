"""Conversations: what every store of them can do."""

from collections.abc import Sequence
from typing import Protocol

from chat.messages import Exchange

SHARED = "shared"  # the conversation of all clients that name none; too short for a client's own id


class History(Protocol):
    """Each operation is atomic; storing outlasts its caller and raises no `HistoryUnavailable`."""

    async def read(self, conversation: str) -> Sequence[Exchange]: ...  # a snapshot, oldest first
    async def append(self, conversation: str, exchange: Exchange) -> None: ...  # drops the oldest
    async def replace(self, conversation: str, exchanges: Sequence[Exchange]) -> None: ...
    async def forget(self, conversation: str) -> None: ...  # whether or not there is one
    async def aclose(self) -> None: ...  # waits for what is still being stored
