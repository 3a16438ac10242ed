"""How many connections each client has, within a limit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chat.addresses import bucket_of, is_trusted
from chat.config import Network
from chat.errors import TooManyConnections

PLACES = "chat.places"
"""The name of the places for connections in the lifespan's state, which uvicorn hands down to its
protocols."""


class Places:
    """
    The places that clients take, each as many as the limit says.

    Args:
        limit: for each client; 0: none.
        proxies: who may take any number, since many clients come through them.
    """

    def __init__(self, limit: int, proxies: Sequence[Network]) -> None:
        self._limit = limit
        self._proxies = proxies
        self._taken = Counter[str]()

    @contextmanager
    def taken_by(self, client: str) -> Iterator[None]:
        """
        Take one for as long as the context lasts.

        Raises:
            TooManyConnections: the client has taken all of its own.
        """
        if not self._limit or is_trusted(client, self._proxies):
            yield
            return
        bucket = bucket_of(client)
        if self._taken[bucket] >= self._limit:
            raise TooManyConnections(self._limit)
        self._taken[bucket] += 1
        try:
            yield
        finally:
            self._taken[bucket] -= 1
            if not self._taken[bucket]:
                del self._taken[bucket]
