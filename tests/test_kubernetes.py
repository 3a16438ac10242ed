"""The Kubernetes manifests: against Kubernetes' own schemas, each other, and the service."""

import ipaddress
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes_validate import (  # type: ignore[import-untyped]  # it ships no types
    ValidationError,
    validate,
)

from chat.config import Settings, SettingsError, load_settings
from tests.test_container import COMPOSE, DOCKERFILE, LONGEST_END, ROOT

Manifest = dict[str, Any]

FOLDER = ROOT / "deploy" / "kubernetes"
README = (FOLDER / "README.md").read_text()
KUSTOMIZATION: Manifest = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: list[Manifest] = [
    manifest
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for manifest in yaml.safe_load_all(path.read_text())
]
BY_NAME = {f"{each['kind']}/{each['metadata']['name']}": each for each in MANIFESTS}
WORKLOADS = [each for each in MANIFESTS if each["kind"] in ("Deployment", "StatefulSet")]

DEPLOYMENT, REDIS = BY_NAME["Deployment/chat"], BY_NAME["StatefulSet/redis"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CHAT,) = POD["containers"]
(REDIS_CONTAINER,) = REDIS["spec"]["template"]["spec"]["containers"]
ENV = {each["name"]: each["value"] for each in CHAT["env"] if "value" in each}
SECRET = BY_NAME["Secret/chat"]["stringData"]

OLDEST, NEWEST = "1.31", "1.37"
"""The Kubernetes from which on the manifests apply as they stand, and the last that is known."""
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_manifest_is_what_kubernetes_takes(name: str, version: str) -> None:
    assert validate(BY_NAME[name], version, strict=True) == version


@pytest.mark.parametrize("name", BY_NAME)
def test_a_misspelt_field_is_refused_at_any_depth(name: str) -> None:
    for path in objects(BY_NAME[name]):
        misspelt = deepcopy(BY_NAME[name])
        at(misspelt, path)["mispelt"] = {}
        with pytest.raises(ValidationError, match="mispelt"):
            validate(misspelt, NEWEST, strict=True)


def test_a_number_where_a_text_belongs_is_refused() -> None:
    wrong = deepcopy(DEPLOYMENT)
    wrong["spec"]["template"]["spec"]["containers"][0]["env"][-1]["value"] = 30
    with pytest.raises(ValidationError, match="30 is not"):
        validate(wrong, NEWEST, strict=True)


