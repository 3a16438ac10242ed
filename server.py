"""Routes, lifespan and `app`, which is made when it is first asked for: importing does nothing."""

import asyncio
import errno
import gc
import logging
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from uvicorn.config import STARTUP_FAILURE
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.supervisors import Multiprocess

from chat import config, errors, logs, messages, metrics
from chat.api import http, limits, middleware, protocols, shutdown, sse, websocket
from chat.llm.client import GroqClient
from chat.llm.groq import open_groq
from chat.replies import Replies
from chat.reply import Reply
from chat.service import ChatService
from chat.storage.handover import Handover
from chat.storage.history import MemoryHistory, RedisHistory
from chat.storage.redis import open_redis
from chat.tokens import TokenCounts

OPENAPI = FileResponse(Path(__file__).with_name("openapi.yaml"), media_type="application/yaml")
CORS: dict[str, Any] = {"allow_methods": ["GET", "POST", "DELETE"], "allow_headers": ["*"]}
CORS["expose_headers"] = ["X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"]


async def chat(request: Request) -> Response:
    received = await http.read_body(request, request.app.state.settings)
    return await answer(request, await limits.parse(request, received))


async def kept_reply(request: Request) -> Response:
    messages.check_id("reply", name := request.path_params["id"])
    if request.method == "DELETE":
        await request.app.state.replies.cancel(name)
    if request.method != "GET":  # a HEAD takes no reply over
        return Response(status_code=204)
    return await answer(request, messages.ChatRequest(reply=name, stream=True))


async def answer(request: Request, body: messages.ChatRequest) -> Response:
    state, scope, is_stream = request.app.state, request.scope, http.wants_stream(request, body)
    body.after = http.position(request) if body.reply else 0
    reply = Reply("sse" if is_stream else "json", limits.client_key(middleware.client_of(scope)))
    source, tokens = await state.replies.answer(body, reply, partial(state.limiter.admit, scope))
    scope["chat.reply"] = source
    if is_stream:
        return sse.EventStream(tokens, source, state.settings.keep_alive_interval)
    return await http.json_reply(request, tokens, source)


async def conversation(request: Request) -> Response:
    history, conversation_id = request.app.state.history, request.path_params["id"]
    messages.check_id("conversation", conversation_id)
    if request.method == "DELETE":
        await history.forget(conversation_id)
        return Response(status_code=204)
    if not (exchanges := await history.read(conversation_id)):
        raise errors.ConversationNotFound
    content = {"messages": msgspec.to_builtins(messages.flatten(exchanges))}
    return JSONResponse(content, headers={"cache-control": "no-store"})


async def ready(request: Request) -> Response:
    state, status = request.app.state, "ready"
    redis = {None: "off", True: "up", False: "down"}[state.redis and state.redis.is_up]
    if state.shutdown.is_set():
        status = "draining"
    elif state.settings.history_store == "redis" and redis == "down":
        status = "history unreachable"
    body = {"status": status, "redis": redis, "models": state.groq.model_states}
    return JSONResponse(body, 200 if status == "ready" else 503)


async def show_metrics(request: Request) -> Response:
    return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)


