"""`make demo`: the service in front of the stand-in for Groq; no key, no Redis, no network."""

import os
import re
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


REPLIES = {
    "Explain how a rainbow comes about, in plain words": """\
A rainbow is sunlight, **sorted by colour** by millions of drops of rain.

1. Light enters a drop and is bent, each colour by a little more or less.
2. It is thrown back at the far side of the drop.
3. It is bent once more on its way out, and the colours part.

You see one with the sun *behind* you: each colour reaches your eye from drops at an angle of its \
own, about 42° for red and 40° for violet.
""",
    "Plan a rainy weekend in Lisbon with two children": """\
Here is a weekend that stays dry:

| | Saturday | Sunday |
| --- | --- | --- |
| Morning | Oceanarium | Pavilion of Knowledge |
| Noon | *Time Out* market | Pastries in Belém |
| Afternoon | Tram 28, end to end | National Coach Museum |

> Buy the tickets for the Oceanarium the evening before: the queue stands in the rain.
""",
    "Write a Python function that groups words by anagram": """\
Words are anagrams when their sorted letters are the same, so that those can be the key:

```python
from collections import defaultdict


def group_anagrams(words):
    groups = defaultdict(list)
    for word in words:
        groups["".join(sorted(word))].append(word)  # "tea" and "eat": "aet"
    return list(groups.values())
```

`group_anagrams(["tea", "eat", "tan"])` gives `[["tea", "eat"], ["tan"]]`.
""",
    "Word a friendly reminder about an unpaid invoice": """\
**Subject:** Invoice 1042

Dear Ms Moreau,

I hope that you are well. Invoice 1042 of 3 March is still open on our side; it may have slipped \
through, so I attach it once more. If the payment is on its way, please take no notice of this.

Kind regards
""",
}
"""What the stand-in says to the examples that the page offers."""


def main() -> int:
    with FakeGroq(Script(interval=0.1)) as groq:
        for question, reply in REPLIES.items():
            groq.on(question, Script(re.findall(r"\s*\S+|\s+$", reply), interval=0.03))
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
