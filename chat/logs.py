"""
Logging: one JSON object a line on stdout, written by a thread of its own.

Lines are made where they are logged and written elsewhere, so that a slow reader of stdout never
holds up the event loop. Texts of exceptions stay out: they may quote what a caller sent.
"""

import atexit
import logging
import sys
import traceback
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import Any

import msgspec

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being served."""

QUEUED_LINES = 10_000
"""Lines that may wait to be written; beyond it they are dropped."""

logger = logging.getLogger("chat")


class JSONFormatter(logging.Formatter):
    """Format a record, with the `fields` it bears, as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        created = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "timestamp": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if (current := request_id.get()) is not None:
            line["request_id"] = current
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = type(record.exc_info[1]).__qualname__
            line["traceback"] = "".join(traceback.format_tb(record.exc_info[2]))
        return msgspec.json.encode(line).decode()


class DroppingQueueHandler(QueueHandler):
    """Put lines on a queue; drop them while it is full rather than wait."""

    listener: QueueListener

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(Full):
            self.queue.put_nowait(record)


SOCKET_LINES = (
    "Invalid UTF-8 sequence received",
    "ASGI callable returned without completing handshake",  # said of a 404 too
    '%s - "WebSocket %s"',
    "connection open",
    "connection rejected",
    "connection closed",
)
"""What uvicorn and websockets log of each WebSocket, raw paths and all, at a caller's will."""


def is_not_of_a_socket(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(SOCKET_LINES)


def configure() -> None:
    """Send all logging, uvicorn's too, to stdout as JSON; our line a request replaces uvicorn's."""
    lines: Queue[logging.LogRecord] = Queue(QUEUED_LINES)
    handler = DroppingQueueHandler(lines)
    handler.setFormatter(JSONFormatter())
    handler.listener = QueueListener(lines, logging.StreamHandler(sys.stdout))
    handler.listener.start()
    atexit.register(write_directly)

    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.INFO)  # below it they show paths and messages
    logging.getLogger("uvicorn.error").addFilter(is_not_of_a_socket)
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    for name in ("httpx", "httpcore", "aiohttp", "redis", "websockets"):
        logging.getLogger(name).setLevel(logging.WARNING)


def write_directly() -> None:
    """Write what is queued, and from now on each line at once: the process is about to end."""
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, DroppingQueueHandler):
            direct = logging.StreamHandler(sys.stdout)
            direct.setFormatter(handler.formatter)
            root.addHandler(direct)
            root.removeHandler(handler)
            handler.listener.stop()


def log_request(method: str, endpoint: str, status: int, fields: dict[str, Any]) -> None:
    """Log the one line of a request; `fields` are what else is known of it."""
    level = logging.INFO if status < 500 else logging.WARNING
    line = {"method": method, "endpoint": endpoint, "status": status, **fields}
    logger.log(level, "%s %s %d", method, endpoint, status, extra={"fields": line})
