"""One question over an event stream:  python ask.py [URL QUESTION]  (pip install httpx)"""

import json
import sys
import uuid
from collections.abc import Iterator

import httpx


def events(pieces: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the data of each event."""
    rest = ""
    for piece in pieces:
        *blocks, rest = (rest + piece).split("\n\n")
        for block in blocks:
            lines = [line.partition(": ") for line in block.split("\n")]
            name = "".join(value for field, _, value in lines if field == "event")
            yield name, "\n".join(value for field, _, value in lines if field == "data")


url, question = sys.argv[1:] or ("http://localhost:8000", "Hello!")
conversation = str(uuid.uuid4())  # anyone who knows it can read the conversation
messages = [{"role": "user", "content": question}]
body = {"messages": messages, "conversation": conversation, "stream": True}
with httpx.stream("POST", f"{url}/chat", json=body, timeout=60) as answer:
    if answer.is_error:
        sys.exit(f"error: {json.loads(answer.read())['error']}")
    for name, data in events(answer.iter_text()):
        if name == "error":
            sys.exit(f"error: {json.loads(data)['error']}")
        if data == "[DONE]":
            sys.exit()
        truncated = name == "truncated"
        print(f" (truncated: {json.loads(data)['reason']})" if truncated else data, end="")
        sys.stdout.flush()
sys.exit("error: the connection broke before the end of the reply")
