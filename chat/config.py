"""
Settings: every variable that the service reads, its default and its check.

They are read once, at the front door, and handed down; of the environment, nothing else is read but
what prometheus-client has workers share their figures by (`chat.workers`).
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from starlette.config import Config

Network = IPv4Network | IPv6Network
Parse = Callable[[str], Any]


class SettingsError(Exception):
    """A setting is missing or has a bad value; its text is one line that names the variable."""


@dataclass(frozen=True)
class Kind:
    """How the text of a variable becomes a value, and what to say when it does not."""

    parse: Parse
    expected: str
    secret: bool = False


def integer(low: int, high: int) -> Kind:
    return Kind(within(int, low, high), f"a whole number from {low:,} to {high:,}")


def seconds(low: float, high: float) -> Kind:
    return Kind(within(float, low, high), f"a number of seconds from {low:g} to {high:g}")


def within(convert: Callable[[str], float], low: float, high: float) -> Parse:
    def parse(text: str) -> float:
        if not low <= (number := convert(text)) <= high:
            raise ValueError
        return number

    return parse


def matching(pattern: str, expected: str, *, secret: bool = False) -> Kind:
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError
        return text

    return Kind(parse, expected, secret)


def base_url(text: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", text) is None:
        raise ValueError
    _check_host_and_port(text)
    return text.rstrip("/")


HOST = r"([\w.-]+|\[[0-9a-fA-F:]+\])"
ADDRESS = rf"{HOST}:\d{{1,5}}"
NODE = rf"{HOST}(:\d{{1,5}})?"
CREDENTIALS = r"([^\s/?#@]*@)?"
REDIS_URL = re.compile(rf"rediss?://{CREDENTIALS}(?P<nodes>{NODE})(/\d{{0,3}})?")
CLUSTER_URL = re.compile(rf"rediss?\+cluster://{CREDENTIALS}(?P<nodes>{NODE}(,{NODE})*)/?")


def redis_address(text: str) -> str:
    if not text:
        return text
    if "://" not in text and re.fullmatch(ADDRESS, text) is None:
        raise ValueError
    url = text if "://" in text else f"redis://{text}"
    found = REDIS_URL.fullmatch(url) or CLUSTER_URL.fullmatch(url)
    if found is None:
        raise ValueError
    for node in found["nodes"].split(","):
        _check_host_and_port(f"redis://{node}")
    return text


def _check_host_and_port(url: str) -> None:
    """Raise `ValueError` for what could only fail later, in each request."""
    parts = urlsplit(url)
    (parts.hostname or "").encode("idna")
    if parts.port == 0:
        raise ValueError


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in so many seconds."""

    limit: int
    unit: str

    @property
    def window(self) -> int:
        return UNITS[self.unit]

    def __str__(self) -> str:
        return f"{self.limit} request{'s' if self.limit > 1 else ''} per {self.unit}"


UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}


def rate(text: str) -> Rate | None:
    if not text:
        return None
    limit, _, unit = text.partition("/")
    if unit not in UNITS:
        raise ValueError
    return Rate(integer(1, 1_000_000).parse(limit), unit)


def networks(text: str) -> tuple[Network, ...]:
    return tuple(map(ip_network, _parts(text)))


def origins(text: str) -> tuple[str, ...]:
    found = tuple(_parts(text.lower()))
    if not all(re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@]+", each) for each in found):
        raise ValueError
    return found


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
BOOLEAN = Kind(lambda text: BOOLEANS[text.lower()], "true or false")
ANY_TEXT = Kind(str, "text in UTF-8")
ANY_SECRET = Kind(str, "text in UTF-8", secret=True)
BASE_URL = Kind(base_url, "an http:// or https:// URL such as https://api.groq.com/openai/v1")
API_KEY = matching(r"[!-~]+", "an API key from https://console.groq.com/keys", secret=True)
MODEL_NAME = matching(r"\S+", "the name of a model, such as openai/gpt-oss-20b")
OPTIONAL_MODEL_NAME = matching(r"\S*", "the name of a model, or empty for none")
EFFORT = matching("low|medium|high", "low, medium or high")
RATE = Kind(rate, "a rate such as 30/minute (second, minute, hour, day), or empty for none")
NETWORKS = Kind(networks, "addresses or networks such as 10.0.0.0/8, with commas between them")
ORIGINS = Kind(origins, "origins such as https://chat.example.com, with commas between them")
LEVEL = matching("debug|info|warning|error", "debug, info, warning or error")
REDIS_ADDRESS = Kind(
    redis_address, "host:port, such as redis:6379, a redis:// URL, or empty for no Redis"
)


def setting(kind: Kind, default: Any = ...) -> Any:
    """Declare a field of `Settings`; without a default the variable is required."""
    metadata = {"kind": kind}
    return field(metadata=metadata, **({} if default is ... else {"default": default}))


