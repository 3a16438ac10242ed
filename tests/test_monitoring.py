"""The dashboard and the alerts, as Prometheus itself reads them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from chat.errors import reasons
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import (
    ROOT,
    Process,
    RedisServer,
    Service,
    environment,
    free_port,
    wait_until,
)
from tests.test_container import COMPOSE

DEPLOY = ROOT / "deploy"
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$job": ".+", "$instance": ".+", "$__rate_interval": "5s"}
NO_METRICS = {"and", "or", "up", "ALERTS"}
"""Words of PromQL, and what Prometheus itself makes."""

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Prometheus is not installed"
)


def expressions() -> Iterator[str]:
    """Yield what the panels and the dashboard's annotations ask Prometheus for."""
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])
    yield from (annotation["expr"] for annotation in DASHBOARD["annotations"]["list"])


def filled(expression: str) -> str:
    """Put values in the place of Grafana's variables."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def metrics_in(expression: str) -> set[str]:
    """Return the names of metrics in an expression: words that are no function, label or value."""
    without_labels = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", " ", filled(expression))
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", without_labels)) - NO_METRICS


@pytest.fixture
def service(start_service: StartService, groq: FakeGroq, redis_server: RedisServer) -> Service:
    """A service that knows all it can know: Redis is there, and Groq lists its models."""
    groq.models = ["openai/gpt-oss-20b"]
    return start_service(REDIS_ADDR=redis_server.address)


def test_every_metric_that_is_asked_for_exists(service: Service) -> None:
    service.reply("hello")
    wait_until(lambda: service.metric("groq_model_available") == 1)
    families = text_string_to_metric_families(service.http.get("/metrics").text)
    shown = {sample.name for family in families for sample in family.samples}
    asked = [*expressions(), *(rule["expr"] for rule in ALERTS)]
    named = set().union(*map(metrics_in, asked))
    assert {"chat_replies_total", "redis_up", "process_open_fds"} <= named <= shown


def test_every_reason_that_an_alert_is_about_exists() -> None:
    asked = [found for rule in ALERTS for found in re.findall(r'reason=~?"([^"]+)"', rule["expr"])]
    named = {reason for each in asked for reason in each.split("|")}
    assert {"quota", "internal"} <= named <= reasons()


@needs_prometheus
def test_the_rules_do_what_their_unit_tests_say() -> None:
    for command in ("check rules alerts.yaml", "test rules alerts_test.yaml"):
        promtool(command)


def test_each_alert_has_a_unit_test_and_says_what_to_do() -> None:
    tests = (DEPLOY / "prometheus/alerts_test.yaml").read_text()
    for rule in ALERTS:
        assert f'alertname="{rule["alert"]}", severity="{rule["labels"]["severity"]}"' in tests
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def promtool(command: str, directory: Path = DEPLOY / "prometheus") -> None:
    ended = subprocess.run(
        ["promtool", *command.split()],  # noqa: S607  (wherever it is installed)
        cwd=directory,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


class Prometheus:
    """A real Prometheus that scrapes a service often, with the rules loaded."""

    def __init__(self, service: Service, directory: Path) -> None:
        shutil.copy(DEPLOY / "prometheus/alerts.yaml", directory)
        config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{service.port}"]}]
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        promtool("check config prometheus.yaml", directory)
        port = free_port()
        options = {
            "config.file": directory / "prometheus.yaml",
            "storage.tsdb.path": directory / "data",
            "web.listen-address": f"127.0.0.1:{port}",
        }
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        self.process = Process(command, environment({}), directory)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30)

    def get(self, path: str, **query: str) -> Any:
        answer = self._http.get(path, params=query).raise_for_status()
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        found = self.get("query", query=expression)["result"]
        return [float(sample["value"][1]) for sample in found]

    def is_up(self) -> bool:
        assert self.process.is_running, self.process.output
        try:
            return self.values('up{job="chat"}') == [1]
        except httpx.HTTPError:  # it listens before it is ready
            return False

    def close(self) -> None:
        self._http.close()
        self.process.end()


@pytest.fixture
def prometheus(service: Service, tmp_path: Path) -> Iterator[Prometheus]:
    prometheus = Prometheus(service, tmp_path)
    try:
        wait_until(prometheus.is_up)
        yield prometheus
    finally:
        prometheus.close()


@needs_prometheus
def test_every_panel_shows_figures_of_a_service_that_runs(
    service: Service, groq: FakeGroq, prometheus: Prometheus
) -> None:
    groq.on("fail", Script(status=500))
    *asked, alerts = map(filled, expressions())
    assert prometheus.values(alerts) == []

    def without_figures() -> list[str]:
        service.reply("hello")
        service.tokens("hello")
        service.chat("fail")
        found = {each: prometheus.values(each) for each in asked}
        return [each for each, values in found.items() if not any(map(isfinite, values))]

    wait_until(lambda: not without_figures())


@needs_prometheus
def test_the_rules_are_in_good_health_and_silent(prometheus: Prometheus) -> None:
    def health() -> list[str]:
        (group,) = prometheus.get("rules")["groups"]
        return [rule["health"] for rule in group["rules"]]

    wait_until(lambda: health() == ["ok"] * len(ALERTS))
    assert prometheus.values('ALERTS{alertstate="firing"}') == []


def test_each_panel_says_what_it_shows_and_none_lies_over_another() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        assert panel["type"] == "row" or panel["description"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_the_compose_file_brings_a_pinned_prometheus_and_grafana_when_asked_to() -> None:
    for name in ("prometheus", "grafana"):
        service = COMPOSE["services"][name]
        assert service["profiles"] == ["monitoring"]
        assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_what_grafana_is_given_fits_together() -> None:
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    environ = COMPOSE["services"]["grafana"]["environment"]
    assert environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted
    provisioning = DEPLOY / "grafana/provisioning"
    dashboards = yaml.safe_load((provisioning / "dashboards/chat.yaml").read_text())
    folder = dashboards["providers"][0]["options"]["path"]
    assert f"{folder}/dashboard.json" in mounted
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"chat:{COMPOSE['services']['chat']['environment']['METRICS_PORT']}"
