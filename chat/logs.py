"""
Logging: one JSON object a line on stdout, written by a thread, so that a slow reader of stdout
never holds up the event loop.
"""

import logging
import sys
import threading
import time
import traceback
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

MAX_QUEUED = 10_000  # lines that may wait to be written; beyond that the oldest are dropped
WRITE_INTERVAL = 0.02  # seconds; a thread that wakes for each line takes the interpreter each time
FLUSH_TIMEOUT = 1.0  # seconds to wait at shutdown for a stdout that nobody reads


class LineHandler(QueueHandler):
    """Queue lines of JSON; the texts of exceptions are left out, since they may quote a client."""

    queue: SimpleQueue[Any]

    def prepare(self, record: logging.LogRecord) -> Any:
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
        return msgspec.json.encode(line).decode() + "\n"

    def enqueue(self, record: Any) -> None:
        self.queue.put_nowait(record)
        if self.queue.qsize() > MAX_QUEUED:
            with suppress(Empty):
                self.queue.get_nowait()

    def flush(self) -> None:
        """Wait until what is queued has been written; logging does so at the end."""
        is_written = threading.Event()
        self.queue.put_nowait(is_written)
        is_written.wait(FLUSH_TIMEOUT)


class LineWriter(QueueListener):
    """Write together what is queued within a moment; an event in the queue asks for a flush."""

    queue: SimpleQueue[Any]

    def __init__(self, queue: SimpleQueue[Any]) -> None:
        super().__init__(queue)
        # Not sys.stdout, whose lock Python takes at exit: it would wait for a write that hangs.
        self._output = open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)  # noqa: SIM115

    def dequeue(self, block: bool) -> Any:
        lines = [self.queue.get()]
        if isinstance(lines[0], str):
            time.sleep(WRITE_INTERVAL)
        with suppress(Empty):
            while isinstance(lines[-1], str):
                lines.append(self.queue.get_nowait())
        return lines

    def handle(self, record: Any) -> None:
        with suppress(OSError):  # a full disk, for example
            self._output.write("".join(line for line in record if isinstance(line, str)))
            self._output.flush()
        if isinstance(record[-1], threading.Event):
            record[-1].set()


def configure(level: str) -> None:
    """Send all logging to stdout as JSON; our line for each request replaces uvicorn's."""
    queue: SimpleQueue[Any] = SimpleQueue()
    handler = LineHandler(queue)
    handler.setLevel(level.upper())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
        logging.getLogger(name).setLevel(logging.INFO)  # below it they show messages
    # Lines about each WebSocket have its raw path, or a traceback, whenever a client likes.
    lines = ('%s - "WebSocket %s"', "connection ", "Invalid UTF-8 sequence")
    logging.getLogger("uvicorn.error").addFilter(lambda line: not str(line.msg).startswith(lines))
    for name in ("httpx", "httpcore", "aiohttp", "redis", "websockets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    LineWriter(queue).start()
