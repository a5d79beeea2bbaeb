"""Models by their id on the Hugging Face Hub: from a loopback server that speaks as much of its API as is needed.

Each case runs in a process of its own: huggingface_hub reads its endpoint and its cache when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from tests.conftest import REPO
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.hub import model_folder
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096)
ID = "umarvel/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
EMBED = """
import sys, numpy as np
from umarvel_ray import Embedder
np.save(sys.argv[2], Embedder.from_pretrained(sys.argv[1]).encode_query(["a red fox", "boats"]))
"""
FIND = """
import sys
from umarvel_ray import UserError
from umarvel_ray.model.hub import model_folder
try:
    print(model_folder(sys.argv[1]))
except UserError as error:
    sys.exit(f"error: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Serves one repository, and lists what it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if path == "/api/models/umarvel/gated/revision/main":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith(f"/api/models/{ID}/revision/") and not path.endswith(("/main", COMMIT)):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/api/models/{ID}/revision/"):
            self._send_json({"id": ID, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]})
        elif path == f"/api/models/{ID}/tree/{COMMIT}":
            self._send_json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)}
                    for name, file in self.server.files.items()
                ]
            )
        elif (found := re.fullmatch(f"/{ID}/resolve/{COMMIT}/(.+)", path)) and found[1] in self.server.files:
            file = self.server.files[found[1]]
            self._send(200, file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(file)}"'})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory) -> Path:
    """A checkpoint with files that need not be downloaded beside it."""
    folder = tmp_path_factory.mktemp("hub") / "text"
    save_checkpoint(EmbeddingModel.from_pretrained(tiny_base, SETTINGS), folder, SETTINGS, {"phase": "text"})
    (folder / "pytorch_model.bin").write_bytes(b"the weights once more")
    (folder / "onnx").mkdir()
    (folder / "onnx/config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def hub(checkpoint) -> Iterator[Hub]:
    server = Hub(checkpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(program: str, arguments: list[str], home: Path, endpoint: str, **changes: str) -> tuple[str, str]:
    """stdout and stderr of a program in another process, with a cache of its own."""
    hidden = {"HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(REPO)} | changes
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def downloaded(hub, tmp_path_factory) -> tuple[Path, np.ndarray, str]:
    """A cache that the model was downloaded to, its vectors, and what was printed."""
    home = tmp_path_factory.mktemp("home")
    _, printed = run(EMBED, [ID, str(home / "vectors.npy")], home, hub.url)
    assert (home / "vectors.npy").is_file(), printed
    return home, np.load(home / "vectors.npy"), printed


def snapshot(home: Path) -> Path:
    return home / f"hub/models--umarvel--tiny/snapshots/{COMMIT}"


def test_a_model_is_downloaded_and_gives_the_vectors_of_its_directory(hub, downloaded, checkpoint):
    home, vectors, printed = downloaded
    np.testing.assert_array_equal(vectors, Embedder.from_pretrained(checkpoint).encode_query(["a red fox", "boats"]))
    assert f"{ID}: no such directory; looking on {hub.url}" in printed
    assert (snapshot(home) / "umarvel.json").is_file()
    assert not (snapshot(home) / "pytorch_model.bin").exists()
    assert not (snapshot(home) / "onnx").exists()


def test_a_second_time_nothing_is_downloaded_and_nothing_printed(hub, downloaded):
    home, _, _ = downloaded
    hub.asked.clear()
    found, printed = run(FIND, [ID], home, hub.url)
    assert Path(found.strip()) == snapshot(home)
    assert hub.asked
    assert not [path for path in hub.asked if "/resolve/" in path]
    assert not printed


@pytest.mark.parametrize("changes", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_the_cached_snapshot_serves(downloaded, changes):
    home, _, _ = downloaded
    found, printed = run(FIND, [ID], home, "http://127.0.0.1:9", **changes)
    assert found, printed
    assert Path(found.strip()) == snapshot(home)


def test_a_revision_may_follow_the_id(hub, downloaded):
    home, _, _ = downloaded
    found, printed = run(FIND, [f"{ID}@{COMMIT}"], home, hub.url)
    assert found, printed
    assert Path(found.strip()) == snapshot(home)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("umarvel/unknown", "has no such model, or it is private; check the name, or run `hf auth login`"),
        ("umarvel/gated", "asks to accept the model's license first: do so on its page, then run `hf auth login`"),
        (f"{ID}@nowhere", "has no revision 'nowhere' of it; check the name"),
    ],
)
def test_a_model_that_the_hub_refuses_ends_in_one_line(hub, tmp_path, name, message):
    found, printed = run(FIND, [name], tmp_path, hub.url)
    assert not found
    repository = name.split("@")[0]
    assert printed.splitlines() == [
        f"{repository}: no such directory; looking on {hub.url}",
        f"error: {repository}: no such directory, and {hub.url} {message}",
    ]


def test_without_a_network_or_a_cache_the_line_says_what_was_tried(tmp_path):
    endpoint, cache = "http://127.0.0.1:9", tmp_path / "hub"
    found, printed = run(FIND, [ID], tmp_path, endpoint)
    assert not found
    pattern = rf"error: {ID}: no such directory, and {endpoint} cannot be reached \(.+\), nor is the model in {cache}"
    assert re.fullmatch(rf"{pattern}; give a directory", printed.splitlines()[-1])
    found, printed = run(FIND, [ID], tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert not found
    assert printed.splitlines()[-1] == (
        f"error: {ID}: no such directory, and {endpoint} is not asked (HF_HUB_OFFLINE=1); nor is the model in {cache}: "
        "unset it to download"
    )


def test_a_directory_that_exists_wins(monkeypatch, tmp_path):
    (tmp_path / ID).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("umarvel_ray.model.hub._snapshot", lambda *_: pytest.fail("the Hub was asked"))
    assert model_folder(ID) == Path(ID)
    for name in (tmp_path / "gone", "./umarvel/gone", "gone", "runs/demo/checkpoints/gone", "~/umarvel/gone"):
        assert model_folder(name) == Path(name)
