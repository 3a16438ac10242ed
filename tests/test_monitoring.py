"""The dashboard and the alerts, as Prometheus itself reads them."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_groq import FakeGroq, Script
from tests.servers import ROOT, Process, RedisServer, Service, free_port, output_of, wait_until
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
NO_METRICS = {"and", "or", "up", "ALERTS"}  # keywords, and what Prometheus itself provides

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Prometheus is not installed"
)


QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]


def filled(expression: str) -> str:
    """Replace Grafana's variables by values."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def metrics_in(expression: str) -> set[str]:
    """Return the metrics in an expression: words that are not functions, labels or values."""
    without_labels = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", " ", filled(expression))
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", without_labels)) - NO_METRICS


@pytest.fixture(scope="module")
def service(module_groq: FakeGroq) -> Iterator[Service]:
    """A service with every metric: it has a Redis, and Groq lists its models."""
    module_groq.models = ["openai/gpt-oss-20b"]
    module_groq.on("fail", Script(status=500))
    with (
        RedisServer() as redis_server,
        Service(GROQ_BASE_URL=module_groq.url, REDIS_ADDR=redis_server.address) as running,
    ):
        yield running


def test_every_metric_and_reason_in_a_query_exists(service: Service) -> None:
    service.reply("hello")
    wait_until(lambda: service.metric("groq_model_available") == 1)
    families = text_string_to_metric_families(service.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    queries = [*QUERIES, *(rule["expr"] for rule in ALERTS)]
    metrics = set().union(*map(metrics_in, queries))
    assert {"chat_replies_total", "redis_up", "process_open_fds"} <= metrics
    assert metrics <= {sample.name for sample in samples}
    found = re.findall(r'reason=~?"([^"]+)"', " ".join(queries))
    reasons = set("|".join(found).split("|"))
    assert {"quota", "internal"} <= reasons
    assert reasons <= {sample.labels.get("reason") for sample in samples}


@needs_prometheus
def test_every_alert_passes_its_unit_test_and_says_what_to_do() -> None:
    for command in ("check rules alerts.yaml", "test rules alerts_test.yaml"):
        output_of(["promtool", *command.split()], DEPLOY / "prometheus")
    tests = (DEPLOY / "prometheus/alerts_test.yaml").read_text()
    for rule in ALERTS:
        name, severity = rule["alert"], rule["labels"]["severity"]
        assert f'alertname="{name}", severity="{severity}"' in tests, name
        assert severity in ("critical", "warning"), name
        assert rule["annotations"].keys() == {"summary", "description"}, name


@pytest.fixture
def prometheus(service: Service, tmp_path: Path) -> Iterator[httpx.Client]:
    """The API of a real Prometheus with the alert rules, which scrapes the service often."""
    shutil.copy(DEPLOY / "prometheus/alerts.yaml", tmp_path)
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{service.port}"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    output_of(["promtool", "check", "config", "prometheus.yaml"], tmp_path)
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yaml", f"--web.listen-address={address}"]
    process = Process(["prometheus", *options], directory=tmp_path)

    def is_scraping() -> bool:
        assert process.is_running, process.output
        with suppress(httpx.HTTPError):  # it listens before it is ready
            return values(api, 'up{job="chat"}') == [1]
        return False

    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", timeout=30) as api:
            wait_until(is_scraping)
            yield api
    finally:
        process.end()


def values(api: httpx.Client, expression: str) -> list[float]:
    found = api.get("query", params={"query": expression}).raise_for_status().json()
    return [float(sample["value"][1]) for sample in found["data"]["result"]]


@needs_prometheus
def test_every_panel_shows_figures_and_no_alert_fires_while_the_service_runs(
    service: Service, prometheus: httpx.Client
) -> None:
    def health() -> list[str]:
        (group,) = prometheus.get("rules").json()["data"]["groups"]
        return [rule["health"] for rule in group["rules"]]

    wait_until(lambda: health() == ["ok"] * len(ALERTS))
    assert values(prometheus, 'ALERTS{alertstate="firing"}') == []
    *missing, _ = map(filled, QUERIES)  # the last is of alerts, and none fires

    def are_there() -> bool:
        service.reply("hello")
        service.tokens("hello")
        service.chat("fail")
        found = [query for query in missing if any(map(isfinite, values(prometheus, query)))]
        missing[:] = set(missing).difference(found)
        return not missing

    wait_until(are_there)


def test_every_panel_has_a_description_and_none_overlaps_another() -> None:
    taken = list[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        assert panel["type"] == "row" or panel["description"], panel["title"]
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert x + width <= 24, panel["title"]
        taken += product(range(x, x + width), range(y, y + height))
        assert len(set(taken)) == len(taken), panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_compose_file_has_an_optional_pinned_prometheus_and_grafana() -> None:
    for name in ("prometheus", "grafana"):
        service = COMPOSE["services"][name]
        assert service["profiles"] == ["monitoring"], name
        assert re.fullmatch(r"\w+/\w+:v?\d+\.\d+\.\d+", service["image"]), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_grafanas_files_and_addresses_fit_together() -> None:
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
