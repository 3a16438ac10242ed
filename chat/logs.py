"""Logging: one JSON object a line on stdout; a slow reader of it never holds up the event loop."""

import logging
import sys
import threading
import traceback
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import msgspec

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

MAX_QUEUED = 10_000  # lines that may wait to be written; beyond that the oldest are dropped
WRITE_INTERVAL = 0.05  # seconds; a thread that wakes for each line takes the interpreter each time
CLOSE_TIMEOUT = 1.0  # seconds to wait at shutdown for a stdout that nobody reads


def json_line(record: logging.LogRecord) -> str:
    """Render a record; the text of an exception is left out, since it may quote a client."""
    line: dict[str, Any] = {
        "timestamp": datetime.fromtimestamp(record.created, UTC),
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


class LineHandler(logging.Handler):
    """Write lines from a thread, together what is logged within a moment."""

    def __init__(self, level: str) -> None:
        super().__init__(level)
        # Not sys.stdout, whose lock Python takes at exit: it would wait for a write that hangs.
        self._output = open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        self._lines = deque[str](maxlen=MAX_QUEUED)
        self._is_closing = threading.Event()
        self._writer = threading.Thread(target=self._write_until_closed, daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(json_line(record))
        except Exception:  # noqa: BLE001  (as each handler of logging does)
            self.handleError(record)

    def close(self) -> None:
        """Wait until what is queued has been written; logging does so at the end."""
        self._is_closing.set()
        self._writer.join(CLOSE_TIMEOUT)
        super().close()

    def _write_until_closed(self) -> None:
        while not self._is_closing.wait(WRITE_INTERVAL) or self._lines:
            with suppress(OSError):  # a full disk, for example
                self._output.write("".join(self._lines.popleft() for _ in range(len(self._lines))))
                self._output.flush()


def configure(level: str) -> None:
    """Send all logging to stdout as JSON; our line for each request replaces uvicorn's."""
    logging.basicConfig(handlers=[LineHandler(level.upper())], force=True)
    logging.getLogger("chat").setLevel(level.upper())  # libraries stay at warnings, without content
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
        logging.getLogger(name).setLevel(logging.INFO)  # below it they show messages
    # Lines about each WebSocket have its raw path, or a traceback, whenever a client likes.
    lines = ('%s - "WebSocket %s"', "connection ", "Invalid UTF-8 sequence")
    logging.getLogger("uvicorn.error").addFilter(lambda line: not str(line.msg).startswith(lines))
