"""Settings: defaults, the environment, the `.env` file, and what a bad value says."""

from pathlib import Path

import pytest

from chat.config import Settings, SettingsError, load_settings

KEY = {"GROQ_API_KEY": "gsk_key"}


def load(environ: dict[str, str], env_file: Path | str = "/nowhere/.env") -> Settings:
    return load_settings({**KEY, **environ}, env_file)


def test_the_defaults_are_the_contracts() -> None:
    settings = load({})
    assert settings.port == 8000
    assert settings.redis_addr == "redis:6379"
    assert settings.max_tokens == 1024
    assert settings.max_exchanges == 20
    assert settings.model == "openai/gpt-oss-20b"
    assert settings.groq_base_url == "https://api.groq.com/openai/v1"
    assert settings.context_tokens == 131_072
    assert (settings.groq_connect_timeout, settings.groq_timeout) == (5.0, 60.0)
    assert settings.max_conversations == 10_000
    assert settings.conversation_ttl == 24 * 3600
    assert settings.shared_conversation is True


def test_the_environment_decides_and_is_trimmed() -> None:
    settings = load({"PORT": " 9000 ", "GROQ_TIMEOUT": "1.5", "SHARED_CONVERSATION": "False"})
    assert (settings.port, settings.groq_timeout) == (9000, 1.5)
    assert settings.shared_conversation is False


def test_an_env_file_fills_what_the_environment_lacks(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text('# ours\nPORT=9001\nMODEL=file-model\nSYSTEM_PROMPT="Be kind."\n')
    settings = load({"MODEL": "environment-model"}, env_file)
    assert (settings.port, settings.model) == (9001, "environment-model")
    assert settings.system_prompt == "Be kind."


def test_an_env_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_bytes(b"SYSTEM_PROMPT=\xff\n")
    with pytest.raises(SettingsError, match="must be readable text in UTF-8"):
        load({}, env_file)


def test_a_base_url_loses_its_last_slash() -> None:
    assert (
        load({"GROQ_BASE_URL": "http://[::1]:11434/v1/"}).groq_base_url == "http://[::1]:11434/v1"
    )


def test_redis_may_be_left_out() -> None:
    assert load({"REDIS_ADDR": ""}).redis_addr == ""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "http", "a whole number from 1 to 65,535, not 'http'"),
        ("PORT", "65536", "a whole number from 1 to 65,535, not '65536'"),
        ("PORT", "", "a whole number from 1 to 65,535, not ''"),
        ("MAX_TOKENS", "0", "a whole number from 1 to 1,000,000, not '0'"),
        ("MAX_EXCHANGES", "1.5", "a whole number from 1 to 1,000, not '1.5'"),
        ("GROQ_TIMEOUT", "nan", "a number of seconds from 0.01 to 3600, not 'nan'"),
        ("GROQ_TIMEOUT", "0", "a number of seconds from 0.01 to 3600, not '0'"),
        ("SHARED_CONVERSATION", "maybe", "true or false, not 'maybe'"),
        ("GROQ_BASE_URL", "api.groq.com", "an http:// or https:// URL"),
        ("GROQ_BASE_URL", "https://user:secret@groq/", "an http:// or https:// URL"),
        (
            "REDIS_ADDR",
            "redis",
            "host:port, such as redis:6379, a redis:// URL, or empty for no Redis, not 'redis'",
        ),
        ("GROQ_BASE_URL", "http://localhost:99999/v1", "an http:// or https:// URL"),
        ("GROQ_BASE_URL", "http://[zz/v1", "an http:// or https:// URL"),
        ("GROQ_BASE_URL", "http://a/\udcff", "an http:// or https:// URL"),
        ("GROQ_BASE_URL", "http://a..b/v1", "an http:// or https:// URL"),
        ("REDIS_ADDR", "localhost:99999", "host:port"),
        ("REDIS_ADDR", "a..b:6379", "host:port"),
        ("SYSTEM_PROMPT", "\udcff", "text in UTF-8"),
        ("MODEL", "two words", "the name of a model"),
        ("MODEL", "a\udcff", "the name of a model"),
        ("FALLBACK_MODEL", "a\udcff", "the name of a model"),
        ("REASONING_EFFORT", "none", "low, medium or high, not 'none'"),
        ("REDIS_ADDR", "http://redis:6379", "host:port"),
        ("REDIS_ADDR", "redis://a:1,b:2", "host:port"),
        ("REDIS_ADDR", "redis+cluster://a:1,b:2/3", "host:port"),
        ("REDIS_ADDR", "redis://:secret@redis:0", "host:port, such as redis:6379, a redis:// URL"),
        ("HISTORY_STORE", "disk", "memory or redis, not 'disk'"),
        ("MAX_CONNECTIONS_PER_CLIENT", "-1", "a whole number from 0 to 1,000,000, not '-1'"),
        ("RATE_LIMIT", "30", "a rate such as 30/minute"),
        ("RATE_LIMIT", "0/minute", "a rate such as 30/minute"),
        ("RATE_LIMIT", "30/week", "a rate such as 30/minute"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "addresses or networks such as 10.0.0.0/8"),
        ("TRUSTED_PROXIES", "proxy", "addresses or networks such as 10.0.0.0/8"),
        ("ALLOWED_ORIGINS", "example.com", "origins such as https://chat.example.com"),
        ("ALLOWED_ORIGINS", "https://example.com/", "origins such as https://chat.example.com"),
        ("LOG_LEVEL", "loud", "debug, info, warning or error, not 'loud'"),
        ("MAX_TOKENS", "131072", "less than CONTEXT_TOKENS (131072), not 131072"),
    ],
)
def test_a_bad_value_is_named_with_what_it_should_be(name: str, value: str, expected: str) -> None:
    with pytest.raises(SettingsError) as error:
        load({name: value})
    assert str(error.value).startswith(f"{name} must be {expected}")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("environ", [{}, {"GROQ_API_KEY": ""}, {"GROQ_API_KEY": "two words"}])
def test_a_key_is_required_and_never_shown(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"^GROQ_API_KEY .*must be an API key from") as error:
        load_settings(environ, "/nowhere/.env")
    assert "two words" not in str(error.value)
    assert "gsk_key" not in repr(load({}))


@pytest.mark.parametrize(
    "address",
    [
        "redis:6379",
        "[::1]:6379",
        "redis://redis:6379",
        "redis://redis",
        "rediss://user:password@[::1]/0",
        "redis+cluster://a,b:6380",
        "redis://:password@redis:6379/2",
        "rediss://user:p%40ss@redis.example.com:6380",
        "redis+cluster://a:6379,b:6379,c:6379",
        "rediss+cluster://user:password@a:6379",
    ],
)
def test_redis_is_named_by_an_address_or_a_url(address: str) -> None:
    assert load({"REDIS_ADDR": address}).redis_addr == address


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (
            {"WEB_CONCURRENCY": "2"},
            "WEB_CONCURRENCY=2 needs HISTORY_STORE=redis: each worker would",
        ),
        ({"HISTORY_STORE": "redis", "REDIS_ADDR": ""}, "HISTORY_STORE=redis needs REDIS_ADDR"),
    ],
)
def test_settings_that_do_not_go_together_are_told(environ: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load(environ)
