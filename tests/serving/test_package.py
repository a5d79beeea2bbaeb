"""The built package: it holds its data files, and `umarvel serve` works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from tests.conftest import REPO

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "umarvel_ray")


def data_files(package: Path) -> set[str]:
    """Every file of the package that is not code, relative to its parent folder."""
    return {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }


def pip(*args: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout gets no build folder."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, tree / name)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", ".", cwd=tree)
    [built] = (tree / "dist").glob("*.whl")
    return built


def test_the_packaged_config_equals_the_one_to_edit():
    configs = [REPO / "serve" / "config.yaml", REPO / "umarvel_ray" / "serving" / "config.yaml"]
    edited, packaged = (yaml.safe_load(path.read_text()) for path in configs)
    assert edited == packaged


@pytest.mark.slow
def test_the_wheel_holds_all_package_data_and_one_package(wheel):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert data_files(REPO / "umarvel_ray") == {name for name in names if not name.endswith(".py")}
    assert {"umarvel_ray/py.typed", "umarvel_ray/serving/config.yaml", "umarvel_ray/serving/page/page.js"} <= names
    assert {name.split("/")[0] for name in names} == {"umarvel_ray"}


@pytest.mark.slow
def test_an_installed_package_finds_its_config_and_page_from_any_folder(wheel, tmp_path):
    pip("install", "-q", "--no-deps", "--no-index", "--target", "installed", str(wheel), cwd=tmp_path)
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import umarvel_ray.cli as cli; from umarvel_ray.serving.routes import page; print(cli.__file__);"
        "cli.os.execv = lambda program, command: print(command[-1]); print(sorted(page.FILES));"
        "cli.main(['serve'])"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    package = installed / "umarvel_ray"
    assert done.stdout.splitlines() == [
        str(package / "cli.py"),
        "['index.html', 'page.css', 'page.js']",
        str(package / "serving" / "config.yaml"),
    ]
    help_page = [sys.executable, "-m", "umarvel_ray.cli", "serve", "--help"]
    done = subprocess.run(help_page, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--reranker" in done.stdout
