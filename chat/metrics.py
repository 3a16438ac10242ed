"""Every metric of the service; the only global state, since a process is scraped as a whole."""

from functools import cache, partial

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, multiprocess

from chat import __version__
from chat.errors import GroqCircuitOpen, GroqError, reasons

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double a scrape

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
duration = partial(Histogram, buckets=SECONDS)
total = partial(Gauge, multiprocess_mode="livesum")  # of all workers; the others are their extremes
largest = partial(Gauge, multiprocess_mode="livemax")
smallest = partial(Gauge, multiprocess_mode="livemin")

ROUTE = ("method", "endpoint")
HTTP_REQUESTS = Counter("http_requests_total", "HTTP requests.", [*ROUTE, "status"])
HTTP_REQUEST_DURATION = duration("http_request_duration_seconds", "Time of a response.", ROUTE)
CHAT_REQUESTS = Counter("chat_requests_total", "Valid chat requests.", ["stream_type"])
CHAT_REPLIES = Counter("chat_replies_total", "Replies that have ended.", ["stream_type", "outcome"])
CHAT_FINISH_REASONS = Counter("chat_finish_reasons_total", "Completed replies.", ["reason"])
CHAT_REPLIES_ACTIVE = total("chat_replies_active", "Replies in progress.", ["stream_type"])
CHAT_ERRORS = Counter("chat_errors_total", "Requests and replies that failed.", ["reason"])
CHAT_TIME_TO_FIRST_TOKEN = duration("chat_time_to_first_token_seconds", "Time to the first token.")
CHAT_REPLY_DURATION = duration("chat_reply_duration_seconds", "Time to the end of a reply.")
CHAT_TOKENS = Counter("chat_tokens_total", "Tokens as Groq reports them.", ["direction"])
CHAT_RESUMES = Counter("chat_resumes_total", "Replies that were resumed.", ["result"])
CHAT_REPLIES_UNATTENDED = total("chat_replies_unattended", "Replies that nobody reads now.")
CHAT_UNATTENDED_TOKENS = Counter("chat_unattended_tokens_total", "Tokens that came meanwhile.")
GROQ_REQUESTS = Counter("groq_requests_total", "Requests to Groq.", ["outcome"])
GROQ_RETRIES = Counter("groq_retries_total", "Requests to Groq that were retried.")
GROQ_FALLBACKS = Counter("groq_fallbacks_total", "Replies that fell back to FALLBACK_MODEL.")
GROQ_CIRCUIT_STATE = largest("groq_circuit_state", "0: closed, 1: half-open, 2: open.", ["model"])
GROQ_MODEL_AVAILABLE = smallest("groq_model_available", "0: no such model, or bad key.", ["model"])
TOKEN_CACHE_LOOKUPS = Counter("token_cache_lookups_total", "Token counts looked up.", ["result"])
HISTORY_CONVERSATIONS = total("history_conversations", "Conversations kept in memory.")
HISTORY_LOST = Counter("history_lost_exchanges_total", "Exchanges that Redis did not store.")
EVENT_LOOP_TASKS = total("event_loop_tasks", "Tasks of the event loop.")
REDIS_UP = smallest("redis_up", "1 if Redis accepts commands, NaN if there is none.")
REDIS_UP.set(float("nan"))
largest("chat_build_info", "1 for the running version.", ["version"]).labels(__version__).set(1)

STREAM_TYPES = ("json", "sse", "websocket")
OUTCOMES = ("completed", "cancelled", "failed")
FINISH_REASONS = ("stop", "length", "content_filter", "refusal", "tool_calls")
GROQ_OUTCOMES = {*OUTCOMES[:2], "internal", "quota", *reasons(GroqError)} - {GroqCircuitOpen.reason}

# Children are looked up once, and a series that exists from the start shows its first increase.
requests = {name: CHAT_REQUESTS.labels(name) for name in STREAM_TYPES}
active = {name: CHAT_REPLIES_ACTIVE.labels(name) for name in STREAM_TYPES}
replies = {(name, how): CHAT_REPLIES.labels(name, how) for name in STREAM_TYPES for how in OUTCOMES}
finish_reasons = {reason: CHAT_FINISH_REASONS.labels(reason) for reason in FINISH_REASONS}
resumes = {result: CHAT_RESUMES.labels(result) for result in ("here", "elsewhere", "lost")}
prompt_tokens, completion_tokens = map(CHAT_TOKENS.labels, ("prompt", "completion"))
cache_hits, cache_misses = map(TOKEN_CACHE_LOOKUPS.labels, ("hit", "miss"))
errors = {reason: CHAT_ERRORS.labels(reason) for reason in reasons()}
groq_requests = {outcome: GROQ_REQUESTS.labels(outcome) for outcome in GROQ_OUTCOMES}
http_requests = cache(HTTP_REQUESTS.labels)
http_request_duration = cache(HTTP_REQUEST_DURATION.labels)


def render() -> bytes:
    return prometheus_client.generate_latest(_registry())


def serve(address: tuple[str, int, *tuple[int, ...]], **_: object) -> None:
    """Serve the metrics on a port of their own, from a thread, until the process ends."""
    prometheus_client.start_http_server(address[1], address[0], _registry())


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    try:
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    except ValueError:  # PROMETHEUS_MULTIPROC_DIR is not set: there is one process
        return REGISTRY
    return registry
