"""The exactness kit: the training core on gloo processes without Ray, and plain PyTorch to compare it with."""

from __future__ import annotations

import io
import os
import socket
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image

from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model.batch import collate
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora
from umarvel_ray.model.losses import info_nce
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import Compute, ContrastivePhase, Lora, ModelSettings
from umarvel_ray.train.embedding_step import Passes, TemperedEmbedder, embedding_step
from umarvel_ray.train.engine import capture, hold_in_fp32, load_trainable, make_engine, restore, start_step, take_step
from umarvel_ray.train.frozen_tower import FrozenTower

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096)
STEP = ContrastivePhase(queries="x", batch_size=6, learning_rate=1e-3, clip_norm=0.5, weight_decay=0.1, adam_eps=1e-6,
                       lora=Lora(r=4, alpha=8, dropout=0.0))  # fmt: skip
BOUNDS = (np.log(0.01), np.log(1.0))
STEPS = 3
BUDGET = 120  # several chunks per rank, not the same number on each


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@cache
def batches(base: Path, apart: bool) -> list[tuple[list, list, torch.Tensor, torch.Tensor]]:
    """Per step: encoded queries (N = 6) and documents (M = 9) of uneven lengths, targets (N,) and relevant (N, M).

    Some positives are shared between queries. `apart`: the first half of each side is text only and the second half
    pictures, so that one rank has no pictures; otherwise they are mixed.
    """
    encoder = ItemEncoder.from_pretrained(base, SETTINGS)
    made = []
    for step in range(STEPS):
        queries = [
            {"image": picture(10 * step + i), "text": "boat"}
            if (i >= 3 if apart else i % 2 == 0)
            else {"text": "fox " * (1 + (i * 7 + step) % 11), "instruction": "Find an image."}
            for i in range(6)
        ]
        documents = [
            {"image": picture(10 * step + i % 7)}
            if (i >= 5 if apart else i < 3)
            else {"text": f"snow {i} " * (1 + i + step)}
            for i in range(9)
        ]
        targets = torch.tensor([0, 1, 2, 3, 4, 4])
        relevant = torch.zeros(6, 9, dtype=torch.bool)
        relevant[torch.arange(6), targets] = True
        relevant[0, 5] = relevant[3, 7] = relevant[2, 0] = True
        made.append(
            ([encoder.encode(q, "query") for q in queries], [encoder.encode(d, "document") for d in documents],
             targets, relevant)
        )  # fmt: skip
    return made


def tempered(base: Path, dtype: str = "float32", lora: Lora = STEP.lora) -> TemperedEmbedder:
    model = EmbeddingModel.from_pretrained(base, SETTINGS, dtype, temperature=0.07)
    add_lora(model, lora, seed=3)
    hold_in_fp32(model)
    # The B matrices start at zero, where half of the gradient vanishes; random values make all of it count.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return TemperedEmbedder(model, BOUNDS)


def plain_run(base: Path, two_way: bool = False, dtype: str = "float32", apart: bool = False) -> dict:
    """Ground truth: one process, one graph, the loss as a loop over the formula, torch's own AdamW and clipping.

    With bfloat16, only the forward pass uses it: fp32 parameters under torch's autocast, fp32 similarities and loss.
    """
    module = tempered(base, dtype)
    model = module.embedder
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    decayed = [p for n, p in trainable.items() if "temperature" not in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [model.log_temperature], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-6)
    losses, norms, taus = [], [], []
    for queries, documents, targets, relevant in batches(base, apart):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            q = torch.cat([model(collate([item])) for item in queries])
            d = torch.cat([model(collate([item])) for item in documents])
        taus.append(model.log_temperature.item())
        similarity = (q @ d.T) / model.log_temperature.exp()
        loss = 0.0
        for i, j in enumerate(targets.tolist()):
            others = [k for k in range(9) if not relevant[i, k]]
            loss = loss - similarity[i, j] + torch.logsumexp(similarity[i, [j, *others]], dim=0)
            if two_way:
                others = [k for k in range(6) if not relevant[k, j]]
                loss = loss - similarity[i, j] + torch.logsumexp(similarity[[i, *others], j], dim=0)
        loss = loss / 6
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(list(trainable.values()), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    state = {f"param.{n}": p.detach().clone() for n, p in trainable.items()}
    state |= {f"exp_avg.{n}": optimizer.state[p]["exp_avg"] for n, p in trainable.items()}
    return {"losses": losses, "norms": norms, "log_temperatures": taus, "state": state}


def run_ranks(world: int, cases: list[dict], out: Path) -> list[dict]:
    """Run every case on `world` gloo ranks; returns rank 0's results in order."""
    spawn(world, _cases, cases, str(out))
    return torch.load(out)


def spawn(world: int, work: Callable[..., None], *args) -> None:
    """Call `work(rank, world, *args)` in `world` processes that form a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(world, port, work, args), nprocs=world)


def _rank(rank: int, world: int, port: int, work: Callable[..., None], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    work(rank, world, *args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads that DeepSpeed leaves behind sometimes abort a normal exit


def _cases(rank: int, world: int, cases: list[dict], out: str) -> None:
    results = [_case(rank, world, **case) for case in cases]
    if rank == 0:
        torch.save(results, out)


def _case(
    rank: int,
    world: int,
    base: Path,
    zero: int = 1,
    cached: bool = True,
    packed: bool = False,
    two_way: bool = False,
    cache_vision: bool = False,
    dtype: str = "float32",
    apart: bool = False,
    dropout: float = 0.0,
    start: int = 0,
    state: dict | None = None,
    stop: int = STEPS,
    poisoned: bool = False,
) -> dict:
    """One run of `stop - start` steps. `poisoned`: the last rank's loss is finite but its gradient is NaN."""
    module = tempered(base, dtype, Lora(r=4, alpha=8, dropout=dropout)).train()
    if state:
        load_trainable(module, state)
    tower = FrozenTower(module.embedder.backbone, module.embedder.scale)
    engine = make_engine(module, STEP, Compute(zero_stage=zero, dtype=dtype))
    if state:
        restore(engine, state, start)
    visual_of = partial(VisionCache(2**30 if cache_vision else 0).features, tower)
    losses, norms, taus = [], [], []
    for number in range(start, stop):
        queries, documents, targets, relevant = batches(base, apart)[number]

        def loss_of(q, d, tau, rows, targets=targets, relevant=relevant):
            taus.append(tau.item())
            loss = info_nce(q, d, targets, relevant, tau, rows, two_way)
            return loss + (q * 0).sum().sqrt() if poisoned and rank == world - 1 else loss

        start_step(engine, STEP.learning_rate)
        query_rows = slice(rank * 6 // world, (rank + 1) * 6 // world)
        document_rows = slice(rank * 9 // world, (rank + 1) * 9 // world)
        loss, _ = embedding_step(
            engine,
            queries[query_rows],
            documents[document_rows],
            loss_of,
            Passes(BUDGET, cached, packed),
            visual_of,
            seed=100 + number,
        )
        norms.append(take_step(engine))
        losses.append(loss)
    captured = capture(engine)
    engine.destroy()
    return {"losses": losses, "norms": norms, "log_temperatures": taus, "state": captured}