ROUTES: list[Route | WebSocketRoute] = [
    Route("/", http.chat_page),
    Route("/static/{file:path}", http.chat_page),
    Route("/chat", chat, methods=["POST"]),
    WebSocketRoute("/chat", lambda opened: websocket.ChatSocket(opened).serve()),
    Route("/conversations/{id}", conversation, methods=["GET", "DELETE"]),
    Route("/replies/{id}", kept_reply, methods=["GET", "DELETE"]),
    Route("/health", PlainTextResponse("OK"), methods=["GET"]),
    Route("/ready", ready),
    Route("/metrics", show_metrics),
    Route("/openapi.yaml", OPENAPI, methods=["GET"]),
]


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open what the service needs, hand it on, and close it in the opposite order."""
    state, settings = app.state, app.state.settings
    async with AsyncExitStack() as stack:
        opening = open_redis(settings.redis_addr, settings.redis_password)
        state.redis = await stack.enter_async_context(opening) if settings.redis_addr else None
        shared = settings.history_store == "redis"
        state.history = RedisHistory(settings, state.redis) if shared else MemoryHistory(settings)
        stack.push_async_callback(state.history.aclose)
        counts = TokenCounts(settings.model, state.redis)
        state.groq = GroqClient(await stack.enter_async_context(open_groq(settings)), settings)
        state.service = ChatService(settings, history=state.history, counts=counts, groq=state.groq)
        state.limiter = limits.RateLimiter(settings.rate_limit, state.redis)
        state.replies = Replies(state.service, settings, Handover(state.redis, settings))
        stack.push_async_callback(state.replies.aclose)
        for forever in (state.groq.check_models(), counts.share_forever(), state.replies.serve()):
            await stack.enter_async_context(http.in_background(forever))
        state.shutdown = shutdown.handle_signals(state.service, state.replies, settings)
        loop = asyncio.get_running_loop()
        metrics.EVENT_LOOP_TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
        gc.freeze()  # what exists now stays: no collection needs to look at it again
        gc.set_threshold(20_000, 20, 20)  # at Python's 700, an eighth of a JSON request goes to it
        yield


def create_app(settings: config.Settings) -> Starlette:
    allowed = [*map(middleware.plain_origin, settings.allowed_origins.replace(",", " ").split())]
    proxies = settings.trusted_proxies
    layers = [Middleware(ProxyHeadersMiddleware, trusted_hosts=proxies)] * bool(proxies)
    layers.append(Middleware(middleware.RequestMiddleware))
    layers.append(Middleware(middleware.OriginMiddleware, allow_origins=allowed, **CORS))
    hidden = {show_metrics: settings.metrics_port, http.chat_page: not settings.chat_page}
    routes = [route for route in ROUTES if not hidden.get(route.endpoint)]
    render: Any = {errors.ChatError: http.error_response, HTTPException: http.routing_error}
    app = Starlette(routes=routes, lifespan=lifespan, middleware=layers, exception_handlers=render)
    app.router.redirect_slashes = False
    app.state.settings = settings
    return app


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process in a way that tells uvicorn's supervisor not to try again."""
    try:
        yield
    except config.SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  (there may be no log yet)
        sys.exit(STARTUP_FAILURE)


@one_line_errors()
def __getattr__(name: str) -> Starlette:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = config.load_settings()
    logs.configure(settings.log_level)
    if settings.web_concurrency == 1:
        serve_metrics(settings)
    app = globals()[name] = create_app(settings)  # uvicorn asks for it twice
    return app


def serve_on(host: str, name: str, port: int, serve: Callable[..., Any]) -> list[Any]:
    """Serve on each address of a host that this machine has; on all of both families by default."""
    servers, found, kind = [], list[Any](), socket.SOCK_STREAM
    with suppress(socket.gaierror, UnicodeError):  # there may be no such name
        found = socket.getaddrinfo(host or None, port, type=kind, flags=socket.AI_PASSIVE)
    for family, *_, address in dict.fromkeys(found):
        try:
            servers.append(serve(address, family=family))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                what = f"{name} {port} cannot be used: {os.strerror(error.errno or 0)}"
                raise config.SettingsError(what) from None
    if not servers:
        raise config.SettingsError(f"HOST {host} cannot be used: this machine has no such address")
    return servers


def serve_metrics(settings: config.Settings) -> None:
    host = settings.host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")  # noqa: S104
    if port := settings.metrics_port:
        serve_on(host, "METRICS_PORT", port, metrics.serve)


class Workers(Multiprocess):
    """uvicorn's supervisor, which also removes the gauges of workers that have ended."""

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        pids = {str(process.pid) for process in self.processes}
        for file in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("gauge_live*.db"):
            if file.stem.rpartition("_")[2] not in pids:
                file.unlink()


@one_line_errors()
def main() -> None:
    settings = config.load_settings()
    listeners = serve_on(settings.host, "PORT", settings.port, socket.create_server)
    with suppress(AttributeError):  # Linux only: cut a client that does not read its response
        for listener in listeners:
            unread = int(settings.send_timeout * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unread)
    options = uvicorn.Config(
        create_app(settings) if settings.web_concurrency == 1 else "server:app",
        log_config=None,
        proxy_headers=False,  # TRUSTED_PROXIES says whom to believe
        http=protocols.HTTPProtocol,
        ws=protocols.WebSocketProtocol,
        ws_max_size=settings.max_body_bytes,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]  # or a fraction
        ws_per_message_deflate=False,  # a token is too short to gain from it
        workers=settings.web_concurrency,
    )
    if settings.web_concurrency > 1:
        directory = tempfile.TemporaryDirectory(prefix="chat-metrics-")  # removed at the end
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory.name  # inherited by the workers
    serve_metrics(settings)
    logs.configure(settings.log_level)
    addresses = ", ".join(listener.getsockname()[0] for listener in listeners)
    logging.getLogger("chat").info("listening on port %d of %s", settings.port, addresses)
    if settings.web_concurrency == 1:
        return uvicorn.Server(options).run(listeners)
    workers = Workers(options, listeners)
    workers.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in workers.processes):
        sys.exit(STARTUP_FAILURE)


if __name__ == "__main__":
    main()
