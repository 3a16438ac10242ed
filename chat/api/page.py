"""The chat page: static files, with headers that let the page do little."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

FILES = StaticFiles(directory=Path(__file__).with_name("static"), check_dir=False)
HEADERS = {
    # https://www.w3.org/TR/CSP3/; a reply that breaks out of its element meets these.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # revalidated each time: a new version is seen at once
}


async def chat_page(request: Request) -> Response:
    name = request.path_params.get("file", "index.html")
    response = await FILES.get_response(name, request.scope)
    response.headers.update(HEADERS)
    return response
