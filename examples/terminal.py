"""
Chat in a terminal, over the event stream:  python terminal.py [URL]

It takes httpx (pip install httpx). Ctrl-C stops a reply, Ctrl-D ends the chat.
"""

import json
import sys
import uuid
from collections.abc import Iterator

import httpx

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"


def reply(client: httpx.Client, conversation: str, question: str) -> Iterator[str]:
    """Yield the reply's tokens as they come."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "conversation": conversation,
        "stream": True,
    }
    with client.stream("POST", "/chat", json=body) as answer:
        if answer.is_error:
            answer.read()
            raise RuntimeError(answer.json()["error"])
        for event, data in events(answer.iter_text()):
            if event == "error":
                raise RuntimeError(json.loads(data)["error"])
            if data == "[DONE]":
                return
            yield f" (truncated: {json.loads(data)['reason']})" if event == "truncated" else data
    raise RuntimeError("the connection broke before the end of the reply")


def events(pieces: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Parse an event stream: yield the name and the data of each event."""
    rest, name, data = "", "message", list[str]()
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif line == "":
                if data:
                    yield name, "\n".join(data)
                name, data = "message", []


def main() -> None:
    conversation = str(uuid.uuid4())  # anyone who knows it can read the conversation
    with httpx.Client(base_url=URL, timeout=httpx.Timeout(5, read=60)) as client:
        while True:
            try:
                question = input("> ")
            except (EOFError, KeyboardInterrupt):
                return print()
            try:
                for token in reply(client, conversation, question):
                    print(token, end="", flush=True)
                print()
            except KeyboardInterrupt:
                print(" (stopped)")
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                print(f"error: {error}")


if __name__ == "__main__":
    main()
