"""`tools/install.py`: pip's settings reach uv, and a failure is one line."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

INSTALL = REPO / "tools" / "install.py"


@pytest.fixture
def install(monkeypatch):
    """The script's names, run in an environment without pip's variables."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    return runpy.run_path(str(INSTALL))


def test_pip_settings_override_one_another_as_in_pip(install, tmp_path, monkeypatch):
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nfind-links = one two\nindex-url = file:///unused\n[install]\nindex_url = file:///index\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_FIND_LINKS", "three four")
    settings = install["pip_settings"]()
    assert settings["find-links"] == "three four"
    assert settings["index-url"] == "file:///index"


def test_uv_gets_pip_settings(install):
    settings = {"index-url": "file:///a", "find-links": "b c", "no-index": "false", "pre": "true", "cert": "d"}
    ran = []
    install["uv"].__globals__["run"] = lambda command, environment: ran.append((command, environment))
    install["uv"](["numpy"], settings)
    [(command, environment)] = ran
    given = " ".join(command)
    for part in ("--default-index file:///a", "--find-links b --find-links c", "--prerelease allow"):
        assert part in given
    assert "--no-index" not in command
    assert command[-1] == "numpy"
    assert environment["SSL_CERT_FILE"] == "d"


def test_a_setting_without_counterpart_leaves_the_installation_to_pip(install, monkeypatch):
    monkeypatch.setenv("PIP_NO_BINARY", "numpy")
    assert "no-binary" in install["install_with_uv"](["numpy"], "numpy")


def test_a_failure_is_one_line(tmp_path: Path):
    """Neither uv nor pip finds anything: the only package source is an empty folder."""
    lock = tmp_path / "some.lock"
    lock.write_text("no-such-package==1\n")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    command = [tmp_path / "venv" / "bin" / "python", INSTALL, "-r", lock]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    [line] = process.stderr.splitlines()
    for part in (str(lock), "no-such-package==1", "install.log"):
        assert part in line
    assert process.returncode == 1
