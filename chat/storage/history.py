"""Conversations: what every store of them can do."""

from collections.abc import Sequence
from typing import Protocol

from chat.messages import Exchange

SHARED = "shared"  # the conversation of all clients that name none; too short for a client's own id


class History(Protocol):
    """
    Where conversations are kept. Operations are atomic; storing is not interrupted by cancelling
    its caller, and done later where the others raise `HistoryUnavailable`.
    """

    async def read(self, conversation: str) -> Sequence[Exchange]: ...  # a snapshot, oldest first
    async def append(self, conversation: str, exchange: Exchange) -> None: ...  # drops the oldest
    async def replace(self, conversation: str, exchanges: Sequence[Exchange]) -> None: ...
    async def forget(self, conversation: str) -> None: ...  # whether or not there is one
    async def aclose(self) -> None: ...  # waits for what is still being stored
