"""Replies over a WebSocket: one at a time, while the client is listened to."""

import asyncio
import logging
import sys
from contextlib import suppress
from itertools import accumulate
from typing import Any

import msgspec
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from chat import errors
from chat.api.http import Answer, error_response
from chat.api.limits import admission, client_key
from chat.api.middleware import client_of, log_request
from chat.api.protocols import TEXTS
from chat.elsewhere import Elsewhere
from chat.kept import Reading
from chat.messages import ChatRequest, parse_request
from chat.reply import Reply

logger = logging.getLogger(__name__)

CLOSED = (WebSocketDisconnect, OSError, RuntimeError)  # raised by sending, after either side's end
BUSY = "this message is refused, since a reply is in progress and goes on; wait for it or cancel it"


class ChatSocket:
    """One client's connection."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket, self._scope, self._state = websocket, websocket.scope, websocket.app.state
        self._idle_limit = self._state.settings.idle_timeout
        self._idle = asyncio.timeout(None)
        self._reply: Reply | None = None
        self._reading: Reading | Elsewhere | None = None  # of a reply that is kept
        self._answering: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Answer messages until either side closes the connection."""
        if self._state.service.is_draining:  # a proxy can try another replica
            response = await error_response(self._websocket, errors.Draining())
            return await self._websocket.send_denial_response(response)
        await self._websocket.accept()
        try:
            while (message := await self._receive())["type"] == "websocket.receive":
                await self._handle(message)
            if message.get("code") == errors.BodyTooLarge.close_code:  # uvicorn has told the client
                log_request(self._scope, 413, {"error": errors.BodyTooLarge.reason})
        except errors.ClientIdle as idle:
            await self._send({"error": str(idle)}, idle.close_code)
        except Exception:
            logger.exception("unexpected error on a WebSocket")
            await self._send({"error": errors.InternalError.text}, errors.InternalError.close_code)
        finally:
            if self._answering:
                self._answering.cancel()
                await asyncio.wait([self._answering])

    async def _receive(self) -> Message:
        """Return the next message; while no reply is in progress, one must come in time."""
        try:
            async with asyncio.timeout(None if self._answering else self._idle_limit) as self._idle:
                return await self._websocket.receive()
        except TimeoutError:
            raise errors.ClientIdle(self._idle_limit) from None

    async def _handle(self, message: Message) -> None:
        try:
            request = await self._parse(message)
            if request.cancel:
                if self._reply:  # else the cancel has crossed the end of its reply
                    self._reply.cancel()
                if self._reading:
                    await self._reading.cancel()
                return
            if self._answering and self._reply and self._reply.is_cancelled:
                await asyncio.wait([self._answering])
            if self._answering:
                raise errors.BadRequest(BUSY)
            self._reply = Reply("websocket", client_key(client_of(self._scope)))
            self._answering = asyncio.create_task(self._answer(request, self._reply))
        except errors.ChatError as error:
            log_request(self._scope, error.status, error.log_fields)
            if error.close_code is not None and self._answering:
                self._answering.cancel()
            await self._send({"error": str(error)}, error.close_code)

    async def _parse(self, message: Message) -> ChatRequest:
        """Parse a message; unless it is a cancel or a ping, it counts against the rate limit."""
        text, request, limit = message.get("text"), None, self._state.settings.max_body_bytes
        try:
            if text is None:
                raise errors.BinaryMessage
            if len(text.encode(errors="replace")) > limit:
                raise errors.BodyTooLarge(limit)
            request = parse_request(text, may_cancel=True)
            return request
        finally:
            is_ping = isinstance(sys.exception(), errors.MissingMessages)
            if not (is_ping or (request and (request.cancel or request.reply))):
                await admission(self._websocket)()

    async def _answer(self, request: ChatRequest, reply: Reply) -> None:
        source, status, summary = None, 200, dict[str, Any]()
        try:
            source, answer = await self._open(request, reply)
            position = request.after if self._reading else None
            async with answer as tokens:
                async for some in tokens:
                    position = await self._send_tokens(some, reply, position)
            truncated = {"truncated": source.truncated} if source.truncated else {}
            await self._send({"done": "true", **truncated})
        except errors.NothingLeft:
            await self._send({"done": "true"})
        except errors.ReplyCancelled:
            await self._send({"done": "true", "cancelled": "true"})
        except errors.ChatError as error:
            status, summary = error.status, error.log_fields
            await self._send({"error": str(error)}, error.close_code)
        finally:
            self._answering = None
            summary |= source.summary() if source else {}
            status = reply.error.status if reply.error else status
            self._reading = None
            with suppress(RuntimeError):  # no message is waited for
                self._idle.reschedule(asyncio.get_running_loop().time() + self._idle_limit)
            log_request(self._scope, status, summary)

    async def _open(self, request: ChatRequest, reply: Reply) -> tuple[Any, Answer]:
        """Return the reply, begun or found, and its tokens."""
        admit, begun_by = admission(self._websocket), request if request.messages else None
        if not (request.reply and self._state.settings.resume_timeout):
            if request.reply:  # which does not count
                await admit()
            if begun_by is None:
                raise errors.ReplyNotFound
            return reply, self._state.service.answer(request, reply)
        reading = await self._state.replies.open(
            request.reply, begun_by, reply, request.after, admit
        )
        self._reading = reading
        if reply.is_cancelled:  # meanwhile
            await reading.cancel()
        return reading, reading.tokens()

    async def _send_tokens(
        self, tokens: list[str], reply: Reply, position: int | None
    ) -> int | None:
        """Send tokens; return the position after them, if positions are sent."""
        if position is None:
            texts = [msgspec.json.encode({"token": token}) for token in tokens]
        else:
            _, *ends = accumulate(map(len, tokens), initial=position)
            pairs = zip(tokens, ends, strict=True)
            texts = [msgspec.json.encode({"token": token, "after": end}) for token, end in pairs]
        messages: list[Message] = [{"type": "websocket.send", "texts": texts}]
        if TEXTS not in self._scope.get("extensions", ()):
            messages = [{"type": "websocket.send", "text": text.decode()} for text in texts]
        for count, message in enumerate(messages):
            try:
                await self._websocket.send(message)
            except CLOSED:
                raise errors.ClientDisconnected from None
            except asyncio.CancelledError:
                if position is None:  # otherwise what has come is kept, whether sent or not
                    reply.sent += tokens[:count]
                raise
        return ends[-1] if position is not None else None

    async def _send(self, content: dict[str, str], close_code: int | None = None) -> None:
        with suppress(*CLOSED):
            await self._websocket.send_text(msgspec.json.encode(content).decode())
            if close_code is not None:
                await self._websocket.close(close_code)
