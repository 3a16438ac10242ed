"""`make demo`: the service with a stand-in for Groq; it needs no key, Redis or network."""

import os
import re
import signal
import subprocess
import sys

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
REPLIES = {
    "Explain how a rainbow comes about, in plain words": """\
A rainbow is sunlight, **sorted by colour** in millions of raindrops.

1. Light enters a drop and bends, each colour by a different angle.
2. It is reflected at the far side of the drop.
3. It bends once more on its way out, and the colours separate.

You see one with the sun *behind* you.
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
