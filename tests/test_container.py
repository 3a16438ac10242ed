"""The Dockerfile and the compose file, as far as they can be checked without a Docker engine."""

import re
from pathlib import Path
from typing import Any

import yaml

from chat import drain, shared_history, signals
from chat.config import Settings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
LONGEST_END = drain.FAREWELL_TIMEOUT + signals.SHUTDOWN_TIMEOUT + shared_history.CLOSE_TIMEOUT
"""Seconds that the end takes at most, once running replies have had their time."""


def test_the_compose_file_has_the_service_and_a_redis_with_health_checks() -> None:
    chat, redis = COMPOSE["services"]["chat"], COMPOSE["services"]["redis"]
    assert redis["image"] == "redis:7-alpine"
    assert redis["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]
    assert chat["environment"]["REDIS_ADDR"] == "redis:6379"
    assert chat["environment"]["GROQ_API_KEY"].startswith("${GROQ_API_KEY:?")
    assert "/health" in chat["healthcheck"]["test"][-1]
    assert (chat["read_only"], chat["tmpfs"]) == (True, ["/tmp"]), "several workers write there"  # noqa: S108
    assert "HEALTHCHECK" in DOCKERFILE


def test_docker_waits_for_the_whole_drain() -> None:
    settings = Settings(groq_api_key="key")
    needed = settings.drain_delay + settings.drain_timeout + LONGEST_END
    assert needed < float(COMPOSE["services"]["chat"]["stop_grace_period"].removesuffix("s"))


def test_the_image_is_pinned_not_root_and_gets_its_signals() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.13\.\d+-slim-bookworm", base) for base in bases)
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^CMD \[", DOCKERFILE, re.MULTILINE)


def test_all_that_the_image_copies_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_every_dependency_is_pinned_exactly() -> None:
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-audit.txt"):
        for line in (ROOT / file).read_text().splitlines():
            assert (
                line[:1] in ("", "#")
                or line.startswith("-r ")
                or re.match(r"[A-Za-z0-9_.-]+==[\w.]+($|;)", line)
            ), line
