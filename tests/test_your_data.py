"""docs/your-data.md: every command of the page works, in order, on a folder of the demo's pictures."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import REPO
from tests.support.served import free_port
from umarvel_ray import demo
from umarvel_ray.importing.columns import KINDS
from umarvel_ray.recipe import load_recipe

PAGE = (REPO / "docs" / "your-data.md").read_text(encoding="utf-8")
IMPORT, TRAIN, SEARCH, SERVE, ASK, PLAN = BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def make_pictures(folder: Path, count: int) -> None:
    """Captioned pictures of the demo, and the file of captions that the page shows."""
    folder.mkdir()
    queries = pq.read_table(demo.DATA / "image_pairs.parquet", columns=["text", "positive_ids"]).to_pylist()
    wanted = {row["positive_ids"][0]: row["text"] for row in queries[:: len(queries) // count]}
    columns = ["id", "image"]
    documents = pq.read_table(demo.DATA / "documents.parquet", columns=columns, filters=[("id", "in", list(wanted))])
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        for row in documents.to_pylist():
            name = f"{row['id'].replace(':', '-')}.webp"
            (folder / name).write_bytes(row["image"])
            writer.writerow([name, wanted[row["id"]]])


def environment(folder: Path) -> dict[str, str]:
    """The commands of this environment and this checkout, and nothing of other Rays on the machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    others = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UMARVEL_"))}
    return others | {"PATH": path, "PYTHONPATH": str(REPO), "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}


def bash(block: str, folder: Path, temporary: Path, timeout: float = 1500) -> str:
    done = subprocess.run(
        ["bash", "-euc", block],
        cwd=folder,
        env=environment(temporary),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def served(block: str, folder: Path, temporary: Path, port: int) -> Iterator[None]:
    """The page's server, on another port: 8000 may be taken."""
    config = folder / "config.yaml"
    text = (files("umarvel_ray.serving") / "config.yaml").read_text()
    config.write_text(text.replace("port: 8000", f"port: {port}"))
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-euc", f"{block.rstrip()} --config {config}"],
            cwd=folder,
            env=environment(temporary),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while not healthy(port):
            assert process.poll() is None, (folder / "serve.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "serve.log").read_text()[-3000:]
            time.sleep(3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_the_folder_of_the_page_is_imported_and_its_recipe_loads(tmp_path):
    make_pictures(tmp_path / "pictures", 60)
    output = bash(IMPORT, tmp_path, tmp_path)
    assert output.startswith("kind: captions")
    recipe = load_recipe(str(tmp_path / "data" / "pictures" / "recipe.yaml"))
    assert recipe.data.root == str(tmp_path / "data" / "pictures")
    assert recipe.output.format(name=recipe.name) == "runs/pictures"
    assert TRAIN.strip() in output  # the next command of the page is the one that is printed
    assert "# Estimate for 1 workers" in bash(PLAN, tmp_path, tmp_path)


def test_the_page_names_every_kind():
    kinds = re.findall(r"^\| `([\w-]+)` \| ", PAGE.split("| `--kind` |")[1].split("\n\n")[0], re.MULTILINE)
    assert sorted(kinds) == sorted(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_command_of_the_page(tmp_path, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("r")  # a short path: Ray's sockets are below it
    make_pictures(tmp_path / "pictures", 400)
    bash(IMPORT, tmp_path, temporary)
    bash(TRAIN, tmp_path, temporary)
    metrics = json.loads((tmp_path / "runs" / "pictures" / "report" / "metrics.json").read_text())
    assert (tmp_path / "runs" / "pictures" / "report" / "index.html").is_file()
    assert metrics
    found = bash(SEARCH, tmp_path, temporary)
    assert len(found.splitlines()[-10:]) == 10
    assert (tmp_path / "hits.html").is_file()
    port = free_port()
    with served(SERVE, tmp_path, temporary, port):
        with urllib.request.urlopen(f"http://localhost:{port}/v1/index", timeout=60) as answer:
            assert json.load(answer)["writable"]
        answer = json.loads(bash(ASK.replace(":8000", f":{port}"), tmp_path, temporary, timeout=60))
    assert len(answer["results"]) == 3
    assert answer["results"][0]["source"] == "pictures"
