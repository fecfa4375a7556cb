"""The files of deploy/: alerts are tested by Prometheus' own tool; what cannot run here is linted."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_metrics import PROMETHEUS, exported

yaml = pytest.importorskip("yaml", reason="needs PyYAML: make install brings it")

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def output(*command: object) -> str:
    """What a command that must succeed prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def lint(name: str, *arguments: object) -> str:
    """Run a linter of the extra `dev`."""
    program = BIN / name
    if not program.exists() and os.environ.get("CI") != "true":
        pytest.skip(f"needs {name}: make install brings it")
    return output(program, *arguments)


def alerts() -> dict[str, str]:
    """Alert -> its expression."""
    return {rule["alert"]: rule["expr"] for group in read("alerts.yml")["groups"] for rule in group["rules"]}


def panels() -> list[dict[str, Any]]:
    return json.loads((DEPLOY / "grafana" / "memsyn.json").read_text(encoding="utf-8"))["panels"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


# Alerts and the dashboard


@PROMETHEUS
def test_alerts_fire_and_are_silent() -> None:
    assert f"{len(alerts())} rules found" in output("promtool", "check", "rules", DEPLOY / "alerts.yml")
    assert "SUCCESS" in output("promtool", "test", "rules", DEPLOY / "alerts_test.yml")
    output("promtool", "check", "config", "--syntax-only", DEPLOY / "prometheus.yml")


def test_each_alert_has_a_test_of_both_kinds() -> None:
    cases = [case for test in read("alerts_test.yml")["tests"] for case in test["alert_rule_test"]]
    for is_firing in (True, False):
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) == is_firing} == set(alerts())


