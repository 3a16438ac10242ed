"""
The chat page at `/`: the files of `chat/static/`, with headers that let the page do little.

It talks to this service alone, over the API that everybody else uses.
"""

import hashlib
from mimetypes import guess_type
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

INDEX = "index.html"
STATIC = Path(__file__).with_name("static")

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",  # the WebSocket of the same host too
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no text becomes HTML, not even by a slip
    "trusted-types": "'none'",
}
"""https://www.w3.org/TR/CSP3/; a reply that finds its way around the page finds these."""

HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again: a new version is seen at once
}


class ChatPage:
    """The files, read once, each with its tag."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.is_file()}
        self._tags = {name: _tag(content) for name, content in self._files.items()}

    def answer(self, request: Request) -> Response:
        """
        Answer with the file that the path names; with the page itself where it names none.

        Raises:
            HTTPException: there is no such file.
        """
        name = request.path_params.get("file", INDEX)
        if name not in self._files:
            raise HTTPException(404)
        headers = {**HEADERS, "ETag": self._tags[name]}
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self._files[name], headers=headers, media_type=guess_type(name)[0])


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'
