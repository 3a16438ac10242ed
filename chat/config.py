"""Settings: every variable that the service reads, once, in server.py."""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
from msgspec import Meta
from starlette.config import Config


class SettingsError(Exception):
    """A setting is missing or invalid; the message is one line that names the variable."""


HOST = r"([\w.-]+|\[[0-9a-fA-F:]+\])"
URL = rf"rediss?://([^\s/?#@]*@)?{HOST}(:\d{{1,5}})?(/\d{{0,3}})?"
CLUSTER = rf"rediss?\+cluster://([^\s/?#@]*@)?{HOST}(:\d{{1,5}})?(,{HOST}(:\d{{1,5}})?)*/?"
REDIS = rf"|{HOST}:\d{{1,5}}|{URL}|{CLUSTER}"


def text(pattern: str, description: str) -> Meta:
    return Meta(pattern=f"^(?![\"'])({pattern})(?<![\"'])$", description=description)


Text = Annotated[str, Meta(description="text in UTF-8")]
Key = Annotated[str, text("[!-~]+", "an API key from https://console.groq.com/keys, unquoted")]
BaseURL = Annotated[str, text(r"https?://[^\s/?#@]+(/[^\s?#]*)?", "an http:// or https:// URL")]
RATE = r"|[1-9]\d{0,5}/(second|minute|hour|day)"
Rate = Annotated[str, text(RATE, "a rate such as 30/minute, or empty")]
Networks = Annotated[str, Meta(description="networks such as 10.0.0.0/8, separated by commas")]
ORIGINS = r"(\s*(\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@,]+/?)?\s*(,|$))*"
Origins = Annotated[str, text(ORIGINS, "origins such as https://a.example, separated by commas")]
RedisAddress = Annotated[str, text(REDIS, "host:port, a redis:// URL, or empty for no Redis")]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Timeout = Annotated[float, Meta(ge=0.01, le=86_400)]
Delay = Annotated[float, Meta(ge=0, le=3600)]
QUOTED = re.compile(r"""(?s)^(["'])((?:(?!\1).)*)\1$""")  # `docker run --env-file` leaves quotes
BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Each field is the environment variable of its name in capitals; together they make sense."""

    groq_api_key: Key
    host: Annotated[str, text(r"[\w.:%-]*", "an address, a name such as localhost, or empty")] = ""
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8000
    groq_base_url: BaseURL = "https://api.groq.com/openai/v1"
    groq_connect_timeout: Timeout = 5.0
    groq_first_event_timeout: Timeout = 30.0
    groq_timeout: Timeout = 60.0
    groq_max_retries: Annotated[int, Meta(ge=0, le=10)] = 2
    groq_circuit_failures: Count = 10
    reply_timeout: Timeout = 300.0
    model: Annotated[str, text(r"\S+", "the name of a model")] = "openai/gpt-oss-20b"
    fallback_model: Annotated[str, text(r"\S*", "the name of a model, or empty")] = ""
    reasoning_effort: Literal["low", "medium", "high"] = "low"
    system_prompt: Text = ""
    max_tokens: Count = 1024
    context_tokens: Annotated[int, Meta(ge=2, le=100_000_000)] = 131_072
    max_exchanges: Annotated[int, Meta(ge=1, le=1000)] = 20
    shared_conversation: bool = True
    history_store: Literal["memory", "redis"] = "memory"
    max_conversations: Annotated[int, Meta(ge=1, le=10_000_000)] = 10_000
    conversation_ttl: Annotated[float, Meta(ge=1, le=31_536_000)] = 86_400.0
    max_history_bytes: Annotated[int, Meta(ge=1, le=1 << 40)] = 256 << 20
    rate_limit: Rate = ""
    trusted_proxies: Networks = ""
    allowed_origins: Origins = ""
    max_concurrent: Count = 1000
    max_concurrent_per_client: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    max_body_bytes: Annotated[int, Meta(ge=1, le=1 << 30)] = 256 << 10
    body_timeout: Timeout = 15.0
    send_timeout: Timeout = 60.0
    idle_timeout: Timeout = 600.0
    keep_alive_interval: Timeout = 15.0
    keep_alive_timeout: Timeout = 75.0
    resume_timeout: Delay = 120.0
    drain_delay: Delay = 0.0
    drain_timeout: Delay = 30.0
    web_concurrency: Annotated[int, Meta(ge=1, le=1000)] = 1
    metrics_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    chat_page: bool = True
    redis_addr: RedisAddress = "redis:6379"
    redis_password: Text = ""

    def __repr__(self) -> str:
        return "Settings()"  # shows no key, wherever it is printed

    def __post_init__(self) -> None:
        limit, workers, wrong = self.context_tokens, self.web_concurrency, ""
        if self.max_tokens >= limit:
            wrong = f"MAX_TOKENS must be less than CONTEXT_TOKENS ({limit}), not {self.max_tokens}"
        elif self.metrics_port == self.port:
            wrong = f"METRICS_PORT must differ from PORT; both are {self.port}"
        elif self.fallback_model == self.model:
            wrong = f"FALLBACK_MODEL must differ from MODEL; both are {self.model!r}"
        elif self.history_store == "redis" and not self.redis_addr:
            wrong = "HISTORY_STORE=redis needs REDIS_ADDR, which is empty"
        elif self.history_store == "memory" and workers > 1:
            wrong = (
                f"WEB_CONCURRENCY={workers} needs HISTORY_STORE=redis: each worker keeps its own"
            )
        if wrong:
            raise SettingsError(wrong)


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def load_settings(
    environ: Mapping[str, str] = os.environ, env_file: str | Path = ".env"
) -> Settings:
    """Read them from the environment, or from `env_file`; raise `SettingsError` if one is wrong."""
    try:
        config = Config(env_file if Path(env_file).is_file() else None, environ)
    except (OSError, UnicodeDecodeError):
        raise SettingsError(f"{env_file} must be readable text in UTF-8") from None
    values = {}
    for field, hint in get_type_hints(Settings, include_extras=True).items():
        given: str | None = config(field.upper(), default=None)
        given = given and QUOTED.sub(r"\2", given.strip())
        if given or field == "groq_api_key" or (given == "" and field == "redis_addr"):
            values[field] = _parse(field, given or "", hint)  # for the others, empty is unset
    settings = Settings(**values)
    proxy_for(settings.groq_base_url)  # one that cannot be used stops the start
    return settings


def _parse(field: str, given: str, hint: Any) -> Any:
    try:
        given.encode()  # bytes that are not UTF-8 come out of the environment as surrogates
        is_lowered = field == "allowed_origins" or get_origin(hint) is Literal
        given = BOOLEANS.get(given.lower(), given) if hint is bool else given
        value = msgspec.convert(given.lower() if is_lowered else given, hint, strict=False)
        # What no pattern finds, and would fail later, in each request:
        for network in parts(value) if field == "trusted_proxies" else ():
            ip_network(network)
        if field in ("groq_base_url", "redis_addr"):
            for node in value.rpartition("://")[2].rpartition("@")[2].split(","):
                address = urlsplit(f"//{node}")
                (address.hostname or "").encode("idna")
                if address.port == 0:
                    raise ValueError
        return value
    except ValueError:
        is_secret = field in ("groq_api_key", "redis_password") or "@" in given
        shown = "the given value" if given and is_secret else repr(given[:100])
        message = f"{field.upper()} must be {_expectation(hint)}, not {shown}"
        raise SettingsError(message) from None


def _expectation(hint: Any) -> str:
    """Return what a value of the type must be, for a message."""
    if hint is bool:
        return "true or false"
    if get_origin(hint) is Literal:
        *most, last = get_args(hint)
        return f"{', '.join(most)} or {last}"
    kind, meta = get_args(hint)
    what = "a whole number" if kind is int else "a number of seconds"
    return str(meta.description or f"{what} from {meta.ge:,} to {meta.le:,}")


def proxy_for(url: str) -> str | None:
    """Return the proxy that HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY name for a URL."""
    address, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(address.netloc):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        what = f"{address.scheme.upper()}_PROXY must be an http:// or https:// URL"
        raise SettingsError(what)
    return proxy
