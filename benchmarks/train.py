"""Contrastive training from picture files on the CPU in fp32, all sides in one process.

- ours: `embedding_step` under DeepSpeed, with all graphs kept (`gradient_cache: false`) and with the gradient cache;
- sentence-transformers 6: `CachedMultipleNegativesRankingLoss` with its own mini-batches of 32, each side padded to its
  longest item;
- as the reference: queries and documents as one batch padded to its longest item, forward in chunks of 32, the whole
  similarity matrix.

All use the same weights, pairs, LoRA on the language model (the vision tower is frozen), clipping and AdamW, and
InfoNCE in one direction at a fixed temperature. A step starts from files and texts and ends with the optimizer step.
The losses of all steps of the first round are compared. No picture occurs twice, so our vision cache never hits. All
sides resize with Pillow, so that losses can agree.

    PYTHONPATH=.venv/speed python -m benchmarks.train [pairs=48] [steps=2] [rounds=2]    → benchmarks/results/train.json
    pip install --no-deps --target .venv/speed -r requirements-speed.lock     (first; `make bench` does it)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn
from torch.nn import functional as F

from benchmarks.common.items import ItemMaker
from benchmarks.common.padded_peers import (
    embed_padded,
    open_pictures,
    pillow_processor,
    read_padded,
    sentence_transformer,
    split_padded,
)
from benchmarks.common.process_group import start_process_group
from benchmarks.common.results import integer_arguments, report_comparison
from benchmarks.common.small_model import SETTINGS, SHAPE, make_model, make_peer_model
from benchmarks.common.timing import CPU, alternate
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora, lora_config
from umarvel_ray.model.losses import info_nce
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import Compute, ContrastivePhase, Lora
from umarvel_ray.train.embedding_step import Passes, TemperedEmbedder, embedding_step
from umarvel_ray.train.engine import make_engine, start_step, take_step
from umarvel_ray.train.frozen_tower import FrozenTower

OURS, CACHED = "umarvel-ray", "umarvel-ray, cached"
PEER, REFERENCE = "sentence-transformers, cached", "as the reference"
TARGETS = {PEER: 2.0, REFERENCE: 2.0}
PAIRS = (
    ("short text", "image"),
    ("image", "long text"),
    ("image+text", "image"),
    ("short text", "image+text"),
    ("short text", "long text"),
)
PHASE = ContrastivePhase(queries="pairs", batch_size=1, learning_rate=1e-3, lora=Lora(r=16, alpha=32, dropout=0.0))
TEMPERATURE = 0.05
TOKEN_BUDGET = 1024
CHUNK = 32
SEED = 1

Side = list[dict]
StepOf = Callable[[Side, Side], float]  # queries and their documents → loss


def our_side(path: Path, cached: bool) -> StepOf:
    encoder = ItemEncoder.from_pretrained(path, SETTINGS)
    model = EmbeddingModel.from_pretrained(path, SETTINGS, temperature=TEMPERATURE)
    add_lora(model, PHASE.lora, SEED)
    model.log_temperature.requires_grad_(False)
    module = TemperedEmbedder(model, (-10.0, 10.0)).train()
    tower = FrozenTower(model.backbone, model.scale)
    engine = make_engine(module, PHASE, Compute(zero_stage=0, dtype="float32"))
    passes = Passes(TOKEN_BUDGET, cached)

    def step(queries: Side, documents: Side) -> float:
        cache = VisionCache(2**30)
        targets = torch.arange(len(queries))
        relevant = torch.eye(len(queries), dtype=torch.bool)
        start_step(engine, PHASE.learning_rate)
        encoded = [[encoder.encode(item, "document") for item in side] for side in (queries, documents)]
        loss, _ = embedding_step(
            engine,
            *encoded,
            lambda q, d, tau, rows: info_nce(q, d, targets, relevant, tau, rows),
            passes,
            partial(cache.features, tower),
            seed=0,
        )
        take_step(engine)
        return loss

    return step


def peer_side(path: Path) -> StepOf:
    """sentence-transformers' model and loss in a minimal loop, because its trainer would add to the time."""
    peer = sentence_transformer(path).train()
    loss_of = CachedMultipleNegativesRankingLoss(peer, scale=1 / TEMPERATURE, mini_batch_size=CHUNK)
    update = adapted(peer[0].model)

    def step(queries: Side, documents: Side) -> float:
        with pillow_processor(peer):
            sides = [peer.preprocess(open_pictures(side)) for side in (queries, documents)]
        loss = loss_of(sides, labels=None)
        loss.backward()
        update()
        return loss.item()

    return step


def reference_side(path: Path) -> StepOf:
    """One graph over the whole batch, as the reference's trainer builds it."""
    peer = sentence_transformer(path).train()
    model = peer[0].model
    update = adapted(model)

    def step(queries: Side, documents: Side) -> float:
        with pillow_processor(peer):
            batch = read_padded(peer[0].processor, [*queries, *documents])
        vectors = torch.cat([embed_padded(model, chunk) for chunk in split_padded(batch, CHUNK)])
        logits = vectors[: len(queries)] @ vectors[len(queries) :].T / TEMPERATURE
        loss = F.cross_entropy(logits, torch.arange(len(queries)))
        loss.backward()
        update()
        return loss.item()

    return step


def adapted(model: nn.Module) -> Callable[[], None]:
    """Put our adapters into another library's model, in place, and return its optimizer step, with our clipping."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        inject_adapter_in_model(lora_config(PHASE.lora), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=PHASE.learning_rate, betas=PHASE.adam_betas, eps=PHASE.adam_eps, weight_decay=PHASE.weight_decay
    )

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, PHASE.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return update


def main(pairs: int = 48, steps: int = 2, rounds: int = 2) -> None:
    start_process_group(CPU)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = ItemMaker(folder / "pictures")
        batches = [maker.pairs(PAIRS, pairs) for _ in range(steps)]
        path, peer_path = make_model(folder / "model"), make_peer_model(folder / "peer")
        lengths = item_lengths(path, [item for batch in batches for side in batch for item in side])
        sides = {
            OURS: our_side(path, cached=False),
            CACHED: our_side(path, cached=True),
            PEER: peer_side(peer_path),
            REFERENCE: reference_side(peer_path),
        }

        def run(name: str) -> None:
            losses.setdefault(name, [sides[name](*batch) for batch in batches])

        times = alternate({name: partial(run, name) for name in sides}, rounds)
    report_comparison(
        "train",
        f"{SHAPE}. {steps} steps of {pairs} pairs, {sum(lengths)} tokens ({min(lengths)} to {max(lengths)} per item)",
        {"tokens": sum(lengths), "pairs": pairs * steps},
        times,
        TARGETS,
        {f"losses of {name}": difference(values, losses[OURS]) for name, values in losses.items() if name != OURS},
        losses=losses,
    )


def item_lengths(path: Path, items: Side) -> list[int]:
    encoder = ItemEncoder.from_pretrained(path, SETTINGS)
    return [encoder.encode(item, "document").length for item in items]


def difference(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


if __name__ == "__main__":
    main(**integer_arguments(sys.argv[1:]))
