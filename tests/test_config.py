"""Settings: defaults, the environment, the `.env` file, and what a bad value says."""

from pathlib import Path

import pytest

from chat.config import Settings, SettingsError, load_settings

KEY = {"GROQ_API_KEY": "gsk_key"}
API_KEY = "an API key from https://console.groq.com/keys"
URL = "an http:// or https:// URL"
REDIS = "host:port, a redis:// URL, or empty for no Redis"
RATE = "a rate such as 30/minute, or empty"
ORIGINS = "origins such as https://a.example, separated by commas"


def load(environ: dict[str, str], env_file: Path | str = "/nowhere/.env") -> Settings:
    return load_settings({**KEY, **environ}, env_file)


def test_the_environment_decides_and_an_env_file_fills_what_it_lacks(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text('# ours\nPORT=9001\nMODEL=file-model\nSYSTEM_PROMPT="Be kind."\n')
    settings = load({"MODEL": " its-model ", "SHARED_CONVERSATION": "False"}, env_file)
    assert (settings.port, settings.model) == (9001, "its-model")
    assert (settings.system_prompt, settings.shared_conversation) == ("Be kind.", False)
    assert load({"GROQ_TIMEOUT": "1.5"}).groq_timeout == 1.5


def test_an_env_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_bytes(b"SYSTEM_PROMPT=\xff\n")
    with pytest.raises(SettingsError, match="must be readable text in UTF-8"):
        load({}, env_file)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "http", "a whole number from 1 to 65,535, not 'http'"),
        ("PORT", "65536", "a whole number from 1 to 65,535, not '65536'"),
        ("MAX_EXCHANGES", "1.5", "a whole number from 1 to 1,000, not '1.5'"),
        ("GROQ_TIMEOUT", "nan", "a number of seconds from 0.01 to 86,400, not 'nan'"),
        ("GROQ_TIMEOUT", "0", "a number of seconds from 0.01 to 86,400, not '0'"),
        ("SHARED_CONVERSATION", "maybe", "true or false, not 'maybe'"),
        ("GROQ_BASE_URL", "api.groq.com", f"{URL}, not 'api.groq.com'"),
        ("GROQ_BASE_URL", "https://user:secret@groq/", f"{URL}, not the given value"),
        ("GROQ_BASE_URL", "http://localhost:99999/v1", URL),
        ("GROQ_BASE_URL", "http://[zz/v1", URL),
        ("GROQ_BASE_URL", "http://a..b/v1", URL),
        ("REDIS_ADDR", "redis", f"{REDIS}, not 'redis'"),
        ("REDIS_ADDR", "localhost:99999", REDIS),
        ("REDIS_ADDR", "a..b:6379", REDIS),
        ("REDIS_ADDR", "http://redis:6379", REDIS),
        ("REDIS_ADDR", "redis://a:1,b:2", REDIS),
        ("REDIS_ADDR", "redis+cluster://a:1,b:2/3", REDIS),
        ("REDIS_ADDR", "redis://:secret@redis:0", f"{REDIS}, not the given value"),
        ("SYSTEM_PROMPT", "\udcff", "text in UTF-8"),
        ("MODEL", "two words", "the name of a model, not 'two words'"),
        ("REASONING_EFFORT", "none", "low, medium or high, not 'none'"),
        ("MAX_CONCURRENT_PER_CLIENT", "-1", "a whole number from 0 to 1,000,000, not '-1'"),
        ("RATE_LIMIT", "30", f"{RATE}, not '30'"),
        ("RATE_LIMIT", "0/minute", RATE),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "networks such as 10.0.0.0/8, separated by commas"),
        ("TRUSTED_PROXIES", "proxy", "networks such as 10.0.0.0/8, separated by commas"),
        ("ALLOWED_ORIGINS", "example.com", f"{ORIGINS}, not 'example.com'"),
        ("ALLOWED_ORIGINS", "https://example.com/a", ORIGINS),
        ("HOST", "[::1]", "an address, a name such as localhost, or empty, not '[::1]'"),
        ("GROQ_API_KEY", '"gsk_key', f"{API_KEY}, unquoted, not the given value"),
        ("GROQ_API_KEY", "gsk_key'", f"{API_KEY}, unquoted, not the given value"),
        ("GROQ_BASE_URL", 'http://localhost/v1"', f"{URL}, not 'http://localhost/v1\"'"),
        ("MODEL", "'llama", 'the name of a model, not "\'llama"'),
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


GOOD = {
    "REDIS_ADDR": "|redis:6379|[::1]:6379|redis://redis|redis://:password@redis:6379/2"
    "|rediss://user:p%40ss@[::1]/0|redis+cluster://a,b:6380|rediss+cluster://user:password@a:6379",
    "HOST": "|127.0.0.1|::1|fe80::1%eth0|localhost",
    "GROQ_BASE_URL": "http://[::1]:11434/v1|http://ollama:11434",
    "RATE_LIMIT": "|1/second|999999/day",
    "TRUSTED_PROXIES": "|10.0.0.1|10.0.0.0/8, 2001:db8::/32",
    "ALLOWED_ORIGINS": "|*|null, https://a.example/|https://a.example:8443,http://localhost",
}


def test_good_values_are_taken_as_they_are() -> None:
    for name, values in GOOD.items():
        for value in values.split("|"):
            assert getattr(load({name: value}), name.lower()) == value


def test_settings_that_do_not_go_together_are_told() -> None:
    for told, environ in {
        "WEB_CONCURRENCY=2 needs HISTORY_STORE=redis: each worker": {"WEB_CONCURRENCY": "2"},
        "HISTORY_STORE=redis needs REDIS_ADDR": {"HISTORY_STORE": "redis", "REDIS_ADDR": ""},
        "FALLBACK_MODEL must differ from MODEL; both": {"FALLBACK_MODEL": "a", "MODEL": "a"},
    }.items():
        with pytest.raises(SettingsError, match=told):
            load(environ)


def test_a_value_is_taken_as_it_is_meant() -> None:
    for name, given, meant in (
        ("LOG_LEVEL", "INFO", "info"),
        ("CHAT_PAGE", "no", False),
        ("CHAT_PAGE", "'Off'", False),
        ("SHARED_CONVERSATION", "ON", True),
        ("GROQ_API_KEY", '"gsk_x"', "gsk_x"),
        ("PORT", "'9000'", 9000),
        ("SYSTEM_PROMPT", '"Be kind."', "Be kind."),
        ("SYSTEM_PROMPT", '"Yes" or "no"', '"Yes" or "no"'),
        ("SYSTEM_PROMPT", "no", "no"),
        ("MAX_TOKENS", "", 1024),
        ("MODEL", ' "" ', "openai/gpt-oss-20b"),
        ("REDIS_ADDR", "", ""),
    ):
        assert getattr(load({name: given}), name.lower()) == meant
