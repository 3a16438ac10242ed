"""The parameters that differ between servers, by the host of the base URL."""

import re

from chat.config import Settings

# Any other host gets `max_tokens`, which all servers know, and nothing about reasoning.
MAX_TOKENS = {
    "api.groq.com": "max_completion_tokens",  # https://console.groq.com/docs/api-reference
    "api.openai.com": "max_completion_tokens",  # https://platform.openai.com/docs/api-reference/chat
    "openrouter.ai": "max_completion_tokens",  # https://openrouter.ai/docs/api-reference/parameters
}


def parameters(host: str, model: str, settings: Settings, *, is_stream: bool) -> dict[str, object]:
    """Return what is sent along with the messages; the host is in lower case."""
    found = {"model": model, MAX_TOKENS.get(host, "max_tokens"): settings.max_tokens}
    if host == "api.groq.com" and re.fullmatch(r"openai/gpt-oss-\d+b", model):
        # https://console.groq.com/docs/reasoning
        found |= {"include_reasoning": False, "reasoning_effort": settings.reasoning_effort}
    if is_stream:
        found["stream"] = True
    if is_stream and host != "api.mistral.ai":
        # Mistral sends usage by itself, and refuses to be asked: https://docs.mistral.ai/api
        found["stream_options"] = {"include_usage": True}
    return found
