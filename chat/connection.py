"""The caller's end of a connection: it is cut when it takes nothing for too long."""

from starlette.types import Message, Send

from chat.watchdog import Watchdog


class CallerConnection:
    """
    The server's `send`, watched: it waits without limit for a caller who does not read.

    Args:
        send: what the beginning of an answer goes through, for those who look at it.
        server_send: the server's own, for all that follows: each layer costs a coroutine a message.
        limit: seconds that one message may wait.
    """

    def __init__(self, send: Send, server_send: Send, limit: float) -> None:
        self._send = send
        self._server_send = server_send
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
            self._send = self._server_send

    def watch(self) -> Watchdog:
        """Cut the connection when a message waits too long."""
        return Watchdog(
            self._limit,
            progress=lambda: self._sent if self._sending else object(),
            on_silence=self.abort,
        )

    def abort(self) -> None:
        """
        Close the connection without waiting for what the caller has not read.

        ASGI has no word for it, so uvicorn's transport is asked, which its `send` belongs to.
        """
        transport = getattr(getattr(self._server_send, "__self__", None), "transport", None)
        if transport:
            transport.abort()
