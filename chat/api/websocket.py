"""Replies over a WebSocket: one at a time, while the client is listened to."""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from chat import errors
from chat.api.limits import client_key, parse
from chat.api.middleware import client_of, log_request
from chat.api.protocols import TEXTS
from chat.kept import Reading
from chat.messages import ChatRequest
from chat.reply import Reply

CLOSED = (WebSocketDisconnect, OSError, RuntimeError)  # raised by sending, after either side's end
BUSY = "this message is refused, since a reply is in progress and goes on; wait for it or cancel it"


class ChatSocket:
    """One client's connection."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket, self._scope, self._state = websocket, websocket.scope, websocket.app.state
        self._idle_limit = self._state.settings.idle_timeout
        self._reply: Reply | None = None
        self._source: Any = None  # the reply, or what is read of one that is kept
        self._answering: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Answer messages until either side closes the connection."""
        if self._state.service.is_draining:
            raise errors.Draining  # a 503 before the upgrade: a proxy can try another replica
        await self._websocket.accept()
        try:
            async with asyncio.timeout(self._idle_limit) as self._idle:
                while (message := await self._websocket.receive())["type"] == "websocket.receive":
                    await self._handle(message)
                    self._restart_idle_timer()
            if message.get("code") == errors.BodyTooLarge.close_code:  # uvicorn has told the client
                log_request(self._scope, 413, {"error": errors.BodyTooLarge.reason})
        except TimeoutError:
            idle = errors.ClientIdle(self._idle_limit)
            await self._send({"error": str(idle)}, idle.close_code)
        except Exception:
            await self._send({"error": errors.InternalError.text}, errors.InternalError.close_code)
            raise  # uvicorn logs it
        finally:
            if self._answering:
                self._answering.cancel()
                await asyncio.wait([self._answering])

    def _restart_idle_timer(self) -> None:
        """Wait for the next message only so long, unless a reply is in progress."""
        until = asyncio.get_running_loop().time() + self._idle_limit
        with suppress(RuntimeError):  # no message is waited for
            self._idle.reschedule(None if self._answering else until)

    async def _handle(self, message: Message) -> None:
        try:
            if (text := message.get("text")) is None:
                raise errors.BinaryMessage
            if len(received := text.encode()) > self._state.settings.max_body_bytes:
                raise errors.BodyTooLarge(self._state.settings.max_body_bytes)
            request = await parse(self._websocket, received)
            if request.cancel:
                if self._reply:  # else the cancel has crossed the end of its reply
                    self._reply.cancel()
                if isinstance(self._source, Reading):
                    await self._source.cancel()
                return
            if self._answering and self._reply and self._reply.is_cancelled:
                await asyncio.wait([self._answering])
            if self._answering:
                raise errors.BadRequest(BUSY)
            self._reply = self._source = Reply("websocket", client_key(client_of(self._scope)))
            self._answering = asyncio.create_task(self._answer(request, self._reply))
        except errors.ChatError as error:
            log_request(self._scope, error.status, error.log_fields)
            if error.close_code is not None and self._answering:
                self._answering.cancel()
            await self._send({"error": str(error)}, error.close_code)

    async def _answer(self, request: ChatRequest, reply: Reply) -> None:
        status, fields = 200, dict[str, object]()
        admit = partial(self._state.limiter.admit, self._scope)
        try:
            with suppress(errors.NothingLeft):
                self._source, answer = await self._state.replies.answer(request, reply, admit)
                async with answer as tokens:
                    async for some in tokens:
                        await self._send_tokens(some, reply)
            cut = self._source.truncated
            await self._send({"done": "true"} | ({"truncated": cut} if cut else {}))
        except errors.ReplyCancelled:
            await self._send({"done": "true", "cancelled": "true"})
        except errors.ChatError as error:
            status, fields = error.status, error.log_fields
            await self._send({"error": str(error)}, error.close_code)
        finally:
            source, self._answering, self._reply, self._source = self._source, None, None, None
            self._restart_idle_timer()
            status = reply.error.status if reply.error else status
            log_request(self._scope, status, fields | source.summary())

    async def _send_tokens(self, tokens: list[str], reply: Reply) -> None:
        contents: list[dict[str, Any]] = [{"token": token} for token in tokens]
        for content in contents if self._source is not reply else ():
            self._source.position += len(content["token"])
            content["after"] = self._source.position
        texts = [msgspec.json.encode(content) for content in contents]
        messages: list[Message] = [{"type": "websocket.send", "texts": texts}]
        if TEXTS not in self._scope.get("extensions", ()):
            messages = [{"type": "websocket.send", "text": text.decode()} for text in texts]
        for count, message in enumerate(messages):
            try:
                await self._websocket.send(message)
            except CLOSED:
                raise errors.ClientDisconnected from None
            except asyncio.CancelledError:
                if self._source is reply:  # a kept reply has all that has come
                    reply.sent += tokens[:count]
                raise

    async def _send(self, content: dict[str, str], close_code: int | None = None) -> None:
        with suppress(*CLOSED):
            await self._websocket.send_text(msgspec.json.encode(content).decode())
            if close_code is not None:
                await self._websocket.close(close_code)
