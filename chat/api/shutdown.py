"""Shutdown in steps; the signal is held back, since uvicorn would stop listening at once."""

import asyncio
import logging
import os
import signal
from multiprocessing import parent_process
from typing import Any

import uvicorn

from chat.config import Settings
from chat.replies import Replies
from chat.service import ChatService

logger = logging.getLogger(__name__)


def handle_signals(service: ChatService, replies: Replies, settings: Settings) -> asyncio.Event:
    """Shut down at the first signal, end at once at the second; return the event of the first."""
    loop, has_begun = asyncio.get_running_loop(), asyncio.Event()
    server: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)

    async def shut_down() -> None:
        logger.info("draining: traffic should go elsewhere")
        await asyncio.sleep(settings.drain_delay)
        await service.drain(settings.drain_timeout)
        await replies.hand_over()
        logger.info("drained")
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = 3  # for the connections to close
        server.should_exit = True

    def handle(*_: object) -> None:
        if not has_begun.is_set():
            has_begun.set()
            asyncio.run_coroutine_threadsafe(shut_down(), loop)
        elif parent_process() is None:  # a worker may get the same signal twice
            logging.shutdown()
            os._exit(1)

    if isinstance(server, uvicorn.Server):  # which puts back the handlers before its own
        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
    return has_begun
