"""The Kubernetes manifests: against Kubernetes' own schemas, each other, and the service."""

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes_validate import validate  # type: ignore[import-untyped]  # it ships no types

from chat.config import Settings, SettingsError, load_settings
from tests.servers import ROOT
from tests.test_container import COMPOSE, DOCKERFILE, SHUTDOWN_MARGIN

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
BY_NAME = {f"{manifest['kind']}/{manifest['metadata']['name']}": manifest for manifest in MANIFESTS}
WORKLOADS = [BY_NAME["Deployment/chat"], BY_NAME["StatefulSet/redis"]]
DEPLOYMENT, REDIS = WORKLOADS
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CHAT,) = POD["containers"]
(REDIS_CONTAINER,) = REDIS["spec"]["template"]["spec"]["containers"]
ENV = {entry["name"]: entry["value"] for entry in CHAT["env"] if "value" in entry}
SECRET = BY_NAME["Secret/chat"]["stringData"]

# The oldest Kubernetes that takes the manifests unchanged, and the newest with known schemas.
OLDEST, NEWEST = "1.31", "1.37"
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def test_every_manifest_is_valid_in_the_oldest_and_the_newest_kubernetes() -> None:
    for manifest in MANIFESTS:
        for version in (OLDEST, NEWEST):
            assert validate(manifest, version, strict=True) == version


def test_the_kustomization_names_every_manifest_but_the_example_and_sets_the_image() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")}
    optional = set(re.findall(r"# - (\S+)", (FOLDER / "kustomization.yaml").read_text()))
    assert optional == {"ingress.yaml"}
    listed = {*KUSTOMIZATION["resources"], *optional}
    assert listed == files - {"kustomization.yaml", "secret.example.yaml"}
    assert "deploy/kubernetes/secret.yaml" in (ROOT / ".gitignore").read_text().splitlines()
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == CHAT["image"].rpartition(":")[0]
    assert image["newTag"] != "latest"


def test_every_selector_selects_the_pods_of_one_workload() -> None:
    for name, manifest in BY_NAME.items():
        for labels in selectors(manifest):
            selected = [workload for workload in WORKLOADS if is_selected(workload, labels)]
            assert len(selected) == 1, (name, labels)
    for workload in WORKLOADS:
        assert is_selected(workload, workload["spec"]["selector"]["matchLabels"])


def selectors(node: Any) -> Iterator[dict[str, str]]:
    """Yield the labels by which a manifest selects pods of its own namespace."""
    if isinstance(node, list):
        for item in node:
            yield from selectors(item)
    elif isinstance(node, dict) and "namespaceSelector" not in node:
        if node.get("kind") == "Service":
            yield node["spec"]["selector"]
        if "matchLabels" in node:
            yield node["matchLabels"]
        for value in node.values():
            yield from selectors(value)


def is_selected(workload: Manifest, labels: dict[str, str]) -> bool:
    pod_labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels.items() <= pod_labels.items()


