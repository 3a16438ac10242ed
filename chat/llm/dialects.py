"""What differs between servers: parameters, and words for how a reply ends. Pure functions."""

import re
from typing import Any

from chat.config import Settings
from chat.errors import GroqError, GroqFailed, GroqRefused, GroqReplyEmpty

# By their references of the API; any other host gets `max_tokens`, which all servers know.
TAKE_MAX_COMPLETION_TOKENS = {"api.groq.com", "api.openai.com", "openrouter.ai"}
# The words of eight kinds of servers, in lower case; any other says that the reply has failed.
FINISH_REASONS = {
    word: reason
    for reason, words in {
        "stop": "stop eos eos_token end_turn stop_sequence complete",
        "length": "length max_tokens max_output_tokens model_length model_context_window_exceeded",
        "content_filter": "content_filter content_filtered safety recitation blocklist language "
        "spii prohibited_content sensitive refusal guardrail_intervened image_safety "
        "image_prohibited_content",
        "tool_calls": "tool_calls function_call tool_call tool_use",
    }.items()
    for word in words.split()
}
# What to say of a reply without text, by its finish reason.
EMPTY = {
    "length": "used up its {} tokens before it wrote any text",
    "content_filter": "wrote no text that its content filter passed",
    "tool_calls": "asked for a tool, and wrote no text",
}
FILTERED = r"content.?(filter|policy)|moderation"
# What an error's `code`, `type` or `status` says, else its message; the first row found holds.
STATUSES = {
    429: r"rate.?limit|quota|too.?many.?requests|resource.?exhausted|throttl",
    404: r"not.?found|decommissioned|no.?such.?model|model.{0,9}(not.?active|unavailable)",
    401: r"api.?key|authentication|unauth(orized|enticated)",
    403: r"permission|forbidden|access.?denied",
    503: r"overload|unavailable|capacity|insufficient.?system.?resource",
    422: r"unprocessable",
    400: rf"invalid.?(request|argument|parameter|prompt)|bad.?request|validation|{FILTERED}",
}
TOO_LARGE = re.compile(
    r"context.{0,20}(length|size|limit)|context.?window(?!. for this model)|reduce the length"
    r"|max(imum)?.(model|prompt|input).len|(prompt|input|request|messages?)( is| are)? too long"
    r"|(request|payload|entity|content|body|input|prompt).too.large|input.length|input token count"
    r"|too many (input )?tokens|model token limit|exceeds (max|the maximum allowed) length"
    r"|must have less than \d+ tokens|max_new_tokens. must be",
    re.I,
)


def parameters(host: str, model: str, settings: Settings, *, is_stream: bool) -> dict[str, object]:
    """Return what is sent along with the messages; the host is in lower case."""
    limit = "max_completion_tokens" if host in TAKE_MAX_COMPLETION_TOKENS else "max_tokens"
    found = {"model": model, limit: settings.max_tokens}
    if host == "api.groq.com" and re.fullmatch(r"openai/gpt-oss-\d+b", model):
        # https://console.groq.com/docs/reasoning
        found |= {"include_reasoning": False, "reasoning_effort": settings.reasoning_effort}
    if is_stream:
        found["stream"] = True
    if is_stream and host != "api.mistral.ai":
        # Mistral sends usage by itself, and refuses to be asked: https://docs.mistral.ai/api
        found["stream_options"] = {"include_usage": True}
    return found


def failure(status: int, said: Any, retry_after: int = 0) -> GroqError:
    """Return what an error means: by the status of its response or, in a 200, by what it says."""
    members = _members(said)
    told = [str(members[name]) for name in ("code", "status", "type") if members.get(name)]
    message = str(members.get("message", ""))[:10_000]
    is_in_200, words = status == 200, " ".join(told) or message
    if is_in_200:
        status = next((int(each) for each in told if re.fullmatch("[45]\\d\\d", each)), 500)
    if status in (400, 413, 422, 500) and TOO_LARGE.search(f"{words} {message}"):
        return GroqRefused(413 if status == 500 else status, is_too_large=True)
    if status in (400, 500):  # servers use them for everything
        matching = (each for each, row in STATUSES.items() if re.search(row, words, re.I))
        status = next(matching, status)
    if status == 400 and re.search(FILTERED, words, re.I):
        return GroqReplyEmpty(EMPTY["content_filter"])
    if is_in_200 and status >= 500 and status != 503:
        cause = " ".join(told) or (said if isinstance(said, str) else "")
        return GroqFailed(cause=cause if re.fullmatch(r"[\w .-]{1,60}", cause) else "")
    return GroqRefused(status, retry_after, is_too_large=status == 413)


def error_in(event: dict[str, Any]) -> Any:
    """Return the error in an event; a false value if there is none."""
    extra, choices = event.get("x_groq"), event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for holder in (event, extra, choice):
        error = holder.get("error") if isinstance(holder, dict) else None
        if any(error.values()) if isinstance(error, dict) else error:
            return error if holder is choice else event
    says_so = "error" in (event.get("object"), event.get("type"), event.get("status"))
    has_message = event.get("detail") or (event.get("message") and event.get("code"))
    return event if not choice and (says_so or has_message) else None


def _members(said: Any) -> dict[str, Any]:
    """Return the members of an error, whatever it is wrapped in; the innermost go first."""
    members: dict[str, Any] = {}
    while said and isinstance(said, dict | list):
        if isinstance(said, list):
            said = said[0]
        else:
            members |= {name: value for name, value in said.items() if value}
            said = said.get("error") or said.get("detail") or said.get("x_groq")
    return members | {"message": said} if isinstance(said, str) else members
