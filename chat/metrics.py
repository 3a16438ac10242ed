"""
Every metric of the service; the only global state, since a process is scraped as a whole.

With several workers on one machine, they write to files in PROMETHEUS_MULTIPROC_DIR, and each shows
the figures of all; `multiprocess_mode` says how gauges are put together.
"""

from math import nan

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from chat.errors import GroqDown, GroqError, reasons

__all__ = ["CONTENT_TYPE_LATEST", "forget_process", "render"]

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double a scrape

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

HTTP_REQUESTS = Counter(
    "http_requests_total", "HTTP requests answered.", ["method", "endpoint", "status"]
)
HTTP_REQUEST_DURATION = Histogram(
    "http_request_duration_seconds",
    "Time from a request to the end of its answer.",
    ["method", "endpoint"],
    buckets=SECONDS,
)
CHAT_REQUESTS = Counter("chat_requests_total", "Valid chat requests.", ["stream_type"])
CHAT_REPLIES = Counter("chat_replies_total", "Replies that have ended.", ["stream_type", "outcome"])
CHAT_REPLIES_ACTIVE = Gauge(
    "chat_replies_active", "Replies in progress.", ["stream_type"], multiprocess_mode="livesum"
)
CHAT_ERRORS = Counter(
    "chat_errors_total",
    "Requests and replies that ended in an error of the service's, by its word in the log.",
    ["reason"],
)
CHAT_TIME_TO_FIRST_TOKEN = Histogram(
    "chat_time_to_first_token_seconds",
    "Time from a chat request to the first token of its reply.",
    buckets=SECONDS,
)
CHAT_REPLY_DURATION = Histogram(
    "chat_reply_duration_seconds",
    "Time from a chat request to the end of its reply.",
    buckets=SECONDS,
)
CHAT_TOKENS = Counter(
    "chat_tokens_total", "Tokens as Groq reported them, else as estimated.", ["direction"]
)
GROQ_REQUESTS = Counter("groq_requests_total", "Requests to Groq.", ["outcome"])
GROQ_RETRIES = Counter("groq_retries_total", "Requests to Groq that were sent once more.")
GROQ_FALLBACKS = Counter(
    "groq_fallbacks_total", "Replies that the fallback model was asked for, as the first could not."
)
GROQ_CIRCUIT_STATE = Gauge(
    "groq_circuit_state",
    "0 while a model is asked, 2 while it is left alone, 1 in a probe.",
    ["model"],
    multiprocess_mode="livemax",
)
GROQ_MODEL_AVAILABLE = Gauge(
    "groq_model_available",
    "0 while Groq refuses the key or lacks the model, else 1.",
    ["model"],
    multiprocess_mode="livemin",
)
TOKEN_CACHE_LOOKUPS = Counter(
    "token_cache_lookups_total", "Messages whose token count was looked up.", ["result"]
)
HISTORY_CONVERSATIONS = Gauge(
    "history_conversations",
    "Conversations kept in the history; in a large Redis, by a sample.",
    multiprocess_mode="livemostrecent",
)
EVENT_LOOP_TASKS = Gauge(
    "event_loop_tasks", "Tasks of the event loop, when it was scraped.", multiprocess_mode="livesum"
)
HISTORY_LOST = Counter(
    "history_lost_exchanges_total", "Exchanges that could not be stored in the shared history."
)
REDIS_UP = Gauge(
    "redis_up",
    "1 while Redis takes what it is told, 0 while it does not, NaN where none is configured.",
    multiprocess_mode="livemin",
)

REDIS_UP.set(nan)
STREAM_TYPES = ("json", "sse", "websocket")
OUTCOMES = ("completed", "cancelled", "failed")

# A series that is there from the start shows its first increase.
for _stream_type in STREAM_TYPES:
    CHAT_REQUESTS.labels(_stream_type)
    CHAT_REPLIES_ACTIVE.labels(_stream_type)
    for _outcome in OUTCOMES:
        CHAT_REPLIES.labels(_stream_type, _outcome)
for _direction in ("prompt", "completion"):
    CHAT_TOKENS.labels(_direction)
for _result in ("hit", "miss"):
    TOKEN_CACHE_LOOKUPS.labels(_result)
for _reason in reasons():
    CHAT_ERRORS.labels(_reason)
for _outcome in ("completed", "cancelled", *(reasons(GroqError) - {GroqDown.reason})):
    GROQ_REQUESTS.labels(_outcome)


def render() -> bytes:
    """Return all metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    try:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    except ValueError:  # PROMETHEUS_MULTIPROC_DIR is not set: there is one process
        registry = REGISTRY
    return generate_latest(registry)


def forget_process(pid: int) -> None:
    """Take the gauges of a worker that has ended out of the sums."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]