def test_every_port_in_use_is_a_port_of_the_container() -> None:
    for workload, container in ((DEPLOYMENT, CHAT), (REDIS, REDIS_CONTAINER)):
        name = workload["metadata"]["name"]
        ports = {port["name"] for port in container["ports"]}
        service, policy = BY_NAME[f"Service/{name}"], BY_NAME[f"NetworkPolicy/{name}"]
        named = [port["targetPort"] for port in service["spec"]["ports"]]
        named += [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        named += [value for probe in PROBES for value in values_of("port", container[probe])]
        assert set(named) == ports, name
    listening = {port["name"]: str(port["containerPort"]) for port in CHAT["ports"]}
    assert listening == {"http": ENV["PORT"], "metrics": ENV["METRICS_PORT"]}
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == ENV["METRICS_PORT"]


def test_every_variable_is_a_setting_and_the_service_accepts_its_value(tmp_path: Path) -> None:
    commented = re.findall(r"# - name: (\w+)", (FOLDER / "deployment.yaml").read_text())
    named = [entry["name"] for entry in CHAT["env"]] + commented
    assert "TRUSTED_PROXIES" in named
    assert set(named) <= {name.upper() for name in Settings.__struct_fields__}
    assert len(set(named)) == len(named)
    environ = ENV | {"GROQ_API_KEY": "gsk_key", "REDIS_PASSWORD": SECRET["REDIS_PASSWORD"]}
    assert load_settings(environ, tmp_path / ".env").redis_addr == ENV["REDIS_ADDR"]


def test_the_example_secret_has_every_key_in_use_and_no_valid_one(tmp_path: Path) -> None:
    references = list(values_of("secretKeyRef", WORKLOADS))
    used = {(reference["name"], reference["key"]) for reference in references}
    assert used == {("chat", key) for key in SECRET}
    with pytest.raises(SettingsError, match="GROQ_API_KEY must be"):
        load_settings(SECRET, tmp_path / ".env")


def test_the_grace_period_covers_the_drain_and_the_probes_show_it_before_chats_are_refused() -> (
    None
):
    drain = float(ENV["DRAIN_DELAY"]) + float(ENV["DRAIN_TIMEOUT"])
    needed = CHAT["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
    assert SHUTDOWN_MARGIN <= POD["terminationGracePeriodSeconds"] - needed < 15
    asked = [CHAT[probe]["httpGet"]["path"] for probe in PROBES]
    assert asked == ["/health", "/health", "/ready"]
    probe = CHAT["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < float(ENV["DRAIN_DELAY"])


def test_every_container_has_the_least_privileges_and_resource_limits() -> None:
    for workload in WORKLOADS:
        name, pod = workload["metadata"]["name"], workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        claims = [claim["metadata"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
        volumes = {volume["name"] for volume in (*pod.get("volumes", ()), *claims)}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes, name
    assert f"\nUSER {POD['securityContext']['runAsUser']}\n" in DOCKERFILE


def test_the_ingress_has_the_annotations_of_the_document_and_leads_to_the_service() -> None:
    ingress, service = BY_NAME["Ingress/chat"], BY_NAME["Service/chat"]
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/proxy.md").read_text(), re.S)
    annotations = ingress["metadata"]["annotations"]
    assert annotations == yaml.safe_load(shown)
    patience = float(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"])
    assert patience > Settings(groq_api_key="key").reply_timeout
    (backend,) = values_of("backend.service", ingress)
    (port,) = service["spec"]["ports"]
    assert backend == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    assert {rule["host"] for rule in ingress["spec"]["rules"]} == {
        host for each in ingress["spec"]["tls"] for host in each["hosts"]
    }


def test_the_service_finds_the_redis_of_the_manifests() -> None:
    service = BY_NAME["Service/redis"]
    (port,) = service["spec"]["ports"]
    assert ENV["REDIS_ADDR"] == f"{service['metadata']['name']}:{port['port']}"
    assert REDIS_CONTAINER["image"] == COMPOSE["services"]["redis"]["image"]
    assert "$(REDISCLI_AUTH)" in REDIS_CONTAINER["command"]


def test_only_the_autoscaler_sets_the_replicas_and_one_may_always_be_evicted() -> None:
    scaling, target = BY_NAME["HorizontalPodAutoscaler/chat"]["spec"], {"name": "chat"}
    assert "replicas" not in DEPLOYMENT["spec"]
    target |= {"apiVersion": DEPLOYMENT["apiVersion"], "kind": DEPLOYMENT["kind"]}
    assert scaling["scaleTargetRef"] == target
    budget = BY_NAME["PodDisruptionBudget/chat"]["spec"]
    assert budget["maxUnavailable"] < scaling["minReplicas"] < scaling["maxReplicas"]


PUBLIC = ["1.1.1.1", "2606:4700::1"]
PRIVATE = ["10.96.0.1", "172.20.0.1", "192.168.0.1", "169.254.169.254", "fd00::1"]


def test_the_network_policy_opens_groq_only_and_the_metrics_to_monitoring_only() -> None:
    policy = BY_NAME["NetworkPolicy/chat"]["spec"]
    (metrics,) = [rule for rule in policy["ingress"] if {"port": "metrics"} in rule["ports"]]
    (source,) = metrics["from"]
    assert metrics["ports"] == [{"port": "metrics"}]
    assert source["namespaceSelector"]["matchLabels"]
    port = urlsplit(Settings(groq_api_key="key").groq_base_url).port or 443
    rules = [rule for rule in policy["egress"] if {"port": port} in rule["ports"]]
    blocks = list(values_of("ipBlock", rules))
    assert [address for address in PUBLIC + PRIVATE if is_in_any(blocks, address)] == PUBLIC


def is_in_any(blocks: list[Manifest], text: str) -> bool:
    address = ipaddress.ip_address(text)
    return any(
        address in ipaddress.ip_network(block["cidr"])
        and not any(address in ipaddress.ip_network(network) for network in block["except"])
        for block in blocks
    )


def test_the_readme_has_the_numbers_of_the_manifests() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \|", README, re.MULTILINE)
    assert len(rows) == README.count("\n| `") > 0
    for name, shown in rows:
        assert shown in map(str, values_of(name, MANIFESTS)), name


def values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its dotted path; an environment variable is listed by its name."""
    if isinstance(node, list):
        for item in node:
            yield from values(item, path)
        return
    yield path, node
    if isinstance(node, dict):
        if node.keys() == {"name", "value"}:
            yield f"{path}.{node['name']}", node["value"]
        for key, value in node.items():
            yield from values(value, f"{path}.{key}")


def values_of(name: str, node: Any) -> Iterator[Any]:
    return (value for path, value in values(node) if path.endswith(f".{name}"))