def test_the_docs_have_each_alert() -> None:
    page = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Memsyn\w+)` \|", page, re.MULTILINE) == list(alerts())


def metrics_in(expression: str) -> set[str]:
    """The names of metrics: words outside of labels, without functions, operators and the names after `by` or `on`."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", expression)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"\b[a-z_]\w+\b(?!\s*\()", bare)) - {"and", "or", "unless", "by", "sum", "on"}


@pytest.mark.parametrize("expression", [*alerts().values(), *queries()])
def test_expressions_name_metrics_that_are_exported(expression: str, tmp_path: Path) -> None:
    names = metrics_in(expression)
    assert names
    assert names <= {*exported(tmp_path / "traffic.safetensors"), "up"}


def test_names_are_found_in_expressions() -> None:
    found = metrics_in('sum by (job) (rate(a_total{reason=~"b|c"}[15m])) > 0.05 and on (job) increase(d_e[5m]) == 1')
    assert found == {"a_total", "d_e"}


@PROMETHEUS
def test_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"query:{place}", "expr": expression} for place, expression in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in output("promtool", "check", "rules", tmp_path / "rules.yml")


def test_the_dashboard_shows_each_metric_and_is_provisioned(tmp_path: Path) -> None:
    assert set.union(*map(metrics_in, queries())) == set(exported(tmp_path / "traffic.safetensors"))
    (source,) = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    places = set()
    for panel in panels():
        where = panel["gridPos"]
        assert panel["datasource"]["uid"] == source["uid"]
        assert 0 <= where["x"] <= 24 - where["w"]
        places.add((where["x"], where["y"], panel["id"]))
    assert len(places) == len({place[:2] for place in places}) == len({place[2] for place in places}) == len(panels())
    (provider,) = read("grafana/provisioning/dashboards/memsyn.yml")["providers"]
    mounted = [str(own) for own in read("compose.yaml")["services"]["grafana"]["volumes"]]
    assert f"./grafana/memsyn.json:{provider['options']['path']}/memsyn.json:ro" in mounted


# Images and manifests


def test_hadolint_has_nothing_to_say() -> None:
    assert lint("hadolint", DEPLOY / "Dockerfile") == ""


def test_the_image_runs_as_nobody_and_names_no_address() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    last = text.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert last.index("\nUSER ") < last.index("\nENTRYPOINT ")
    assert "HEALTHCHECK" in last
    assert set(re.findall(r"\w+://([^/:']+)", text)) == {"127.0.0.1"}
    assert not re.search(r"\b(curl|wget|ADD http)\b", text)
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in copied.split())
        allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        assert {f"!{path}" for path in copied.split()} <= set(allowed)


def given_options() -> list[tuple[str, str]]:
    """(program of examples/serve, an option it is given) in the image, in compose and in the manifests."""
    commands = re.findall(r"^CMD (\[.+\])$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    found = [("service.py", json.loads(command)) for command in commands]
    for service in read("compose.yaml")["services"].values():
        if "command" in service:
            found.append((service.get("entrypoint", ["", "service.py"])[1], service["command"]))
    for pod in (statefulset()["template"], cronjob()["template"]):
        container = pod["spec"]["containers"][0]
        found.append((container.get("command", ["", "service.py"])[1], container["args"]))
    return [(program, word.split("=")[0]) for program, words in found for word in words if word.startswith("--")]


def test_programs_are_given_options_that_they_have() -> None:
    assert len(given_options()) > 15
    for program, option in given_options():
        assert f'"{option}"' in (ROOT / "examples" / "serve" / program).read_text(encoding="utf-8"), (program, option)


def test_compose_is_of_the_schema() -> None:
    assert "ok" in lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_compose_starts_replicas_that_prometheus_scrapes() -> None:
    compose = read("compose.yaml")
    replicas = {name: own for name, own in compose["services"].items() if name.startswith("replica-")}
    commands = [own["command"] for own in replicas.values()]
    assert len({command[command.index("--replica") + 1] for command in commands}) == len(replicas) == 2
    for own in replicas.values():
        assert own["read_only"]
        assert own["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in own["ports"])
        assert "SERVE_TOKEN" in own["environment"]
    (scraped,) = read("prometheus.yml")["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == [f"{name}:8001" for name in replicas]
    for own in compose["services"].values():
        for mounted in own.get("volumes", []):
            source = mounted.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), mounted


def manifests() -> dict[str, dict[str, Any]]:
    text = (DEPLOY / "kubernetes" / "serve.yaml").read_text(encoding="utf-8")
    return {own["kind"]: own for own in yaml.safe_load_all(text)}


def statefulset() -> dict[str, Any]:
    return manifests()["StatefulSet"]["spec"]


def cronjob() -> dict[str, Any]:
    return manifests()["CronJob"]["spec"]["jobTemplate"]["spec"]


def test_manifests_are_of_the_schemas() -> None:
    printed = lint("kubernetes-validate", "--strict", DEPLOY / "kubernetes" / "serve.yaml")
    assert printed.count(" passed for resource ") == len(manifests()) == 6


def test_pods_have_no_rights_and_what_they_mount() -> None:
    for pod in (statefulset()["template"]["spec"], cronjob()["template"]["spec"]):
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert {own["name"] for own in container["volumeMounts"]} == {own["name"] for own in pod["volumes"]}
        claims = {own["persistentVolumeClaim"]["claimName"] for own in pod["volumes"] if "persistentVolumeClaim" in own}
        assert claims == {manifests()["PersistentVolumeClaim"]["metadata"]["name"]}


def test_replicas_are_probed_selected_and_ended_gently() -> None:
    own, labels = statefulset(), statefulset()["template"]["metadata"]["labels"]
    (container,) = own["template"]["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/healthz"
        assert container[probe]["httpGet"]["port"] in ports
    assert "$(POD_NAME)" in container["args"]
    waits = int(shlex.split(" ".join(container["lifecycle"]["preStop"]["exec"]["command"]))[1])
    assert own["template"]["spec"]["terminationGracePeriodSeconds"] >= waits + 40
    assert own["serviceName"] == manifests()["Service"]["metadata"]["name"]
    service, budget = manifests()["Service"]["spec"], manifests()["PodDisruptionBudget"]["spec"]
    for selector in (own["selector"]["matchLabels"], service["selector"], budget["selector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    assert not service["selector"].items() <= cronjob()["template"]["metadata"]["labels"].items()
