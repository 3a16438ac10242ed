"""The 25 lines that everybody writes first."""

import json
import os
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

client = httpx.AsyncClient(
    base_url=os.environ["GROQ_BASE_URL"], timeout=None, limits=httpx.Limits(max_connections=None)
)


async def chat(request: Request) -> JSONResponse | StreamingResponse:
    body = await request.json()
    if not body.get("stream"):
        answer = await client.post("/chat/completions", json=body)
        return JSONResponse({"response": answer.json()["choices"][0]["message"]["content"]})

    async def events() -> AsyncIterator[str]:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    if token := delta.get("content"):
                        yield f"data: {token}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


app = Starlette(routes=[Route("/chat", chat, methods=["POST"])])
