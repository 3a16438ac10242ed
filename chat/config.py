"""Settings: every variable that the service reads, once, in server.py."""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
from msgspec import Meta
from starlette.config import Config


class SettingsError(Exception):
    """A setting is missing or invalid; the message is one line that names the variable."""


HOST = r"([\w-]+(\.[\w-]+)*\.?|\[[0-9a-fA-F:.]+(%\w+)?\])"
PORT = r":([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
NODE = f"{HOST}({PORT})?"
URL = rf"rediss?://([^\s/?#@]*@)?{NODE}(/\d{{0,3}})?"
CLUSTER = rf"rediss?\+cluster://([^\s/?#@]*@)?{NODE}(,{NODE})*/?"
REDIS = rf"|{HOST}{PORT}|{URL}|{CLUSTER}"
RATE = r"|[1-9]\d{0,5}/(second|minute|hour|day)"
ORIGINS = r"(\s*(\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@,]+/?)?\s*(,|$))*"
LEVELS = "debug|info|warning|error"
CASELESS = {"allowed_origins", "history_store", "log_level", "reasoning_effort"}
BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
QUOTED = re.compile(r"""(?s)^(["'])((?:(?!\1).)*)\1$""")  # `docker run --env-file` leaves quotes
SECONDS = "a number of seconds"


def text(pattern: str, description: str) -> Meta:
    return Meta(pattern=f"^(?![\"'])({pattern})(?<![\"'])$", description=description)


def number(least: float, most: float, kind: str = "a whole number") -> Meta:
    return Meta(ge=least, le=most, description=f"{kind} from {least:,} to {most:,}")


Text = Annotated[str, Meta(description="text in UTF-8")]
Key = Annotated[str, text("[!-~]+", "an API key from https://console.groq.com/keys, unquoted")]
BaseURL = Annotated[str, text(rf"https?://{NODE}(/[^\s?#]*)?", "an http:// or https:// URL")]
Networks = Annotated[str, Meta(description="networks such as 10.0.0.0/8, separated by commas")]
Origins = Annotated[str, text(ORIGINS, "origins such as https://a.example, separated by commas")]
RedisAddress = Annotated[str, text(REDIS, "host:port, a redis:// URL, or empty for no Redis")]
Flag = Annotated[bool, Meta(description="true or false")]
Count = Annotated[int, number(1, 1_000_000)]
Timeout = Annotated[float, number(0.01, 86_400, SECONDS)]
Delay = Annotated[float, number(0, 3600, SECONDS)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Each field is the environment variable of its name in capitals; together they make sense."""

    groq_api_key: Key
    host: Annotated[str, text(r"[\w.:%-]*", "an address, a name such as localhost, or empty")] = ""
    port: Annotated[int, number(1, 65_535)] = 8000
    groq_base_url: BaseURL = "https://api.groq.com/openai/v1"
    groq_connect_timeout: Timeout = 5.0
    groq_first_event_timeout: Timeout = 30.0
    groq_timeout: Timeout = 60.0
    groq_max_retries: Annotated[int, number(0, 10)] = 2
    groq_circuit_failures: Count = 10
    reply_timeout: Timeout = 300.0
    model: Annotated[str, text(r"\S+", "the name of a model")] = "openai/gpt-oss-20b"
    fallback_model: Annotated[str, text(r"\S*", "the name of a model, or empty")] = ""
    reasoning_effort: Annotated[str, text("low|medium|high", "low, medium or high")] = "low"
    system_prompt: Text = ""
    max_tokens: Count = 1024
    context_tokens: Annotated[int, number(2, 100_000_000)] = 131_072
    max_exchanges: Annotated[int, number(1, 1000)] = 20
    shared_conversation: Flag = True
    history_store: Annotated[str, text("memory|redis", "memory or redis")] = "memory"
    max_conversations: Annotated[int, number(1, 10_000_000)] = 10_000
    conversation_ttl: Annotated[float, number(1, 31_536_000, SECONDS)] = 86_400.0
    max_history_bytes: Annotated[int, number(1, 1 << 40)] = 256 << 20
    rate_limit: Annotated[str, text(RATE, "a rate such as 30/minute, or empty")] = ""
    trusted_proxies: Networks = ""
    allowed_origins: Origins = ""
    max_concurrent: Count = 1000
    max_concurrent_per_client: Annotated[int, number(0, 1_000_000)] = 0
    max_body_bytes: Annotated[int, number(1, 1 << 30)] = 256 << 10
    body_timeout: Timeout = 15.0
    send_timeout: Timeout = 60.0
    idle_timeout: Timeout = 600.0
    keep_alive_interval: Timeout = 15.0
    keep_alive_timeout: Timeout = 75.0
    resume_timeout: Delay = 120.0
    drain_delay: Delay = 0.0
    drain_timeout: Delay = 30.0
    web_concurrency: Annotated[int, number(1, 1000)] = 1
    metrics_port: Annotated[int, number(0, 65_535)] = 0
    log_level: Annotated[str, text(LEVELS, "debug, info, warning or error")] = "info"
    chat_page: Flag = True
    redis_addr: RedisAddress = "redis:6379"
    redis_password: Text = ""

    def __repr__(self) -> str:
        return "Settings()"  # shows no key, wherever it is printed

    def __post_init__(self) -> None:
        limit, workers, wrong = self.context_tokens, self.web_concurrency, ""
        if self.max_tokens >= limit:
            wrong = f"MAX_TOKENS must be less than CONTEXT_TOKENS ({limit}), not {self.max_tokens}"
        elif self.fallback_model == self.model:
            wrong = f"FALLBACK_MODEL must differ from MODEL; both are {self.model!r}"
        elif self.history_store == "redis" and not self.redis_addr:
            wrong = "HISTORY_STORE=redis needs REDIS_ADDR, which is empty"
        elif self.history_store == "memory" and workers > 1:
            wrong = f"WEB_CONCURRENCY={workers} needs HISTORY_STORE=redis: each worker has its own"
        if wrong:
            raise SettingsError(wrong)


def load_settings(environ: Mapping[str, str] = os.environ, file: str | Path = ".env") -> Settings:
    """Read them from the environment, or from a file; raise `SettingsError` if one is wrong."""
    try:
        config = Config(file if Path(file).is_file() else None, environ)
    except (OSError, UnicodeDecodeError):
        raise SettingsError(f"{file} must be readable text in UTF-8") from None
    values = {}
    for field, hint in get_type_hints(Settings, include_extras=True).items():
        given: str | None = config(field.upper(), default=None)
        given = given and QUOTED.sub(r"\2", given.strip())
        if given or field == "groq_api_key" or (given == "" and field == "redis_addr"):
            values[field] = _parse(field, given or "", hint)  # for the others, empty is unset
    return Settings(**values)


def _parse(field: str, given: str, hint: Any) -> Any:
    kind, meta = get_args(hint)
    try:
        given.encode()  # bytes that are not UTF-8 come out of the environment as surrogates
        given = given.lower() if field in CASELESS else given
        given = BOOLEANS.get(given.lower(), given) if kind is bool else given
        value = msgspec.convert(given, hint, strict=False)
        for network in value.rstrip(", ").split(",") if field == "trusted_proxies" else ():
            ip_network(network.strip())  # or a ValueError
        return value
    except ValueError:
        is_secret = field in ("groq_api_key", "redis_password") or "@" in given
        shown = "the given value" if given and is_secret else repr(given[:100])
        raise SettingsError(f"{field.upper()} must be {meta.description}, not {shown}") from None


def proxy_for(url: str) -> str | None:
    """Return the proxy that HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY name for a URL."""
    address, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(address.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