def objects(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to each object whose fields Kubernetes knows; a map's keys are free."""
    free = {"annotations", "labels", "matchLabels", "limits", "requests", "selector", "stringData"}
    if isinstance(node, dict):
        if not (path and path[-1] in free and all(isinstance(v, str) for v in node.values())):
            yield path
        for key, value in node.items():
            yield from objects(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from objects(value, (*path, index))


def at(node: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        node = node[step]
    return node


def test_the_kustomization_lists_every_manifest_but_the_secret_example() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")}
    assert set(KUSTOMIZATION["resources"]) == files - {"kustomization.yaml", "secret.example.yaml"}
    assert "deploy/kubernetes/secret.yaml" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_kustomization_sets_the_tag_of_the_image_that_the_deployment_names() -> None:
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == CHAT["image"].rpartition(":")[0]
    assert image["newTag"] != "latest"


@pytest.mark.parametrize("name", BY_NAME)
def test_every_selector_selects_the_pods_of_one_workload(name: str) -> None:
    for labels in selectors(BY_NAME[name]):
        assert len([each for each in WORKLOADS if is_selected(each, labels)]) == 1


def selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    """Yield the labels by which a manifest selects pods of its own namespace."""
    if manifest["kind"] == "Service":
        yield manifest["spec"]["selector"]
    for path in objects(manifest):
        node = at(manifest, path)
        for key in ("selector", "podSelector", "labelSelector"):
            if "matchLabels" in node.get(key, {}) and "namespaceSelector" not in node:
                yield node[key]["matchLabels"]


def is_selected(workload: Manifest, labels: dict[str, str]) -> bool:
    pod_labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels.items() <= pod_labels.items()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each["metadata"]["name"])
def test_a_workload_selects_its_own_pods(workload: Manifest) -> None:
    assert is_selected(workload, workload["spec"]["selector"]["matchLabels"])


def test_every_named_port_is_one_of_the_container() -> None:
    for workload, container in ((DEPLOYMENT, CHAT), (REDIS, REDIS_CONTAINER)):
        name = workload["metadata"]["name"]
        ports = {port["name"] for port in container["ports"]}
        service, policy = BY_NAME[f"Service/{name}"], BY_NAME[f"NetworkPolicy/{name}"]
        named = [port["targetPort"] for port in service["spec"]["ports"]]
        named += [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        for probe in PROBES:
            looks = container[probe]
            named += [looks[how]["port"] for how in ("httpGet", "tcpSocket") if how in looks]
        assert set(named) == ports


def test_the_probes_ask_for_health_and_for_readiness() -> None:
    asked = [CHAT[probe]["httpGet"]["path"] for probe in PROBES]
    assert asked == ["/health", "/health", "/ready"]


def test_the_process_listens_where_the_ports_and_the_scrape_are() -> None:
    ports = {port["name"]: str(port["containerPort"]) for port in CHAT["ports"]}
    assert ports == {"http": ENV["PORT"], "metrics": ENV["METRICS_PORT"]}
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == ENV["METRICS_PORT"]


def test_every_variable_is_a_setting() -> None:
    commented = re.findall(r"# - name: (\w+)", (FOLDER / "deployment.yaml").read_text())
    named = [each["name"] for each in CHAT["env"]] + commented
    assert "TRUSTED_PROXIES" in named
    assert set(named) <= {field.name.upper() for field in fields(Settings)}
    assert len(set(named)) == len(named)


def test_the_service_takes_the_settings_as_they_stand(tmp_path: Path) -> None:
    environ = ENV | {"GROQ_API_KEY": "gsk_key", "REDIS_PASSWORD": SECRET["REDIS_PASSWORD"]}
    settings = load_settings(environ, tmp_path / ".env")
    assert settings.redis_addr == ENV["REDIS_ADDR"]


def test_every_secret_that_is_used_is_in_the_example() -> None:
    used = {
        (each["valueFrom"]["secretKeyRef"]["name"], each["valueFrom"]["secretKeyRef"]["key"])
        for container in (CHAT, REDIS_CONTAINER)
        for each in container["env"]
        if "valueFrom" in each
    }
    assert used == {("chat", key) for key in SECRET}


def test_the_example_of_the_secret_is_not_taken_for_a_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="GROQ_API_KEY must be"):
        load_settings(SECRET, tmp_path / ".env")


def test_the_grace_period_covers_the_whole_drain() -> None:
    drain = float(ENV["DRAIN_DELAY"]) + float(ENV["DRAIN_TIMEOUT"])
    needed = CHAT["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
    assert LONGEST_END < POD["terminationGracePeriodSeconds"] - needed < 15


def test_readiness_shows_a_drain_before_new_chats_are_refused() -> None:
    probe = CHAT["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < float(ENV["DRAIN_DELAY"])


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each["metadata"]["name"])
def test_a_container_may_do_no_more_than_it_needs(workload: Manifest) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        volumes = {each["name"] for each in (*pod.get("volumes", ()), *claims(workload))}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def claims(workload: Manifest) -> list[dict[str, str]]:
    return [each["metadata"] for each in workload["spec"].get("volumeClaimTemplates", ())]


def test_the_user_is_the_one_of_the_image() -> None:
    assert f"\nUSER {POD['securityContext']['runAsUser']}\n" in DOCKERFILE


def test_the_redis_to_try_is_the_one_that_the_service_looks_for() -> None:
    service = BY_NAME["Service/redis"]
    (port,) = service["spec"]["ports"]
    assert ENV["REDIS_ADDR"] == f"{service['metadata']['name']}:{port['port']}"
    assert REDIS_CONTAINER["image"] == COMPOSE["services"]["redis"]["image"]
    assert "$(REDISCLI_AUTH)" in REDIS_CONTAINER["command"]


def test_the_autoscaler_alone_sets_the_replicas_and_one_may_always_go() -> None:
    scaling = BY_NAME["HorizontalPodAutoscaler/chat"]["spec"]
    assert "replicas" not in DEPLOYMENT["spec"]
    assert scaling["scaleTargetRef"] == {
        "apiVersion": DEPLOYMENT["apiVersion"],
        "kind": DEPLOYMENT["kind"],
        "name": DEPLOYMENT["metadata"]["name"],
    }
    budget = BY_NAME["PodDisruptionBudget/chat"]["spec"]
    assert budget["maxUnavailable"] < scaling["minReplicas"] < scaling["maxReplicas"]


def test_only_the_monitoring_namespace_reaches_the_metrics() -> None:
    rules = BY_NAME["NetworkPolicy/chat"]["spec"]["ingress"]
    (metrics,) = [rule for rule in rules if {"port": "metrics"} in rule["ports"]]
    assert metrics["ports"] == [{"port": "metrics"}]
    (source,) = metrics["from"]
    assert source["namespaceSelector"]["matchLabels"]


@pytest.mark.parametrize(
    ("address", "is_open"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1", True),
        ("10.96.0.1", False),
        ("172.20.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("fd00::1", False),
    ],
)
def test_groq_is_reached_and_the_cluster_and_the_cloud_are_not(address: str, is_open: bool) -> None:
    port = urlsplit(Settings(groq_api_key="key").groq_base_url).port or 443
    rules = BY_NAME["NetworkPolicy/chat"]["spec"]["egress"]
    blocks = [
        peer["ipBlock"]
        for rule in rules
        if {"port": port} in rule["ports"]
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    assert any(is_in(block, ipaddress.ip_address(address)) for block in blocks) is is_open


def is_in(block: Manifest, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address in ipaddress.ip_network(block["cidr"]) and not any(
        address in ipaddress.ip_network(each) for each in block["except"]
    )


def test_the_readme_has_the_numbers_of_the_manifests() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \|", README, re.MULTILINE)
    assert len(rows) == README.count("\n| `") > 0
    there = {(path, str(value)) for path, value in leaves(MANIFESTS)}
    for name, value in rows:
        assert any(path.endswith(f".{name}") and value == each for path, each in there), name


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its dotted path; an environment variable is under its name."""
    if isinstance(node, list):
        for each in node:
            yield from leaves(each, path)
    elif isinstance(node, dict):
        if node.keys() == {"name", "value"}:
            yield f"{path}.{node['name']}", node["value"]
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, node
