"""HAProxy in front of the service: used where it is installed, and reachable from this machine only."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import PROXY
from tests.support.served import call
from umarvel_ray.serving import haproxy

needs_haproxy = pytest.mark.skipif(
    os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1", reason="HAProxy does not run here"
)


def haproxies() -> list[psutil.Process]:
    """Those of this session, by their config file."""
    processes = psutil.process_iter(["cmdline"])
    return [one for one in processes if any(PROXY.name in word for word in one.info["cmdline"] or ()) and one.exe()]


@needs_haproxy
def test_nothing_of_it_is_reachable_from_other_machines(url):
    assert call(f"{url}/v1/embeddings", {"input": "a fox"})[0] == 200
    listeners = {
        (one.laddr.ip, one.laddr.port)
        for process in haproxies()
        if process.name() == "haproxy"
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    ports = {int(os.environ[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("STATS", "METRICS")}
    assert {port for _, port in listeners} == {int(url.rpartition(":")[2]), *ports}
    assert {address for address, _ in listeners} == {"127.0.0.1"}
    assert stat.S_IMODE(Path(PROXY.name).stat().st_mode) == stat.S_IRWXU  # Serve lets everybody write to its socket


@needs_haproxy
def test_a_replica_answers_haproxy_on_this_machine_only(url):
    replicas = [one for one in psutil.process_iter(["cmdline"]) if "Ingress" in " ".join(one.info["cmdline"] or ())]
    addresses = {
        one.laddr.ip
        for process in replicas
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and 30000 <= one.laddr.port < 31000
    }
    assert addresses == {"127.0.0.1"}


@needs_haproxy
def test_the_wrapper_changes_two_listeners_and_passes_everything_on(tmp_path):
    environment = haproxy.environment(tmp_path)
    statistics, metrics = (environment[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS"))
    assert statistics != metrics
    config = tmp_path / "one.cfg"
    listeners = f"frontend a\n    bind :{metrics}\nfrontend b\n    bind *:8000\nlisten c\n  bind *:{statistics}\n"
    config.write_text("defaults\n    mode http\n    timeout client 1s\n" + listeners)
    wrapper = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    ran = subprocess.run([wrapper, "-c", "-V", "-f", str(config)], capture_output=True, text=True)
    assert (ran.returncode, "valid" in ran.stdout) == (0, True), ran.stderr
    lines = [line.strip() for line in config.read_text().splitlines() if "bind" in line]
    assert lines == [f"bind 127.0.0.1:{metrics}", "bind *:8000", f"bind 127.0.0.1:{statistics}"]


def test_without_haproxy_serves_own_proxy_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(haproxy, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert haproxy.environment(tmp_path) == {}


def test_a_binary_that_does_not_run_here_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "haproxy").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "haproxy").chmod(0o700)
    monkeypatch.setattr(haproxy, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: str(tmp_path / "haproxy"))
    assert haproxy.environment(tmp_path) == {}
    (tmp_path / "haproxy").write_bytes(b"\x7fELF")  # for another processor
    assert haproxy.environment(tmp_path) == {}
