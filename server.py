"""
The front door: settings, routes, lifespan, `app`.

    uvicorn server:app

Importing this module does nothing: `app` is made when it is first asked for.
"""

import asyncio
import gc
import re
import resource
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn.config import STARTUP_FAILURE

from chat import logs, metrics, signals, workers
from chat.config import Settings, SettingsError, load_settings
from chat.drain import Drain
from chat.errors import ChatError, TooManyConnections
from chat.groq import open_groq
from chat.history import History, MemoryHistory
from chat.http import (
    NO_SUCH_PATH,
    JSONReply,
    JSONResponse,
    MessagesResponse,
    SSEReply,
    admit,
    chat_error,
    read_body,
    routing_error,
    wants_stream,
)
from chat.limits import RateLimiter
from chat.link import Link, open_link
from chat.messages import ChatRequest, check_conversation_id, parse_request
from chat.middleware import UNMATCHED, RequestMiddleware, client_of
from chat.origins import OriginMiddleware
from chat.page import ChatPage
from chat.places import PLACES, Places
from chat.protocols import HTTPProtocol, WebSocketProtocol
from chat.service import ChatService
from chat.shared_history import SharedHistory
from chat.side_server import listen, running, serving
from chat.tokens import TokenCounts
from chat.upstream import Upstream
from chat.websocket import ChatSocket

HOST = "0.0.0.0"  # noqa: S104  (a service in a container listens on all of its addresses)
OPENAPI = Path(__file__).with_name("openapi.yaml")


async def chat(request: Request) -> Response:
    state, client = request.app.state, client_of(request.scope)
    settings, service = state.settings, state.service
    await admit(request, state.limiter)
    async with state.drain.receiving():
        received = await read_body(request, settings.max_body_bytes, settings.body_timeout)
    body = parse_request(ChatRequest, received)
    if wants_stream(request, body):
        reply = service.reply_to(body, "sse", client)
        return SSEReply(reply, keep_alive_interval=settings.keep_alive_interval)
    return JSONReply(service.reply_to(body, "json", client))


async def chat_socket(websocket: WebSocket) -> None:
    state, client = websocket.app.state, client_of(websocket.scope)
    reply_to = partial(state.service.reply_to, stream_type="websocket", client=client)
    chats = ChatSocket(websocket, reply_to, state.limiter, state.drain, state.settings)
    await chats.serve(state.places)


async def no_such_socket(websocket: WebSocket) -> None:
    await websocket.send_denial_response(JSONResponse({"error": NO_SUCH_PATH}, 404))


async def conversation(request: Request) -> Response:
    service, conversation_id = request.app.state.service, request.path_params["id"]
    check_conversation_id(conversation_id)
    if request.method == "DELETE":
        await service.forget(conversation_id)
        return Response(status_code=204)
    return MessagesResponse(service.reading(conversation_id, client_of(request.scope)))


async def page(request: Request) -> Response:
    chat_page: ChatPage = request.app.state.page
    return chat_page.answer(request)


async def health(request: Request) -> Response:
    return PlainTextResponse("OK")


async def ready(request: Request) -> Response:
    state, status = request.app.state, "ready"
    redis = state.link.state if state.link else "off"
    if state.drain.has_begun:
        status = "draining"
    elif state.settings.history_store == "redis" and redis not in ("up", "partly"):
        status = "history unreachable"
    body = {"status": status, "redis": redis, "models": state.upstream.model_states}
    return JSONResponse(body, 200 if status == "ready" else 503)


async def show_metrics(request: Request) -> Response:
    metrics.HISTORY_CONVERSATIONS.set(await request.app.state.service.count_conversations())
    metrics.EVENT_LOOP_TASKS.set(len(asyncio.all_tasks()))
    return Response(metrics.render(), media_type=metrics.CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    return Response(OPENAPI.read_bytes(), media_type="application/yaml")


PAGE = [Route("/", page), Route("/static/{file}", page)]
METRICS = Route("/metrics", show_metrics)
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "DELETE"],
    "allow_headers": ["*"],
    "expose_headers": ["X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"],
}
ROUTES = [
    *PAGE,
    Route("/chat", chat, methods=["POST"]),
    WebSocketRoute("/chat", chat_socket),
    Route("/conversations/{id}", conversation, methods=["GET", "DELETE"]),
    Route("/health", health),
    Route("/ready", ready),
    METRICS,
    Route("/openapi.yaml", openapi),
    WebSocketRoute("/{path:path}", no_such_socket, name=UNMATCHED),
]


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Places]]:
    """Open what the service holds, hand it on, and close it in the opposite order."""
    settings: Settings = app.state.settings
    async with AsyncExitStack() as stack:
        stack.callback(logs.write_directly)
        stack.callback(workers.leave)
        link = None
        if settings.redis_addr:
            opening = open_link(settings.redis_addr, settings.redis_password)
            link = await stack.enter_async_context(opening)
        history = open_history(settings, link)
        stack.push_async_callback(history.aclose)
        upstream = Upstream(await stack.enter_async_context(open_groq(settings)), settings)
        await stack.enter_async_context(running(upstream.check_forever()))
        counts = TokenCounts(settings.model, link)
        service = ChatService(settings, history=history, counts=counts, upstream=upstream)
        stack.push_async_callback(service.aclose)
        drain = Drain(service, delay=settings.drain_delay, timeout=settings.drain_timeout)
        await stack.enter_async_context(signals.held_back(drain.run))
        app.state.link = link
        app.state.drain = drain
        app.state.upstream = upstream
        app.state.service = service
        app.state.limiter = RateLimiter(settings.rate_limit, link) if settings.rate_limit else None
        app.state.places = places_for(settings)
        if settings.metrics_port:
            side = serving(metrics_app(app), listen_for_metrics(settings))
            await stack.enter_async_context(side)
        gc.freeze()  # what is there now stays: no collection needs to look at it again
        yield {PLACES: places_for(settings)}


