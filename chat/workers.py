"""Several workers on one machine: uvicorn's supervisor, and metrics that are summed over them."""

import os
import signal
import sys
import tempfile
from multiprocessing import active_children
from pathlib import Path
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from chat import metrics, signals


def run(app: str, count: int, **options: Any) -> None:
    """Run the app, named as `module:attribute`, in so many processes, until a signal comes."""
    with tempfile.TemporaryDirectory(prefix="chat-metrics-") as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory  # which the workers inherit
        config = uvicorn.Config(app, workers=count, **options)
        supervisor = Supervisor(config, sockets=[config.bind_socket()])
        supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        sys.exit(STARTUP_FAILURE)


def leave() -> None:
    """Take the gauges of this process, which ends, out of what the workers show together."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        metrics.forget_process(os.getpid())


class Supervisor(Multiprocess):
    """Ends the workers as a worker ends by itself: drained, or at once after a second signal."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket]) -> None:
        super().__init__(config, sockets)
        self._is_ending = False
        for number in signals.SIGNALS:
            signal.signal(number, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Count by itself: uvicorn takes all signals of half a second for one."""
        if self._is_ending:
            for worker in active_children():
                worker.kill()
            sys.exit(signals.FORCED)
        self._is_ending = True
        self.signal_queue.append(number)

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        alive = {worker.pid for worker in active_children()}
        for path in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("gauge_live*.db"):
            if (pid := int(path.stem.split("_")[2])) not in alive:
                metrics.forget_process(pid)
