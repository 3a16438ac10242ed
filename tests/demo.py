"""`make demo`: the service in front of the stand-in for Groq; no key, no Redis, no network."""

import os
import signal
import subprocess
import sys
import time

import httpx

from tests.fake_groq import FakeGroq, Script

PORT = os.environ.get("PORT", "8000")
URL = f"http://127.0.0.1:{PORT}"
BODY = '{"messages":[{"role":"user","content":"Hello!"}]}'
TRY = f"""
The service listens on {URL}, in front of a stand-in that echoes.
Open that in a browser to chat, or try:

  curl -s {URL}/chat -d '{BODY}'
  curl -sN {URL}/chat?stream=true -d '{BODY}'
  curl -s {URL}/metrics

Ctrl-C ends it.
"""


def main() -> int:
    with FakeGroq(Script(interval=0.1)) as groq:
        settings = {"GROQ_API_KEY": "demo", "GROQ_BASE_URL": groq.url, "REDIS_ADDR": ""}
        service = subprocess.Popen([sys.executable, "server.py"], env={**os.environ, **settings})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the service too
        signal.signal(signal.SIGTERM, lambda *_: service.terminate())
        if is_up(service):
            print(TRY, flush=True)
        return service.wait()


def is_up(service: subprocess.Popen[bytes]) -> bool:
    """Wait for the service; where it does not start, its own line says why."""
    while service.poll() is None:
        try:
            return httpx.get(f"{URL}/health").is_success
        except httpx.TransportError:
            time.sleep(0.05)
    return False


if __name__ == "__main__":
    sys.exit(main())
