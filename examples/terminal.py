"""A chat in a terminal, over a WebSocket:  python terminal.py [URL]  (pip install websockets)"""

import json
import sys
import uuid

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
conversation = str(uuid.uuid4())  # anyone who knows it can read the conversation
with connect(f"{url.replace('http', 'ws', 1)}/chat") as socket:
    while True:
        try:
            messages = [{"role": "user", "content": input("> ")}]
        except (EOFError, KeyboardInterrupt):
            sys.exit()
        try:
            socket.send(json.dumps({"messages": messages, "conversation": conversation}))
            while "token" in (message := json.loads(socket.recv())):
                print(message["token"], end="", flush=True)
        except ConnectionClosed as closed:
            sys.exit(f"error: the connection broke: {closed}")
        if "error" in message:
            print(f"error: {message['error']}", end="")
        if "truncated" in message:
            print(f" (truncated: {message['truncated']})", end="")
        print()
