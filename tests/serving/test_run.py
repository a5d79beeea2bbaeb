"""`umarvel serve` as a person meets it: where it answers, how it stops, and what is wrong in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import call, config_file, free_port, service_of

UMARVEL = [sys.executable, "-m", "umarvel_ray.cli", "serve", "--config"]


@pytest.fixture
def start(tmp_path_factory):
    """Start the command in a Ray of its own."""
    started = []

    def begin(path: Path, **changes: str) -> subprocess.Popen:
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS" and "_HA" not in name}
        environment = own | {"RAY_TMPDIR": str(tmp_path_factory.mktemp("r")), "TMPDIR": str(path.parent)} | changes
        process = subprocess.Popen(
            [*UMARVEL, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as in the background of a shell
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("stop", "own_proxy"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_it_says_where_it_answers_and_stops_when_asked(run, tmp_path, start, stop, own_proxy):
    port = free_port()
    changes = {"RAY_SERVE_ENABLE_HA_PROXY": "0"} if own_proxy else {}
    process = start(config_file(service_of(run, live=str(tmp_path / "live")), tmp_path, port), **changes)
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if "Ctrl-C" in line:
            break
    assert f"  search page   http://127.0.0.1:{port}/" in lines, lines
    assert len([line for line in lines if "starting for" not in line]) < 30, lines
    assert not [line for line in lines if "WARNING" in line or "INFO" in line]
    assert call(f"http://127.0.0.1:{port}/v1/embeddings", {"input": "a fox"})[0] == 200
    process.send_signal(stop)
    rest = process.stdout.read()
    assert (rest, process.wait(60)) == ("umarvel: stopping\n", 0)
    with pytest.raises(OSError, match=r"refused"):
        call(f"http://127.0.0.1:{port}/health")


def test_a_port_in_use_is_one_line(run, tmp_path, start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(config_file(service_of(run), tmp_path, taken.getsockname()[1]))
        output = process.communicate()[0]
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert "set another port" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [("applications: [1,", ", line 1: not valid YAML"), ("applications: []", ": not a config of one application")],
)
def test_a_malformed_config_is_one_line(text, message, tmp_path, start):
    (tmp_path / "config.yaml").write_text(text)
    process = start(tmp_path / "config.yaml")
    [line] = process.communicate()[0].splitlines()
    assert process.returncode == 2
    assert line.removeprefix(f"umarvel: {tmp_path}/config.yaml").startswith(message), line


def test_what_is_set_in_the_environment_counts_beside_a_checkpoint(run, tmp_path):
    """A checkpoint on the command line takes away the parts of the shipped config only."""
    process = subprocess.run(
        [*UMARVEL[:-1], str(service_of(run).embedder)],
        env=os.environ | {"UMARVEL_INDEX": str(tmp_path / "nowhere")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert f"no folder {tmp_path}/nowhere" in process.stderr


def test_what_the_service_refuses_is_one_line(run, tmp_path, start):
    path = config_file(service_of(run, keys=str(tmp_path / "none.txt")), tmp_path, free_port())
    process = start(path)
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "API keys cannot be read" in output.splitlines()[-1]
    assert "Traceback" not in output
