"""How much each client has at once of what is limited: connections, or replies."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from chat.addresses import bucket_of, is_trusted
from chat.config import Network
from chat.errors import ChatError

PLACES = "chat.places"
"""The name of the places for connections in the lifespan's state, which uvicorn hands down to its
protocols."""


class Places:
    """
    The places that clients take, each as many as the limit says.

    Args:
        limit: for each client; 0: none.
        error: made with the limit, for a client that has taken all of its own.
        proxies: who may take any number, since many clients come through them.

    Attributes:
        taken: how many are taken, by all clients.
    """

    def __init__(
        self, limit: int, error: Callable[[int], ChatError], proxies: Sequence[Network] = ()
    ) -> None:
        self.taken = 0
        self._limit = limit
        self._error = error
        self._proxies = proxies
        self._taken_by = Counter[str]()

    @contextmanager
    def taken_by(self, client: str) -> Iterator[None]:
        """
        Take one for as long as the context lasts.

        Raises:
            ChatError: the client has taken all of its own.
        """
        bucket = bucket_of(client)
        is_limited = self._limit and not is_trusted(client, self._proxies)
        if is_limited and self._taken_by[bucket] >= self._limit:
            raise self._error(self._limit)
        self.taken += 1
        self._taken_by[bucket] += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._taken_by[bucket] -= 1
            if not self._taken_by[bucket]:
                del self._taken_by[bucket]