@dataclass(frozen=True, repr=False)  # a repr would show the secrets
class Settings:
    """What the operator decides. Each field is the environment variable of its name in capitals."""

    groq_api_key: str = setting(API_KEY)
    port: int = setting(integer(1, 65_535), 8000)
    groq_base_url: str = setting(BASE_URL, "https://api.groq.com/openai/v1")
    groq_connect_timeout: float = setting(seconds(0.01, 600), 5.0)
    groq_first_event_timeout: float = setting(seconds(0.01, 3600), 30.0)
    groq_timeout: float = setting(seconds(0.01, 3600), 60.0)
    groq_max_retries: int = setting(integer(0, 10), 2)
    groq_circuit_failures: int = setting(integer(1, 1_000_000), 10)
    reply_timeout: float = setting(seconds(0.01, 86_400), 300.0)
    model: str = setting(MODEL_NAME, "openai/gpt-oss-20b")
    fallback_model: str = setting(OPTIONAL_MODEL_NAME, "")
    reasoning_effort: str = setting(EFFORT, "low")
    system_prompt: str = setting(ANY_TEXT, "")
    max_tokens: int = setting(integer(1, 1_000_000), 1024)
    context_tokens: int = setting(integer(2, 100_000_000), 131_072)
    max_exchanges: int = setting(integer(1, 1000), 20)
    shared_conversation: bool = setting(BOOLEAN, True)
    history_store: str = setting(matching("memory|redis", "memory or redis"), "memory")
    max_conversations: int = setting(integer(1, 10_000_000), 10_000)
    conversation_ttl: float = setting(seconds(1, 31_536_000), 86_400.0)
    max_history_bytes: int = setting(integer(1, 1 << 40), 256 << 20)
    rate_limit: Rate | None = setting(RATE, None)  # noqa: RUF009  (declares a field)
    trusted_proxies: tuple[Network, ...] = setting(NETWORKS, ())
    allowed_origins: tuple[str, ...] = setting(ORIGINS, ())
    max_concurrent: int = setting(integer(1, 1_000_000), 1000)
    max_concurrent_per_client: int = setting(integer(0, 1_000_000), 0)
    max_connections_per_client: int = setting(integer(0, 1_000_000), 0)
    max_body_bytes: int = setting(integer(1, 1 << 30), 256 << 10)
    body_timeout: float = setting(seconds(0.01, 3600), 15.0)
    send_timeout: float = setting(seconds(0.01, 3600), 60.0)
    idle_timeout: float = setting(seconds(0.01, 86_400), 600.0)
    keep_alive_interval: float = setting(seconds(0.01, 3600), 15.0)
    drain_delay: float = setting(seconds(0, 3600), 0.0)
    drain_timeout: float = setting(seconds(0, 3600), 30.0)
    web_concurrency: int = setting(integer(1, 1000), 1)
    metrics_port: int = setting(integer(0, 65_535), 0)
    log_level: str = setting(LEVEL, "info")
    chat_page: bool = setting(BOOLEAN, True)
    redis_addr: str = setting(REDIS_ADDRESS, "redis:6379")
    redis_password: str = setting(ANY_SECRET, "")


def load_settings(
    environ: Mapping[str, str] = os.environ,
    env_file: str | Path = ".env",
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """
    Read the settings from the environment, or from `env_file` for what the environment lacks;
    `overrides` go before both.

    Raises:
        SettingsError: a variable is missing or has a bad value.
    """
    try:
        config = Config(env_file if Path(env_file).is_file() else None, environ)
    except (OSError, UnicodeDecodeError):
        raise SettingsError(f"{env_file} must be readable text in UTF-8") from None
    values = {}
    for each in fields(Settings):
        name = each.name.upper()
        text = overrides.get(name, config(name, default=None))
        if text is not None:
            values[each.name] = _parse(name, text.strip(), each.metadata["kind"])
    return _checked(values)


def _parse(name: str, text: str, kind: Kind) -> Any:
    try:
        text.encode()  # bytes that are not UTF-8 come out of the environment as surrogates
        return kind.parse(text)
    except (ValueError, KeyError):
        is_secret = kind.secret or "@" in text  # a URL with a password
        shown = "the given value" if is_secret else repr(text[:100])
        raise SettingsError(f"{name} must be {kind.expected}, not {shown}") from None


def _checked(values: dict[str, Any]) -> Settings:
    if "groq_api_key" not in values:
        raise SettingsError(f"GROQ_API_KEY is not set; it must be {API_KEY.expected}")
    settings = Settings(**values)
    if settings.max_tokens >= settings.context_tokens:
        raise SettingsError(
            f"MAX_TOKENS must be less than CONTEXT_TOKENS ({settings.context_tokens}), "
            f"not {settings.max_tokens}"
        )
    if settings.metrics_port == settings.port:
        raise SettingsError(f"METRICS_PORT must be another than PORT, not {settings.port} too")
    if settings.fallback_model == settings.model:
        raise SettingsError(
            f"FALLBACK_MODEL must be another than MODEL, not {settings.model!r} too"
        )
    if settings.history_store == "redis" and not settings.redis_addr:
        raise SettingsError("HISTORY_STORE=redis needs REDIS_ADDR, which is empty")
    if settings.history_store == "memory" and settings.web_concurrency > 1:
        raise SettingsError(
            f"WEB_CONCURRENCY={settings.web_concurrency} needs HISTORY_STORE=redis: each worker "
            "would have a history of its own, and a conversation would depend on who answers"
        )
    return settings
