"""
The front door: settings, routes, lifespan, `app`.

    uvicorn server:app

Importing this module does nothing: `app` is made when it is first asked for.
"""

import gc
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from chat import logs, metrics
from chat.batching import BatchingProtocol
from chat.cache import open_cache
from chat.config import Settings, SettingsError, load_settings
from chat.errors import ChatError
from chat.groq import open_groq
from chat.history import MemoryHistory
from chat.http import (
    NO_SUCH_PATH,
    JSONReply,
    JSONResponse,
    SSEReply,
    chat_error,
    read_body,
    routing_error,
    wants_stream,
)
from chat.messages import ChatRequest, check_conversation_id, parse_request
from chat.middleware import UNMATCHED, RequestMiddleware
from chat.service import ChatService
from chat.tokens import CACHE_TTL, TokenCounts
from chat.websocket import ChatSocket

HOST = "0.0.0.0"  # noqa: S104  (a service in a container listens on all of its addresses)
SHUTDOWN_TIMEOUT = 25
"""Seconds that running replies have at the end; Kubernetes kills after 30."""
OPENAPI = Path(__file__).with_name("openapi.yaml")


async def chat(request: Request) -> Response:
    settings, service = request.app.state.settings, request.app.state.service
    body = parse_request(ChatRequest, await read_body(request, settings.max_body_bytes))
    if wants_stream(request, body):
        reply = service.reply_to(body, "sse")
        return SSEReply(reply, keep_alive_interval=settings.keep_alive_interval)
    return JSONReply(service.reply_to(body, "json"))


async def chat_socket(websocket: WebSocket) -> None:
    settings, service = websocket.app.state.settings, websocket.app.state.service
    reply_to = partial(service.reply_to, stream_type="websocket")
    await ChatSocket(websocket, reply_to, max_bytes=settings.max_body_bytes).serve()


async def no_such_socket(websocket: WebSocket) -> None:
    await websocket.send_denial_response(JSONResponse({"error": NO_SUCH_PATH}, 404))


async def conversation(request: Request) -> Response:
    service, conversation_id = request.app.state.service, request.path_params["id"]
    check_conversation_id(conversation_id)
    if request.method == "DELETE":
        await service.forget(conversation_id)
        return Response(status_code=204)
    return JSONResponse({"messages": await service.messages_of(conversation_id)})


async def health(request: Request) -> Response:
    return PlainTextResponse("OK")


async def ready(request: Request) -> Response:
    cache = request.app.state.cache
    redis = "off" if cache is None else "up" if cache.is_up else "down"
    return JSONResponse({"status": "ready", "redis": redis})


async def show_metrics(request: Request) -> Response:
    metrics.HISTORY_CONVERSATIONS.set(await request.app.state.service.count_conversations())
    return Response(metrics.generate_latest(), media_type=metrics.CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    return Response(OPENAPI.read_bytes(), media_type="application/yaml")


ROUTES = [
    Route("/chat", chat, methods=["POST"]),
    WebSocketRoute("/chat", chat_socket),
    Route("/conversations/{id}", conversation, methods=["GET", "DELETE"]),
    Route("/health", health),
    Route("/ready", ready),
    Route("/metrics", show_metrics),
    Route("/openapi.yaml", openapi),
    WebSocketRoute("/{path:path}", no_such_socket, name=UNMATCHED),
]


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open what the service holds, hand it on, and close it in the opposite order."""
    settings: Settings = app.state.settings
    async with AsyncExitStack() as stack:
        stack.callback(logs.write_directly)
        cache = None
        if settings.redis_addr:
            opening = open_cache(settings.redis_addr, settings.redis_password, ttl=CACHE_TTL)
            cache = await stack.enter_async_context(opening)
        service = ChatService(
            settings,
            history=MemoryHistory(
                max_exchanges=settings.max_exchanges,
                max_conversations=settings.max_conversations,
                max_bytes=settings.max_history_bytes,
                ttl=settings.conversation_ttl,
            ),
            counts=TokenCounts(settings.model, cache),
            groq=await stack.enter_async_context(open_groq(settings)),
        )
        stack.push_async_callback(service.aclose)
        app.state.cache = cache
        app.state.service = service
        gc.freeze()  # what is there now stays: no collection needs to look at it again
        yield


def create_app(settings: Settings) -> Starlette:
    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(RequestMiddleware)],
        exception_handlers={ChatError: chat_error, HTTPException: routing_error},
    )
    app.router.redirect_slashes = False
    app.state.settings = settings
    return app


def settings_or_exit() -> Settings:
    """Read the settings; a bad one ends the process with one line that names it."""
    try:
        return load_settings()
    except SettingsError as error:
        sys.exit(f"error: {error}")


def __getattr__(name: str) -> Starlette:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = settings_or_exit()
    logs.configure()
    return create_app(settings)


def main() -> None:
    settings = settings_or_exit()
    logs.configure()
    uvicorn.run(
        create_app(settings),
        host=HOST,
        port=settings.port,
        log_config=None,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        ws=BatchingProtocol,
        ws_max_size=4 * settings.max_body_bytes,  # up to there, an error goes before the close
        ws_per_message_deflate=False,  # a token is too short to gain by it
    )


if __name__ == "__main__":
    main()
