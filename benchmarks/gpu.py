"""Speed and memory on one GPU: Qwen2-VL's 2B or 7B shape with random weights, bf16, LoRA of rank 128.

    python benchmarks/gpu.py 2b                        → benchmarks/results/gpu-2b.json
    python benchmarks/gpu.py 7b --only check,train     some of: check embed train memory large
    python benchmarks/gpu.py 2b --compile --out FILE   the language model's layers compiled
    python benchmarks/gpu.py --tiny --out FILE         every line on a CPU, to see that it runs

- check: the packed kernel against torch's attention item by item; packed vectors against padded ones and each alone;
- embed: bulk embedding, packed, padded in length buckets, by sentence-transformers' way (32 at a time, sorted by
  length) and by the reference's (32 at a time in the order given, all padded to the longest item);
- train: one optimiser step, packed, padded in length buckets, and by the reference's way, with all graphs kept and with
  the gradient cache; the reference's way with the cache is also sentence-transformers' (its cached loss);
- memory: peak and time of a step by token budget, activation checkpointing and gradient cache;
- large: one contrastive step of 3,840 queries.

Shares are of the rate of a large matrix product measured in the same run: forward and backward counted once on real
tokens (MFU), the vision tower included, repeats for gradient cache and checkpointing not. Items are random tokens and
pixels, prepared before the clock runs; all ways read them with the same modules.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_model import (
    DOCUMENT,
    PACKED,
    PADDED,
    QUERY,
    REFERENCE,
    SORTED,
    Way,
    Work,
    config_of,
    machine,
    make_items,
    make_model,
    matmul_rate,
    peak_gib,
    reset_peak,
    seconds,
)

from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.model.batch import collate
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora
from umarvel_ray.model.losses import info_nce
from umarvel_ray.model.packing import packed_attention
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import Compute, ContrastivePhase, Lora
from umarvel_ray.train.embedding_step import LossOf, Passes, TemperedEmbedder, VisualOf, embedding_step
from umarvel_ray.train.engine import hold_in_fp32, make_engine
from umarvel_ray.train.frozen_tower import FrozenTower
from umarvel_ray.train.phases import VISION_CACHE_BYTES

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("check", "embed", "train", "memory", "large")
HEADS, KEY_HEADS = 12, 2
STILL = 1e-12  # a learning rate that moves nothing, so that all ways meet the same weights
WANTED_EMBED = 0.6  # of the matmul rate


class Bench:
    """One model on one device; `figures` collects what the sections measure."""

    def __init__(self, size: str, device: torch.device, rounds: int) -> None:
        self.small, self.rounds, self.device = size == "tiny", rounds, device
        self.dtype = torch.float32 if self.small else torch.bfloat16
        self.config = config_of(size)
        self.rank = 4 if self.small else 128
        self.budget = 256 if self.small else 16384
        self.count = (lambda full, few: few) if self.small else (lambda full, few: full)
        self.rate = matmul_rate(device, self.dtype, self.count(8192, 256))
        self.figures: dict[str, Any] = {"machine": machine(device), "size": size, "matmul_tflops": self.rate / 1e12}
        self.model: EmbeddingModel = make_model(self.config, device, self.dtype)
        self.engine = None
        print(f"{self.figures['machine']}\nmatmul: {self.rate / 1e12:.1f} TFLOP/s")

    def items(self, count: int, side: tuple[float, int], seed: int) -> list[EncodedItem]:
        return make_items(count, side, seed, self.config["text_config"]["vocab_size"], self.small)

    def pairs(self, count: int) -> tuple[list[EncodedItem], list[EncodedItem]]:
        return self.items(count, QUERY, 1), self.items(count, DOCUMENT, 2)

    def check(self) -> None:
        """Differences that must be as small as the precision: 1e-5 in fp32, about 1e-2 of a vector in bf16."""
        found = {f"kernel, {'causal' if causal else 'bidirectional'}": self._kernel(causal) for causal in (False, True)}
        items = self.items(self.count(32, 6), QUERY, 3)
        with torch.inference_mode():
            alone = torch.cat([self.model(collate([item], self.device)) for item in items])
            for name, packed in (("packed", True), ("padded", False)):
                difference = self.model(collate(items, self.device, packed)) - alone
                found[f"{name} vectors against each alone"] = difference.norm(dim=1).max().item()
        self.figures["check"] = found
        table(("largest difference", ""), [(name, f"{value:.1e}") for name, value in found.items()])

    def _kernel(self, causal: bool) -> float:
        """Outputs and gradients against the same arguments in float32, relative to the largest value."""
        lengths = [37, 1, 512, 129, 300]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
        rows = [torch.randn(sum(lengths), heads, 128, device=self.device) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        worst, results = 0.0, []
        for dtype in (self.dtype, torch.float32):
            arguments = [row.to(self.dtype).to(dtype).requires_grad_() for row in rows]
            output = packed_attention(*arguments, bounds, max(lengths), causal)
            output.float().square().sum().backward()
            results.append([output.detach(), *(argument.grad for argument in arguments)])
        for one, truth in zip(*results, strict=True):
            worst = max(worst, ((one.float() - truth).abs().max() / truth.abs().max()).item())
        return worst

    def embed(self) -> None:
        items = [*self.items(self.count(1024, 12), QUERY, 4), *self.items(self.count(1024, 12), DOCUMENT, 5)]
        work = Work(self.config, items, rank=0)
        flops = work.forward + work.tower

        def run(way: Way) -> None:
            with torch.inference_mode():
                for _, batch in way.batches(items, self.budget, self.device):
                    self.model(batch).cpu()

        ways = {
            "packed": PACKED,
            "padded buckets": PADDED,
            "sentence-transformers' way": SORTED,
            "reference's way": REFERENCE,
        }
        taken = self._race({name: partial(run, way) for name, way in ways.items()})
        rows = {
            name: {
                "seconds": times,
                "items_per_s": len(items) / min(times),
                "tokens_per_s": work.tokens / min(times),
                "useful": flops / min(times) / self.rate,
                "computed_tokens": ways[name].computed(items, self.budget) / work.tokens,
                "packed_faster": ratio(times, taken["packed"]),
            }
            for name, times in taken.items()
        }
        self.figures["embed"] = {"items": len(items), "tokens": work.tokens, "pictures": work.pictures, "ways": rows}
        print(f"\nembedding {len(items)} items, {work.tokens} tokens, {work.pictures} pictures")
        table(
            ("embed", "items/s", "tokens/s", f"useful (want {WANTED_EMBED:.0%})", "tokens computed", "packed faster"),
            [
                (name, f"{row['items_per_s']:.0f}", f"{row['tokens_per_s']:.0f}", f"{row['useful']:.1%}",
                 f"{row['computed_tokens']:.2f}×", f"{row['packed_faster']:.2f}×")
                for name, row in rows.items()
            ],
        )  # fmt: skip

    def train(self) -> None:
        queries, documents = self.pairs(self.count(96, 6))
        work = Work(self.config, [*queries, *documents], self.rank)
        ways = {
            "packed": (PACKED, False),
            "packed, gradient cache": (PACKED, True),
            "padded buckets": (PADDED, False),
            "padded buckets, gradient cache": (PADDED, True),
            "reference's way": (REFERENCE, False),
            "reference's way, gradient cache": (REFERENCE, True),
        }
        found: dict[str, dict[str, float]] = {}

        def run(name: str) -> None:
            self._step(queries, documents, *ways[name])
            found[name] = {"loss": self.loss, "gradient_norm": self.gradient}

        taken = self._race({name: partial(run, name) for name in ways})
        rows = {}
        for name, (way, _) in ways.items():
            fastest = min(taken[name])
            rows[name] = {
                "seconds": taken[name],
                **found[name],
                "tokens_per_s": work.tokens / fastest,
                "useful": self._useful(work, fastest),
                "computed_tokens": way.computed([*queries, *documents], self.budget) / work.tokens,
                "packed_faster": ratio(taken[name], taken["packed"]),
            }
        self.figures["train"] = {"pairs": len(queries), "tokens": work.tokens, "pictures": work.pictures, "ways": rows}
        overhead = ratio(taken["packed, gradient cache"], taken["packed"]) - 1
        self.figures["train"]["gradient_cache_overhead"] = overhead
        print(f"\none step of {len(queries)} pairs, {work.tokens} tokens, {work.pictures} pictures")
        table(
            ("train", "loss", "gradient norm", "tokens/s", "useful (MFU)", "tokens computed", "packed faster"),
            [
                (name, f"{row['loss']:.4f}", f"{row['gradient_norm']:.4f}", f"{row['tokens_per_s']:.0f}",
                 f"{row['useful']:.1%}",
                 f"{row['computed_tokens']:.2f}×", f"{row['packed_faster']:.2f}×")
                for name, row in rows.items()
            ],
        )  # fmt: skip
        print(f"the gradient cache adds {overhead:.0%}")

    def memory(self) -> None:
        queries, documents = self.pairs(self.count(64, 6))
        work = Work(self.config, [*queries, *documents], self.rank)
        rows = []
        for budget in (self.budget // 2, self.budget, 2 * self.budget):
            for checkpointed in (True, False):
                for cached in (True, False):
                    rows.append(self._measured(queries, documents, work, budget, cached, checkpointed))
        self.figures["memory"] = {"pairs": len(queries), "tokens": work.tokens, "configurations": rows}
        print(f"\npeak memory of a packed step of {len(queries)} pairs, {work.tokens} tokens")
        steps_table(rows)

    def large(self) -> None:
        queries, documents = self.pairs(self.count(3840, 24))
        work = Work(self.config, [*queries, *documents], self.rank)
        row = self._measured(queries, documents, work, self.budget, cached=True, checkpointed=True)
        self.figures["large"] = {"pairs": len(queries), "tokens": work.tokens, "pictures": work.pictures, **row}
        print(f"\none contrastive step of {len(queries)} pairs, {work.tokens} tokens, {work.pictures} pictures")
        steps_table([row])

    def _measured(
        self,
        queries: list[EncodedItem],
        documents: list[EncodedItem],
        work: Work,
        budget: int,
        cached: bool,
        checkpointed: bool,
    ) -> dict[str, Any]:
        """One step, timed, with its peak memory; "out of memory" is an answer too."""
        row = {"token_budget": budget, "gradient_cache": cached, "activation_checkpointing": checkpointed}
        reset_peak(self.device)
        try:
            taken = seconds(lambda: self._step(queries, documents, PACKED, cached, checkpointed, budget), self.device)
        except torch.OutOfMemoryError:
            self.engine.optimizer.zero_grad()
            return row | {"out_of_memory": True}
        return row | {
            "seconds": taken,
            "peak_gib": peak_gib(self.device),
            "loss": self.loss,
            "useful": self._useful(work, taken),
        }

    def _useful(self, work: Work, taken: float) -> float:
        return (work.forward + work.backward + work.tower) / taken / self.rate

    def _race(self, sides: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        """Seconds of each side in each round, after one round that is not counted; within a round all run in turn."""
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.rounds + 1):
            for name, side in sides.items():
                took = seconds(side, self.device)
                if number:
                    taken[name].append(took)
        return taken

    def _step(
        self,
        queries: list[EncodedItem],
        documents: list[EncodedItem],
        way: Way,
        cached: bool,
        checkpointed: bool = True,
        budget: int | None = None,
    ) -> None:
        """One optimiser step under DeepSpeed, as a training job takes it; every picture is new to the tower."""
        if self.engine is None:
            self._make_engine()
        backbone = self.model.backbone
        if checkpointed:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            backbone.gradient_checkpointing_disable()
        targets = torch.arange(len(queries), device=self.device)
        relevant = torch.eye(len(queries), dtype=torch.bool, device=self.device)
        visual_of = partial(VisionCache(VISION_CACHE_BYTES).features, self.tower)
        budget = budget or self.budget

        def loss_of(q: torch.Tensor, d: torch.Tensor, tau: torch.Tensor, rows: slice) -> torch.Tensor:
            return info_nce(q, d, targets, relevant, tau, rows)

        if way.fixed is None:
            passes = Passes(budget, cached, way.packed)
            self.loss, _ = embedding_step(self.engine, queries, documents, loss_of, passes, visual_of, seed=0)
        else:
            self.loss = self._plain_step(queries, documents, loss_of, way, cached, visual_of)
        self.engine.step()
        self.gradient = float(self.engine.get_global_grad_norm())

    def _plain_step(
        self,
        queries: list[EncodedItem],
        documents: list[EncodedItem],
        loss_of: LossOf,
        way: Way,
        cached: bool,
        visual_of: VisualOf,
    ) -> float:
        """The gradient of one step by a way that `embedding_step` does not know."""

        def forward() -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
            for rows, batch in way.batches([*queries, *documents], self.budget, self.device):
                yield rows, *self.engine(batch, visual_of(batch.pictures))

        with torch.set_grad_enabled(not cached):
            _, vectors, taus = zip(*forward(), strict=True)
            both = torch.cat(vectors)
        if cached:
            both.requires_grad_()
        loss = loss_of(both[: len(queries)], both[len(queries) :], taus[0].detach(), slice(0, len(queries)))
        if cached:
            loss.backward()
            for rows, again, _ in forward():
                self.engine.backward((again * both.grad[rows]).sum())
        else:
            self.engine.backward(loss)
        return loss.item()

    def _make_engine(self) -> None:
        step = ContrastivePhase(
            queries="x", batch_size=1, learning_rate=STILL, lora=Lora(r=self.rank, alpha=2 * self.rank, dropout=0.0)
        )
        add_lora(self.model, step.lora, seed=0)
        hold_in_fp32(self.model)
        self.model.log_temperature.requires_grad_(False)
        self.tower = FrozenTower(self.model.backbone, self.model.scale, self.device)
        module = TemperedEmbedder(self.model, (-10.0, 10.0)).to(self.device).train()
        dtype = "float32" if self.small else "bfloat16"
        self.engine = make_engine(module, step, Compute(zero_stage=1, dtype=dtype))


def ratio(times: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of how many times as long as ours a side took."""
    return statistics.median(other / own for other, own in zip(times, ours, strict=True))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def steps_table(rows: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        told = (f"{row['token_budget']}", *("yes" if row[k] else "no" for k in list(row)[1:3]))
        if row.get("out_of_memory"):
            cells.append((*told, "out of memory", "", ""))
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        cells.append((*told, peak, f"{row['seconds']:.2f}", f"{row['useful']:.1%}"))
    table(("token budget", "gradient cache", "checkpointing", "peak GiB", "seconds", "useful (MFU)"), cells)


def one_process_group(device: torch.device) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=("2b", "7b"), default="2b")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, float32")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the language model's layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the result file")
    given = parser.parse_args(words)
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section '{min(unknown)}'; choose from {', '.join(SECTIONS)}")
    size = "tiny" if given.tiny else given.size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        parser.error("no GPU at hand; try --tiny")
    out = given.out or RESULTS / f"gpu-{size}.json"
    one_process_group(device)
    bench = Bench(size, device, given.rounds)
    if given.compile:
        for layer in bench.model.backbone.model.language_model.layers:
            layer.compile(dynamic=True)
    for section in SECTIONS:
        if section in chosen:
            getattr(bench, section)()
            # After each, so that a run that is cut off leaves what it has.
            out.write_text(json.dumps(bench.figures, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
