"""The MTEB adapter: mteb's own mock run, if mteb is installed, and the items made of mteb's batches."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.items.test_videos import film
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096)
PICTURES = [Image.effect_noise((64, 64), spread).convert("RGB") for spread in (20, 90)]


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mteb") / "text"
    save_checkpoint(EmbeddingModel.from_pretrained(tiny_base, SETTINGS), folder, SETTINGS, {"phase": "text"})
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint):
    pytest.importorskip("mteb")
    from umarvel_ray.evaluate.mteb import MtebEncoder

    return MtebEncoder(checkpoint)


def metadata(prompt=None):
    from mteb.mocks import MockRetrievalTask

    return MockRetrievalTask.metadata.model_copy(update={"prompt": prompt})


def test_without_mteb_the_module_imports_and_the_encoder_says_what_to_install():
    """In a process of its own, where mteb cannot be imported."""
    program = (
        "import sys; sys.modules['mteb'] = sys.modules['datasets'] = None\n"
        "from umarvel_ray.errors import UserError\n"
        "from umarvel_ray.evaluate.mteb import MtebEncoder\n"
        "try:\n    MtebEncoder('anything')\n"
        "except UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\w+ is not installed; run: pip install 'umarvel-ray\[mteb\]'\n", done.stdout)


def test_queries_carry_the_instruction_and_documents_none(encoder, checkpoint):
    from mteb.types import PromptType

    batches = [
        {"id": ["1", "2"], "text": ["a red fox", ""], "image": PICTURES},
        {"text": ["", "boats"], "id": ["3", "4"]},
    ]
    items = [{"text": "a red fox", "image": PICTURES[0]}, {"image": PICTURES[1]}, {"text": " "}, {"text": "boats"}]
    instruction = {"instruction": "Find it"}
    embedder = Embedder.from_pretrained(checkpoint)

    def encode(prompt, side):
        return encoder.encode(batches, task_metadata=metadata(prompt), hf_split="", hf_subset="", prompt_type=side)

    queries = embedder.encode_query([item | instruction for item in items])
    assert np.allclose(encode({"query": "Find it"}, PromptType.query), queries, atol=1e-6)
    assert np.allclose(encode("Find it", None), queries, atol=1e-6)
    documents = embedder.encode_document(items)
    assert np.allclose(encode("Find it", PromptType.document), documents, atol=1e-6)
    assert np.allclose(encode({"query": "Find it"}, None), documents, atol=1e-6)  # no side, so no instruction
    assert np.abs(queries - documents).max() > 1e-3


def test_videos_are_read_as_they_are_stored(encoder, checkpoint, tmp_path):
    """Through mteb's own loader, whose decoding would need torchcodec."""
    import datasets
    from mteb._create_dataloaders import create_dataloader
    from mteb.types import PromptType

    (tmp_path / "film.mp4").write_bytes(film(4))
    videos = [film(9), str(tmp_path / "film.mp4")]
    stored = [{"bytes": videos[0], "path": None}, {"bytes": None, "path": videos[1]}]
    rows = datasets.Dataset.from_dict({"id": ["1", "2"], "video": stored}).cast_column("video", datasets.Video())
    loader = create_dataloader(rows, task_metadata=metadata().model_copy(update={"modalities": ["video"]}))
    given = {"task_metadata": metadata(), "hf_split": "", "hf_subset": ""}
    found = encoder.encode(loader, **given, prompt_type=PromptType.document)
    expected = Embedder.from_pretrained(checkpoint).encode_document([{"video": video} for video in videos])
    assert np.allclose(found, expected, atol=1e-6)


def test_an_instruction_of_ours_replaces_the_task_s(checkpoint, encoder):
    task = metadata("Find it")
    ours = type(encoder)(checkpoint, instructions={task.name: "Find another"})
    assert ours.get_task_instruction(task, None) == "Find another"
    assert ours.mteb_model_meta.revision == encoder.mteb_model_meta.revision


@pytest.mark.slow
def test_mteb_s_own_mock_run_passes(encoder):
    import mteb

    results = mteb.mock_run(encoder)
    assert results.all_passed, results.to_markdown()
    assert sum(status is not None for _, status in results.items()) > 20
