"""monitoring/compose.yaml: what it mounts is there, and its parts find each other by the names and ports it gives them."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dspark.cli import serve

FOLDER = Path(__file__).parents[2] / "monitoring"
# What each image reads when it is started without arguments, and where it listens.
CONFIGURATION = {
    "prometheus": ("/etc/prometheus/prometheus.yml", 9090),
    "alertmanager": ("/etc/alertmanager/alertmanager.yml", 9093),
    "grafana": ("/etc/grafana/provisioning/datasources/prometheus.yml", 3000),
}


def read(path: str) -> Any:
    return yaml.safe_load((FOLDER / path).read_text())


SERVICES: dict[str, Any] = read("compose.yaml")["services"]


def mounts(service: str) -> dict[str, str]:
    """Path inside -> path or volume outside."""
    return dict(reversed(volume.removesuffix(":ro").split(":")) for volume in SERVICES[service]["volumes"])


def inside(service: str, path: str) -> Path:
    """The file of ours that a service finds at `path`."""
    where = next(place for place in mounts(service) if path.startswith(place + "/"))
    return FOLDER / mounts(service)[where] / path.removeprefix(where + "/")


def ports(service: str) -> set[int]:
    published = [port.split(":") for port in SERVICES[service]["ports"]]
    assert all(address == "127.0.0.1" for address, _, _ in published)
    return {int(port) for _, _, port in published}


def test_every_volume_is_a_folder_of_ours_or_declared():
    outside = {source for service in SERVICES for source in mounts(service).values()}
    folders = {source for source in outside if source.startswith(".")}
    assert outside - folders == set(read("compose.yaml")["volumes"])
    assert all((FOLDER / folder).is_dir() for folder in folders)


@pytest.mark.parametrize("service", CONFIGURATION)
def test_images_find_their_configuration_where_they_look(service):
    path, port = CONFIGURATION[service]
    assert inside(service, path).is_file()
    assert ports(service) == {port}
    assert "command" not in SERVICES[service]  # one would replace the image's own, which names that path
    assert re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", SERVICES[service]["image"])  # a version, not `latest`


def test_the_parts_find_each_other():
    prometheus = read("prometheus/prometheus.yml")
    scraped = [
        target
        for job in prometheus["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]
    alerted = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    source = read("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]["url"]
    for address in (*scraped, *alerted, source.removeprefix("http://")):
        service, port = address.split(":")
        assert int(port) in ports(service)
    for name in prometheus["rule_files"]:
        assert (inside("prometheus", CONFIGURATION["prometheus"][0]).parent / name).is_file()
    shown = read("grafana/provisioning/dashboards/dspark.yml")["providers"][0]["options"]["path"]
    assert inside("grafana", shown + "/dspark.json").is_file()


def test_the_server_is_started_with_options_that_it_has():
    _, script = shlex.split(SERVICES["dspark"]["command"])[1:]
    started = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", script.split("exec ")[1]).split()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert started[:2] == ["/installed/bin/dspark", "serve"]
    options = parser.parse_args(started[2:])
    assert (options.target, options.host, {options.port}) == ("tiny", "0.0.0.0", ports("dspark"))
    assert inside("dspark", "/source/pyproject.toml").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ["promtool", "check", "config", "prometheus/prometheus.yml"],
        ["amtool", "check-config", "alertmanager/alertmanager.yml"],
    ],
    ids=["prometheus", "alertmanager"],
)
def test_their_own_tools_accept_the_configuration(command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (Debian: prometheus, prometheus-alertmanager)")
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