def open_history(settings: Settings, link: Link | None) -> History:
    if settings.history_store == "redis" and link:
        return SharedHistory(
            link, max_exchanges=settings.max_exchanges, ttl=settings.conversation_ttl
        )
    return MemoryHistory(
        max_exchanges=settings.max_exchanges,
        max_conversations=settings.max_conversations,
        max_bytes=settings.max_history_bytes,
        ttl=settings.conversation_ttl,
    )


def places_for(settings: Settings) -> Places:
    return Places(settings.max_connections_per_client, TooManyConnections, settings.trusted_proxies)


def listen_for_metrics(settings: Settings) -> socket.socket:
    return listen((HOST, settings.metrics_port), is_shared=settings.web_concurrency > 1)


def metrics_app(app: Starlette) -> Starlette:
    """Make what shows the same metrics, and nothing else."""
    alone = Starlette(routes=[METRICS])
    alone.state = app.state
    return alone


class ChatApp(Starlette):
    """Starlette, with the server's own `send` kept for those who stream (`chat.connection`)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["chat.server_send"] = send
        await super().__call__(scope, receive, send)


def create_app(settings: Settings) -> Starlette:
    layers = [
        Middleware(RequestMiddleware, settings=settings),
        Middleware(OriginMiddleware, allowed=settings.allowed_origins),
    ]
    if settings.allowed_origins:
        layers.append(Middleware(CORSMiddleware, allow_origins=settings.allowed_origins, **CORS))
    app = ChatApp(
        routes=routes_of(settings),
        lifespan=lifespan,
        middleware=layers,
        exception_handlers={ChatError: chat_error, HTTPException: routing_error},
    )
    app.router.redirect_slashes = False
    app.state.settings = settings
    app.state.page = ChatPage() if settings.chat_page else None
    return app


def routes_of(settings: Settings) -> list[BaseRoute]:
    """Return the routes that the settings leave on."""
    off = [METRICS] if settings.metrics_port else []
    off += [] if settings.chat_page else PAGE
    return [each for each in ROUTES if each not in off]


def settings_or_exit() -> Settings:
    """Read the settings; a bad one ends the process with one line that names it."""
    try:
        settings = load_settings(overrides=options_of_uvicorn(sys.argv))
        check_metrics_port(settings)
        return settings
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  (there is no log yet)
        sys.exit(STARTUP_FAILURE)  # by which uvicorn's supervisor knows not to try again


def check_metrics_port(settings: Settings) -> None:
    """Listen on it for a moment: what fails in the lifespan is told with its traceback."""
    try:
        if settings.metrics_port:
            listen_for_metrics(settings).close()
    except OSError as error:
        raise SettingsError(
            f"METRICS_PORT must be free, not {settings.metrics_port}: {error.strerror}"
        ) from None


def options_of_uvicorn(arguments: list[str]) -> dict[str, str]:
    """Return what the command line says of a setting: `uvicorn --workers` is WEB_CONCURRENCY."""
    found = re.search(r" --workers[ =](\d+)", " ".join(arguments))
    return {"WEB_CONCURRENCY": found[1]} if found else {}


def __getattr__(name: str) -> Starlette:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = settings_or_exit()
    logs.configure(settings.log_level)
    return create_app(settings)


def raise_limit_of_files() -> None:
    """Have as many connections as the system allows, rather than as its shells take by default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # macOS takes less than it names
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    settings = settings_or_exit()
    raise_limit_of_files()
    logs.configure(settings.log_level)
    options: dict[str, Any] = {
        "host": HOST,
        "port": settings.port,
        "log_config": None,
        "proxy_headers": False,  # TRUSTED_PROXIES says whom to believe
        "http": HTTPProtocol,
        "ws": WebSocketProtocol,
        "ws_max_size": settings.max_body_bytes,
        "ws_per_message_deflate": False,  # a token is too short to gain by it
    }
    if settings.web_concurrency > 1:
        workers.run("server:app", settings.web_concurrency, **options)
    else:
        uvicorn.run(create_app(settings), workers=1, **options)


if __name__ == "__main__":
    main()
