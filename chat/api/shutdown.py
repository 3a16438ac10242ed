"""
Shutdown in steps: the load balancer learns of it first, then replies in progress end. The signal is
held back until then: uvicorn would stop listening at once, and not exit with 0.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from types import FrameType
from typing import Any

import uvicorn

from chat.config import Settings
from chat.replies import Replies
from chat.service import ChatService

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Shutdown:
    """`/ready` turns 503; after DRAIN_DELAY new chats are refused; others have DRAIN_TIMEOUT."""

    service: ChatService
    replies: Replies
    settings: Settings
    has_begun: bool = False

    @asynccontextmanager
    async def on_signal(self) -> AsyncIterator[None]:
        """Shut down at the first signal; at the second, end the process at once."""
        loop = asyncio.get_running_loop()
        originals = {number: signal.getsignal(number) for number in SIGNALS}

        def handle(number: int, frame: FrameType | None) -> None:
            if not self.has_begun:
                self.has_begun = True
                ending = self._end(number, originals[signal.Signals(number)])
                asyncio.run_coroutine_threadsafe(ending, loop)
            elif parent_process() is None:  # a worker may get the same signal twice
                logging.shutdown()
                os._exit(1)

        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in SIGNALS:
                signal.signal(number, handle)
        yield  # uvicorn puts back the handlers that were there before its own

    async def _end(self, number: int, original: Any) -> None:
        logger.info("draining: traffic should go elsewhere")
        await asyncio.sleep(self.settings.drain_delay)
        await self.service.drain(self.settings.drain_timeout)
        await self.replies.hand_over()
        logger.info("drained")
        server = getattr(original, "__self__", None)  # the handler is a method of its
        if not isinstance(server, uvicorn.Server):  # another server's
            signal.signal(number, original)
            return signal.raise_signal(number)
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = 3  # for the connections to close
        server.should_exit = True
