"""The caller's end of a connection: it is cut when it takes nothing for too long."""

from collections.abc import Callable

from starlette.types import Message, Send

from chat.watchdog import Watchdog


class CallerConnection:
    """
    The server's `send`, watched: it waits without limit for a caller who does not read.

    Args:
        send: what the beginning of an answer goes through, for those who look at it.
        server_send: the server's own, for all that follows: each layer costs a coroutine a message.
        limit: seconds that one message may wait.

    Attributes:
        server_send: the same, for who watches over it by `watch`.
    """

    def __init__(self, send: Send, server_send: Send, limit: float) -> None:
        self._send = send
        self.server_send = server_send
        self._limit = limit
        self._sending = 0
        self._sent = 0

    async def send(self, message: Message) -> None:
        self._sending += 1
        try:
            await self._send(message)
        finally:
            self._sending -= 1
            self._sent += 1
            self._send = self.server_send

    def watch(self, progress: Callable[[], object] | None = None) -> Watchdog:
        """
        Cut the connection when a message waits too long.

        Args:
            progress: gives the same for as long as a message waits that `send` knows nothing of.
        """
        return Watchdog(self._limit, progress or self._progress, self.abort)

    def _progress(self) -> object:
        return self._sent if self._sending else object()

    def abort(self) -> None:
        """
        Close the connection without waiting for what the caller has not read.

        ASGI has no word for it, so uvicorn's transport is asked, which its `send` belongs to.
        """
        transport = getattr(getattr(self.server_send, "__self__", None), "transport", None)
        if transport:
            transport.abort()
