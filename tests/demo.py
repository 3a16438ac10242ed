"""`make demo`: the service with a stand-in for Groq; it needs no key, Redis or network."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.fake_groq import FakeGroq, Script
from tests.servers import Caller, wait_until

PORT = os.environ.get("PORT", "8000")
URL = f"http://127.0.0.1:{PORT}"
BODY = '{"messages":[{"role":"user","content":"Hello!"}]}'
TRY = f"""
The service listens on {URL}, with a stand-in for Groq that echoes.
Open that address in a browser, or try:

  curl -s {URL}/chat -d '{BODY}'
  curl -sN {URL}/chat?stream=true -d '{BODY}'
  curl -s {URL}/metrics

Press Ctrl-C to stop it.
"""

# Replies to the example questions of the page.
REPLIES: dict[str, str] = json.loads(Path(__file__).with_name("demo_replies.json").read_text())


def main() -> int:
    with FakeGroq(Script(interval=0.1)) as groq:
        for question, reply in REPLIES.items():
            groq.on(question, Script(re.findall(r"\s*\S+|\s+$", reply), interval=0.03))
        settings = {"GROQ_API_KEY": "demo", "GROQ_BASE_URL": groq.url, "REDIS_ADDR": ""}
        service = subprocess.Popen([sys.executable, "server.py"], env={**os.environ, **settings})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the service too
        signal.signal(signal.SIGTERM, lambda *_: service.terminate())
        caller = Caller(int(PORT))
        wait_until(lambda: service.poll() is not None or caller.is_up())
        if service.poll() is None:  # otherwise its own message says why
            print(TRY, flush=True)
        return service.wait()


if __name__ == "__main__":
    sys.exit(main())
