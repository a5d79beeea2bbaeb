"""Everything that runs a model, on a named device: bulk and online embedding, reranking, and training steps.

`run_scenarios` runs each on the CPU and on another device, in a process of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.embedding_tables import SETTINGS, make_documents
from tests.support.exactness import spawn
from tests.support.tiny import make_tiny_base
from umarvel_ray.data.plan import PlanStep
from umarvel_ray.inference.cached_embedder import CachedEmbedder
from umarvel_ray.inference.score import RerankerActor
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.model import embedder as embedder_module
from umarvel_ray.model.checkpoint import CheckpointRef, save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.int8 import quantize
from umarvel_ray.model.reranker import Reranker, RerankerModel
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Compute, ContrastivePhase, DistillPhase, Lora, Phase, RerankPhase, Temperature
from umarvel_ray.retrieve.topk import topk
from umarvel_ray.serving.replicas import EmbedderDeployment, RerankerDeployment
from umarvel_ray.serving.settings import Runtime
from umarvel_ray.train import loop
from umarvel_ray.train.embedding_step import Passes
from umarvel_ray.train.engine import capture, start_step, take_step
from umarvel_ray.train.phases import PhaseSpec
from umarvel_ray.train.state import TrainState
from umarvel_ray.train.steps import run_step
from umarvel_ray.train.stream import RankItems, RankPairs

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STEPS = 2
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}
COMMON = {"queries": "x", "learning_rate": 1e-3, "lora": Lora(**LORA)}
PHASES: dict[str, Phase] = {
    "contrastive": ContrastivePhase(
        **COMMON, batch_size=4, two_way=True, matryoshka=[16], temperature=Temperature(learn=True)
    ),
    "trained tower": ContrastivePhase(**COMMON, batch_size=4, vision="full"),
    "distill": DistillPhase(**COMMON, batch_size=4, temperature=Temperature(init=0.05, learn=True)),
    "rerank": RerankPhase(**COMMON, batch_size=4),
}


def items() -> list[dict[str, Any]]:
    """Texts, pictures, and both; some pictures occur twice."""
    rows = [
        {key: value for key, value in row.items() if value and key != "id"} for row in make_documents(12).to_pylist()
    ]
    return [*rows, rows[1]]


def embed(base: Path, device: str) -> np.ndarray:
    return Embedder.from_pretrained(base, device, settings=SETTINGS).encode_document(items())


def embed_int8(base: Path, device: str) -> np.ndarray:
    embedder = Embedder.from_pretrained(base, "cpu", settings=SETTINGS)
    quantize(embedder.model.backbone.model.language_model, "cuda")  # the same levels and products on all devices
    return Embedder(embedder.model, embedder.encoder, device).encode_document(items())


def embed_cached(base: Path, device: str) -> np.ndarray:
    """The second pass finds some items cached and some not."""
    embedder = CachedEmbedder(device, "float32", 1024, 1, 2**30)
    embedder.load(CheckpointRef.of(base, SETTINGS))
    rows = make_documents(12).to_pylist()
    embedder.embed(rows[::2], "document")
    return embedder.embed(rows, "document")[1]


def search(base: Path, device: str) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    exclude = Ragged(np.arange(0, 16, 3), np.tile(np.arange(3), 5))
    return topk(vectors[:5], vectors, 4, exclude, device)[0]


def reranker_ref(base: Path) -> CheckpointRef:
    folder, settings = base.parent / f"{base.name}-reranker", SETTINGS.for_reranker(64)
    if not folder.exists():
        save_checkpoint(RerankerModel.from_pretrained(base, settings), folder, settings, {"phase": "reranker"})
    return CheckpointRef.of(folder)


def rerank(base: Path, device: str) -> np.ndarray:
    """Queries with pictures that are documents, too, and were seen before."""
    reranker = Reranker.from_pretrained(reranker_ref(base).path, device)
    return np.stack([reranker.score(items()[number], items()) for number in (1, 2, 4)])


def rerank_in_bulk(base: Path, device: str) -> np.ndarray:
    """With the model of an actor, whose class is taken out of Ray."""
    make = RerankerActor.__ray_metadata__.modified_class
    reranker = make(Compute(dtype="float32"), device, 1)._load(reranker_ref(base))
    documents = [reranker.encoder.encode_document(item) for item in items()]
    return reranker.score_encoded(reranker.encoder.encode_query(items()[1]), documents, 1024)


def serve_embedder(base: Path, device: str) -> np.ndarray:
    """A replica's model step: the class behind the deployment, without Serve's batching."""
    folder = base.parent / f"{base.name}-embedder"
    if not folder.exists():
        save_checkpoint(Embedder.from_pretrained(base, "cpu", settings=SETTINGS).model, folder, SETTINGS, {})
    replica = EmbedderDeployment.func_or_class(CheckpointRef.of(folder), Runtime(device, "float32", 1))
    encoder = ItemEncoder.from_pretrained(folder, SETTINGS)
    return replica._embedder.embed_encoded([encoder.encode(item, "document") for item in items()])


def serve_reranker(base: Path, device: str) -> np.ndarray:
    replica = RerankerDeployment.func_or_class(reranker_ref(base), Runtime(device, "float32", 1))
    encoder = replica._reranker.encoder
    documents = [encoder.encode_document(item) for item in items()]
    return replica._reranker.score_encoded(encoder.encode_query(items()[1]), documents)


def train(base: Path, device: str, phase: str, cache_vision: bool, resumed: bool = False) -> np.ndarray:
    """Losses, τ and gradient norms of steps through DeepSpeed (ZeRO-0): the second has old and new pictures."""
    compute = Compute(dtype="float32", zero_stage=0, cache_vision=cache_vision, activation_checkpointing=False)
    folder = str(base.parent / "phase")
    spec = PhaseSpec("x", PHASES[phase], str(base), folder, folder, SETTINGS, compute, 0, {})
    state, measured = TrainState(), []
    for _ in range(1 + resumed):
        engine, visual_of = loop.start_phase(spec, state)
        assert engine.device.type == device
        for tower in getattr(visual_of, "args", ()):
            assert next(tower._visual.parameters()).device.type == device
        for step in range(state.steps, state.steps + STEPS):
            start_step(engine, 1e-3)
            engine.train()
            passes = Passes(token_budget=(200, 4000)[step % 2], cached=True, packed=True)  # several chunks, or one
            loss, temperature, _ = run_step(engine, spec, batch(base, phase, step), passes, visual_of)
            measured.append((loss, temperature, take_step(engine)))
        state = TrainState(state.steps + STEPS, capture(engine))
        engine.destroy()
    return np.array(measured)


@cache
def batch(base: Path, phase: str, step: int) -> RankItems | RankPairs:
    """Four queries and five documents, in which pictures recur; or four pairs."""
    ids = ([f"q{i}" for i in range(4)], [f"d{i}" for i in range(5)])
    if phase == "rerank":
        encoder = PairEncoder.from_pretrained(base, SETTINGS, 64)
        pairs = [encoder.encode(items()[i + 2 * step], items()[i + 1], i % 2 == 0) for i in range(4)]
        return RankPairs(PlanStep(step, ids[0], ids[1][:4], {"answers": np.array([1, 0, 1, 0], np.int32)}), pairs)
    encoder = ItemEncoder.from_pretrained(base, SETTINGS)
    queries = [encoder.encode(items()[i + step], "query") for i in range(4)]
    documents = [encoder.encode(items()[(i + 4 + 2 * step) % 12], "document") for i in range(5)]
    arrays = {
        "targets": np.arange(4, dtype=np.int32),
        "relevant": np.array([[i, i] for i in range(4)] + [[0, 4]], np.int32),
    }
    if phase == "distill":
        arrays = {
            "candidates": np.array([[0, 1, 2], [1, 3, -1], [2, 4, 0], [3, 0, 1]], np.int32),
            "teacher": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3),
        }
    return RankItems(PlanStep(step, *ids, arrays), queries, documents)


MODELS = {
    "embed": embed,
    "embed int8": embed_int8,
    "embed cached": embed_cached,
    "search": search,
    "rerank": rerank,
    "rerank in bulk": rerank_in_bulk,
    "serve embedder": serve_embedder,
    "serve reranker": serve_reranker,
}
TRAINING = {
    "contrastive": ("contrastive", False),
    "contrastive, tower cached": ("contrastive", True),
    "contrastive, tower cached, resumed": ("contrastive", True, True),
    "contrastive, tower trained": ("trained tower", True),
    "distill": ("distill", True),
    "reranker": ("rerank", True),
}


def run_scenarios(names: Iterable[str], folder: Path, device: str = "second") -> dict[tuple[str, str], tuple[Any, Any]]:
    """By family and name: the result on the CPU and that on a device, or the traceback of an error."""
    bases = {family: make_tiny_base(folder / family / "base", family=family) for family in FAMILIES}
    spawn(1, _run_all, bases, list(names), device, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=False)


def _run_all(rank: int, world: int, bases: dict[str, Path], names: list[str], device: str, out: str) -> None:
    contexts: dict[str, Any] = {"cpu": nullcontext, device: nullcontext}
    if device == "second":
        from tests.support.second_device import second_device

        contexts[device] = second_device
        _pretend()
    results = {}
    for (family, base), name in product(bases.items(), names):
        own = []
        for on, context in contexts.items():
            if device == "second":
                _choose_accelerator(on)
            try:
                with context():
                    result = MODELS[name](base, on) if name in MODELS else train(base, on, *TRAINING[name])
            except Exception:
                result = traceback.format_exc()
            own.append(result)
        results[family, name] = tuple(own)
    torch.save(results, out)


def _pretend() -> None:
    """Batches are packed, as on a GPU; parameters keep their identity in DeepSpeed's `module.to`, as on a GPU."""
    embedder_module.is_packed = lambda choice, device: True
    make_engine = loop.make_engine

    def make(module: nn.Module, phase: Phase, compute: Compute) -> Any:
        from deepspeed.accelerator import get_accelerator

        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.requires_grad:
                    setattr(part, name, nn.Parameter(parameter.detach().to(get_accelerator().device_name())))
        return make_engine(module, phase, compute)

    loop.make_engine = make


def _choose_accelerator(device: str) -> None:
    """Make DeepSpeed use a device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.device_name = lambda index=None: device
    accelerator.current_device_name = lambda: device
    accelerator.set_device = lambda index: None
    accelerator.device = lambda index=None: nullcontext()
