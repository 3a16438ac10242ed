"""The parameters that differ between servers, by the host of the base URL."""

import re
from typing import NamedTuple

from chat.config import Settings


class Dialect(NamedTuple):
    """The parameter for the tokens of a reply, and the models that are told how to reason."""

    max_tokens: str = "max_tokens"
    reasoning_models: str = ""


# Any other host gets `max_tokens`, which all servers know, and nothing about reasoning.
DIALECTS = {
    # https://console.groq.com/docs/api-reference#chat-create, https://console.groq.com/docs/reasoning
    "api.groq.com": Dialect("max_completion_tokens", r"openai/gpt-oss-\d+b"),
    # https://platform.openai.com/docs/api-reference/chat/create#chat-create-max_completion_tokens
    "api.openai.com": Dialect("max_completion_tokens"),
    # https://openrouter.ai/docs/api-reference/chat-completion
    "openrouter.ai": Dialect("max_completion_tokens"),
}


def parameters(host: str, model: str, settings: Settings) -> dict[str, object]:
    """Return what is sent along with the messages."""
    dialect = DIALECTS.get(host.lower(), Dialect())
    found: dict[str, object] = {"model": model, dialect.max_tokens: settings.max_tokens}
    if re.fullmatch(dialect.reasoning_models, model):
        found |= {"include_reasoning": False, "reasoning_effort": settings.reasoning_effort}
    return found
