"""Shared fixtures: one local Ray, tiny random base models, and larger data if it is available."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from umarvel_ray.ray_session import prepare_environment, start_ray
from umarvel_ray.serving import haproxy
from umarvel_ray.serving.environment import SERVE

PROXY = tempfile.TemporaryDirectory(prefix=haproxy.FOLDER_PREFIX, dir="/tmp")
prepare_environment(SERVE | haproxy.environment(Path(PROXY.name)))  # before any test module imports ray

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine must not fail a test
hypothesis.settings.load_profile("unhurried")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def models_on_the_cpu() -> Iterator[None]:
    """A model whose device is not named runs on the CPU, on a machine with a GPU too: there results are exact."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("embedder", "reranker"):
            patch.setattr(f"umarvel_ray.model.{module}.best_device", lambda: "cpu")
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests() -> Iterator[None]:
    """Converted tables go to a folder of their own, not to the user's cache."""
    with tempfile.TemporaryDirectory(prefix="umarvel-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray on loopback for the whole session."""
    with start_ray(cpus=4, object_store_bytes=256 * 2**20):
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A Hugging Face directory with a random Qwen2-VL, a scaled-down version of the demo's base."""
    from tests.support.tiny import make_tiny_base

    directory = tmp_path_factory.mktemp("tiny_base")
    make_tiny_base(directory)
    return directory


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def family_base(request, tiny_base, tmp_path_factory) -> Path:
    """A tiny random base model of each backbone family."""
    if request.param == "qwen2_vl":
        return tiny_base
    from tests.support.tiny import make_tiny_base

    return make_tiny_base(tmp_path_factory.mktemp(request.param), family=request.param)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder that UMARVEL_SHARED names, with larger data that is not part of the repository."""
    directory = Path(os.environ.get("UMARVEL_SHARED", "nowhere"))
    if not directory.is_dir():
        pytest.skip("larger data not installed; set UMARVEL_SHARED")
    return directory


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    """A run folder with tiny random checkpoints, a corpus and its embeddings, as the pipeline leaves it."""
    from tests.support.tiny_run import make_run

    return make_run(tiny_base, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def address(ray_cluster) -> Iterator[str]:
    """The address of a Ray Serve on loopback without an application."""
    from tests.support.served import serve_address

    with serve_address() as address:
        yield address


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The small corpus of `tests/support/small_dataset.py`."""
    from tests.support.small_dataset import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe():
    """The recipe for `dataset`."""
    from tests.support.small_dataset import make_recipe

    return make_recipe()


@pytest.fixture(scope="module")
def embedders(ray_cluster, recipe):
    """Two embedding actors."""
    from tests.support.small_dataset import two_embedders

    with two_embedders(recipe) as embedders:
        yield embedders


@pytest.fixture(scope="module")
def reranking_recipe():
    """A recipe for reranking in `dataset`."""
    from tests.support.rerankers import make_reranking_recipe

    return make_reranking_recipe()


@pytest.fixture(scope="module")
def reranker_ref(reranking_recipe, tiny_base, tmp_path_factory):
    """A tiny random reranker's checkpoint."""
    from tests.support.rerankers import make_reranker

    return make_reranker(tiny_base, reranking_recipe, tmp_path_factory.mktemp("checkpoints") / "reranker")


@pytest.fixture(scope="module")
def rerankers(ray_cluster, reranking_recipe):
    """The reranking actors of `reranking_recipe`."""
    from umarvel_ray.inference.score import RerankerGroup

    with RerankerGroup(reranking_recipe.cluster, reranking_recipe.compute) as rerankers:
        yield rerankers
