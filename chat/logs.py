"""
Logging: one JSON object a line on stdout, written by a thread of its own.

Lines are made where they are logged and written elsewhere, so that a slow reader of stdout never
holds up the event loop. Texts of exceptions stay out: they may quote what a caller sent.
"""

import logging
import sys
import threading
import time
import traceback
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any, TextIO

import msgspec

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being served."""

QUEUED_LINES = 10_000
"""Lines that may wait to be written; beyond it the oldest are dropped."""
BATCH_INTERVAL = 0.02
"""Seconds to wait for more lines: a thread that wakes for each one takes the interpreter from the
event loop each time."""
CLOSE_TIMEOUT = 1.0
"""Seconds that the end waits for a stdout that nobody reads."""

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


class BackgroundHandler(logging.Handler):
    """
    Write lines in a thread of its own, many at a time; drop the oldest when too many wait.

    A signal may close it at any moment of `emit`, so nothing here holds a lock: a `SimpleQueue` may
    be put into again while it is put into.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self._stream = stream
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._is_closing = False
        self._writer = threading.Thread(target=self._write_forever, daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(self.format(record) + "\n")
        if self._is_closing:
            self._write()
        elif self._lines.qsize() > QUEUED_LINES:
            self._take(1)

    def close(self) -> None:
        """Write what waits, unless nobody reads; from now on each line is written at once."""
        self._is_closing = True
        self._lines.put("")  # wakes the writer
        self._writer.join(CLOSE_TIMEOUT)
        super().close()

    def _write_forever(self) -> None:
        while not self._is_closing:
            first = self._lines.get()
            time.sleep(0 if self._is_closing else BATCH_INTERVAL)
            self._write(first)
        self._write()

    def _write(self, first: str = "") -> None:
        with suppress(OSError):  # of a full disk, say: there is nowhere to tell of it
            self._stream.write(first + self._take(self._lines.qsize()))
            self._stream.flush()

    def _take(self, count: int) -> str:
        """Take as many lines as still wait, at most `count`."""
        lines = list[str]()
        with suppress(Empty):
            for _ in range(count):
                lines.append(self._lines.get_nowait())
        return "".join(lines)


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


def configure(level: str) -> None:
    """Send all logging, uvicorn's too, to stdout as JSON; our line a request replaces uvicorn's."""
    handler = BackgroundHandler(sys.stdout)
    handler.setLevel(level.upper())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
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
    """Write what waits, and from now on each line at once: the process is about to end."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, BackgroundHandler):
            handler.close()


def log_request(method: str, endpoint: str, status: int, fields: dict[str, Any]) -> None:
    """Log the one line of a request; `fields` are what else is known of it."""
    level = logging.INFO if status < 500 else logging.WARNING
    line = {"method": method, "endpoint": endpoint, "status": status, **fields}
    logger.log(level, "%s %s %d", method, endpoint, status, extra={"fields": line})
