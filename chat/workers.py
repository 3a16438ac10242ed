"""Several workers on one machine: uvicorn's supervisor, and metrics that are summed over them."""

import os
import signal
import sys
import tempfile
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from chat import metrics

POLL_INTERVAL = 0.1


def run(app: str, count: int, **options: Any) -> None:
    """Run the app, named as `module:attribute`, in so many processes, until a signal comes."""
    with tempfile.TemporaryDirectory(prefix="chat-metrics-") as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory  # which the workers inherit
        config = uvicorn.Config(app, workers=count, **options)
        supervisor = Supervisor(config, sockets=[config.bind_socket()])
        supervisor.run()
    if any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes):
        sys.exit(STARTUP_FAILURE)


class Supervisor(Multiprocess):
    """Ends the workers as a worker ends by itself: drained, or at once after a second signal."""

    def keep_subprocess_alive(self) -> None:
        before = list(self.processes)
        super().keep_subprocess_alive()
        for worker in before:
            if worker not in self.processes and worker.pid is not None:
                metrics.forget_process(worker.pid)

    def join_all(self) -> None:
        for worker in self.processes:
            while worker.process.is_alive():
                worker.process.join(POLL_INTERVAL)
                if {signal.SIGTERM, signal.SIGINT} & set(self.signal_queue):
                    worker.process.kill()
