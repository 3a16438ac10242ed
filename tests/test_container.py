"""The Dockerfile and the compose file, as far as they can be checked without a Docker engine."""

import re
from typing import Any

import yaml

from chat import __version__
from chat.config import Settings
from tests.servers import ROOT, Service

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SHUTDOWN_MARGIN = 10  # seconds that a shutdown may take beyond DRAIN_DELAY and DRAIN_TIMEOUT


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
    needed = settings.drain_delay + settings.drain_timeout + SHUTDOWN_MARGIN
    assert needed <= float(COMPOSE["services"]["chat"]["stop_grace_period"].removesuffix("s"))
    assert f"{SHUTDOWN_MARGIN} s" in (ROOT / "docs/operations.md").read_text()


def test_the_image_is_pinned_runs_as_a_user_and_receives_its_signals() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.13\.\d+-slim-bookworm", base) for base in bases)
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^CMD \[", DOCKERFILE, re.MULTILINE)
    workflow = (ROOT / ".github/workflows/ci.yaml").read_text()
    assert all(f"- run: {command}" in workflow for command in ("docker build", ".ci/run"))


def test_the_release_has_one_version(service: Service) -> None:
    assert yaml.safe_load((ROOT / "openapi.yaml").read_text())["info"]["version"] == __version__
    assert f'image.version="{__version__}"' in DOCKERFILE
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text()
    assert service.metric("chat_build_info", version=__version__) == 1


def test_every_file_that_the_image_copies_exists_and_is_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


def test_every_dependency_is_pinned_exactly() -> None:
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-audit.txt"):
        for line in (ROOT / file).read_text().splitlines():
            is_pin = re.match(r"[A-Za-z0-9_.-]+==[\w.]+($|;)", line)
            assert is_pin or line[:1] in ("", "#") or line.startswith("-r "), (file, line)
