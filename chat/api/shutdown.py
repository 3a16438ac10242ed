"""Shutdown in steps; the signal is held back, since uvicorn would stop listening at once."""

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any

import uvicorn

from chat.config import Settings
from chat.replies import Replies
from chat.service import ChatService

logger = logging.getLogger(__name__)


@dataclass
class Shutdown:
    """`/ready` turns 503; after DRAIN_DELAY new chats are refused; others have DRAIN_TIMEOUT."""

    service: ChatService
    replies: Replies
    settings: Settings
    has_begun: bool = False

    def handle_signals(self) -> None:
        """Shut down at the first signal; at the second, end the process at once."""
        loop = asyncio.get_running_loop()
        server: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)

        def handle(*_: object) -> None:
            if not self.has_begun:
                self.has_begun = True
                asyncio.run_coroutine_threadsafe(self._end(server), loop)
            elif parent_process() is None:  # a worker may get the same signal twice
                logging.shutdown()
                os._exit(1)

        if isinstance(server, uvicorn.Server):  # which puts back the handlers before its own
            signal.signal(signal.SIGTERM, handle)
            signal.signal(signal.SIGINT, handle)

    async def _end(self, server: uvicorn.Server) -> None:
        logger.info("draining: traffic should go elsewhere")
        await asyncio.sleep(self.settings.drain_delay)
        await self.service.drain(self.settings.drain_timeout)
        await self.replies.hand_over()
        logger.info("drained")
        if server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = 3  # for the connections to close
        server.should_exit = True
