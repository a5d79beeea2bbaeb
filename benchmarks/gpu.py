"""Speed and memory on one GPU: Qwen2-VL's 2B or 7B shape with random weights, bf16, LoRA of rank 128.

    python -m benchmarks.gpu 2b                        → benchmarks/results/gpu-2b.json
    python -m benchmarks.gpu 7b --only check,train     some of: check embed train memory large
    python -m benchmarks.gpu 2b --compile --out FILE   with the layers of language model and vision tower compiled
    python -m benchmarks.gpu --tiny --out FILE         every line on a CPU, to see that it runs

- check: the packed kernel against torch's attention item by item; packed and padded vectors against each item alone;
- embed: bulk embedding, packed, padded in length buckets, as sentence-transformers (32 items at a time, sorted by
  length) and as the reference (32 at a time in input order, all padded to the longest item);
- train: one optimizer step, packed, padded in length buckets and as the reference, with all graphs kept and with the
  gradient cache; as the reference with the cache is also what sentence-transformers' cached loss does;
- memory: peak memory and time of a step by token budget, activation checkpointing and gradient cache;
- large: one contrastive step of 3,840 queries.

Utilization is a share of the rate of a large matrix product measured in the same run. It counts forward and backward
once over real tokens (MFU), including the vision tower, without the passes repeated for gradient cache and
checkpointing. Items are random tokens and pixels, prepared before the clock starts; all sides use the same modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.gpu_model import (
    BUCKETS,
    DOCUMENT,
    PACKED,
    QUERY,
    REFERENCE,
    SORTED,
    Batching,
    Work,
    config_of,
    make_items,
    make_model,
    matmul_rate,
    peak_gib,
    reset_peak,
)
from benchmarks.common.machine import describe_machine
from benchmarks.common.process_group import start_process_group
from benchmarks.common.results import print_table, write_result
from benchmarks.common.timing import alternate, measure, median_ratio
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

HEADS, KEY_HEADS = 12, 2
NEGLIGIBLE_RATE = 1e-12  # a learning rate that changes nothing, so that all sides see the same weights
TARGET_EMBED = 0.6  # of the matmul rate


class Bench:
    """One model on one device; `figures` collects what the sections measure."""

    def __init__(self, size: str, device: torch.device, rounds: int, items: int, pairs: int) -> None:
        self.small, self.rounds, self.device = size == "tiny", rounds, device
        self.to_embed, self.in_step = items, pairs
        self.dtype = torch.float32 if self.small else torch.bfloat16
        self.config = config_of(size)
        self.rank = 4 if self.small else 128
        self.budget = 256 if self.small else 16384
        self.count = (lambda full, few: few) if self.small else (lambda full, few: full)
        self.rate = matmul_rate(device, self.dtype, self.count(8192, 256))
        self.figures: dict[str, Any] = {"size": size, "matmul_tflops": self.rate / 1e12}
        self.model: EmbeddingModel = make_model(self.config, device, self.dtype)
        self.engine = None
        print(f"{describe_machine()}\nmatmul: {self.rate / 1e12:.1f} TFLOP/s")

    def items(self, count: int, side: tuple[float, int], seed: int) -> list[EncodedItem]:
        return make_items(count, side, seed, self.config["text_config"]["vocab_size"], self.small)

    def pairs(self, count: int) -> tuple[list[EncodedItem], list[EncodedItem]]:
        return self.items(count, QUERY, 1), self.items(count, DOCUMENT, 2)

    def check(self) -> None:
        """Differences that should be no larger than rounding: 1e-5 in fp32, about 1e-2 of a vector in bf16."""
        differences = {
            f"kernel, {'causal' if causal else 'bidirectional'}": self._kernel(causal) for causal in (False, True)
        }
        items = self.items(self.count(32, 6), QUERY, 3)
        with torch.inference_mode():
            alone = torch.cat([self.model(collate([item], self.device)) for item in items])
            for name, packed in (("packed", True), ("padded", False)):
                difference = self.model(collate(items, self.device, packed)) - alone
                differences[f"{name} vectors against each item alone"] = difference.norm(dim=1).max().item()
        self.figures["check"] = differences
        print_table(("largest difference", ""), [(name, f"{value:.1e}") for name, value in differences.items()])

    def _kernel(self, causal: bool) -> float:
        """Largest difference of outputs and gradients from float32, relative to the largest value."""
        lengths = [37, 1, 512, 129, 300]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
        rows = [torch.randn(sum(lengths), heads, 128, device=self.device) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        worst, results = 0.0, []
        for dtype in (self.dtype, torch.float32):
            arguments = [row.to(self.dtype).to(dtype).requires_grad_() for row in rows]
            output = packed_attention(*arguments, bounds, max(lengths), causal)
            output.float().square().sum().backward()
            results.append([output.detach(), *(argument.grad for argument in arguments)])
        for value, exact in zip(*results, strict=True):
            worst = max(worst, ((value.float() - exact).abs().max() / exact.abs().max()).item())
        return worst

    def embed(self) -> None:
        half = self.count(self.to_embed // 2, 12)
        items = [*self.items(half, QUERY, 4), *self.items(half, DOCUMENT, 5)]
        work = Work(self.config, items, rank=0)
        flops = work.forward + work.tower

        def run(batching: Batching) -> None:
            with torch.inference_mode():
                for _, batch in batching.batches(items, self.budget, self.device):
                    self.model(batch).cpu()

        sides = {
            "packed": PACKED,
            "padded buckets": BUCKETS,
            "as sentence-transformers": SORTED,
            "as the reference": REFERENCE,
        }
        times = self._alternate({name: partial(run, batching) for name, batching in sides.items()})
        rows = {
            name: {
                "seconds": seconds,
                "items_per_s": len(items) / min(seconds),
                "tokens_per_s": work.tokens / min(seconds),
                "utilization": flops / min(seconds) / self.rate,
                "computed_tokens": sides[name].computed(items, self.budget) / work.tokens,
                "speedup_of_packed": median_ratio(seconds, times["packed"]),
            }
            for name, seconds in times.items()
        }
        self.figures["embed"] = {"items": len(items), "tokens": work.tokens, "pictures": work.pictures, "sides": rows}
        print(f"\nembedding {len(items)} items, {work.tokens} tokens, {work.pictures} pictures")
        print_table(
            ("embed", "items/s", "tokens/s", f"utilization (target {TARGET_EMBED:.0%})", "computed", "packed speedup"),
            [
                (name, f"{row['items_per_s']:.0f}", f"{row['tokens_per_s']:.0f}", f"{row['utilization']:.1%}",
                 f"{row['computed_tokens']:.2f}×", f"{row['speedup_of_packed']:.2f}×")
                for name, row in rows.items()
            ],
        )  # fmt: skip

    def train(self) -> None:
        queries, documents = self.pairs(self.count(self.in_step, 6))
        work = Work(self.config, [*queries, *documents], self.rank)
        sides = {
            "packed": (PACKED, False),
            "packed, gradient cache": (PACKED, True),
            "padded buckets": (BUCKETS, False),
            "padded buckets, gradient cache": (BUCKETS, True),
            "as the reference": (REFERENCE, False),
            "as the reference, gradient cache": (REFERENCE, True),
        }
        outputs: dict[str, dict[str, float]] = {}

        def run(name: str) -> None:
            self._step(queries, documents, *sides[name])
            outputs[name] = {"loss": self.loss, "gradient_norm": self.gradient}

        times = self._alternate({name: partial(run, name) for name in sides})
        rows = {}
        for name, (batching, _) in sides.items():
            fastest = min(times[name])
            rows[name] = {
                "seconds": times[name],
                **outputs[name],
                "tokens_per_s": work.tokens / fastest,
                "utilization": self._utilization(work, fastest),
                "computed_tokens": batching.computed([*queries, *documents], self.budget) / work.tokens,
                "speedup_of_packed": median_ratio(times[name], times["packed"]),
            }
        self.figures["train"] = {"pairs": len(queries), "tokens": work.tokens, "pictures": work.pictures, "sides": rows}
        overhead = median_ratio(times["packed, gradient cache"], times["packed"]) - 1
        self.figures["train"]["gradient_cache_overhead"] = overhead
        print(f"\none step of {len(queries)} pairs, {work.tokens} tokens, {work.pictures} pictures")
        print_table(
            ("train", "loss", "gradient norm", "tokens/s", "utilization (MFU)", "tokens computed", "speedup of packed"),
            [
                (name, f"{row['loss']:.4f}", f"{row['gradient_norm']:.4f}", f"{row['tokens_per_s']:.0f}",
                 f"{row['utilization']:.1%}",
                 f"{row['computed_tokens']:.2f}×", f"{row['speedup_of_packed']:.2f}×")
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
        print_steps(rows)

    def large(self) -> None:
        queries, documents = self.pairs(self.count(3840, 24))
        work = Work(self.config, [*queries, *documents], self.rank)
        row = self._measured(queries, documents, work, self.budget, cached=True, checkpointed=True)
        self.figures["large"] = {"pairs": len(queries), "tokens": work.tokens, "pictures": work.pictures, **row}
        print(f"\none contrastive step of {len(queries)} pairs, {work.tokens} tokens, {work.pictures} pictures")
        print_steps([row])

    def _measured(
        self,
        queries: list[EncodedItem],
        documents: list[EncodedItem],
        work: Work,
        budget: int,
        cached: bool,
        checkpointed: bool,
    ) -> dict[str, Any]:
        """Time and peak memory of one step, or that it ran out of memory."""
        row = {"token_budget": budget, "gradient_cache": cached, "activation_checkpointing": checkpointed}
        reset_peak(self.device)
        try:
            step = partial(self._step, queries, documents, PACKED, cached, checkpointed, budget)
            seconds = measure(step, self.device)["seconds"]
        except torch.OutOfMemoryError:
            self.engine.optimizer.zero_grad()
            return row | {"out_of_memory": True}
        return row | {
            "seconds": seconds,
            "peak_gib": peak_gib(self.device),
            "loss": self.loss,
            "utilization": self._utilization(work, seconds),
        }

    def _utilization(self, work: Work, seconds: float) -> float:
        return (work.forward + work.backward + work.tower) / seconds / self.rate

    def _alternate(self, sides: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        """Seconds of each side in each round, after one warm-up round."""
        times = alternate(sides, self.rounds, self.device, warm_up_rounds=1)
        return {name: by_clock["seconds"] for name, by_clock in times.items()}

    def _step(
        self,
        queries: list[EncodedItem],
        documents: list[EncodedItem],
        batching: Batching,
        cached: bool,
        checkpointed: bool = True,
        budget: int | None = None,
    ) -> None:
        """One optimizer step under DeepSpeed, as in a training job; the vision tower runs on every picture."""
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

        if batching.fixed is None:
            passes = Passes(budget, cached, batching.packed)
            self.loss, _ = embedding_step(self.engine, queries, documents, loss_of, passes, visual_of, seed=0)
        else:
            self.loss = self._plain_step(queries, documents, loss_of, batching, cached, visual_of)
        self.engine.step()
        self.gradient = float(self.engine.get_global_grad_norm())

    def _plain_step(
        self,
        queries: list[EncodedItem],
        documents: list[EncodedItem],
        loss_of: LossOf,
        batching: Batching,
        cached: bool,
        visual_of: VisualOf,
    ) -> float:
        """The gradient of one step with batches that `embedding_step` does not make."""

        def forward() -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
            for rows, batch in batching.batches([*queries, *documents], self.budget, self.device):
                yield rows, *self.engine(batch, visual_of(batch.pictures))

        with torch.set_grad_enabled(not cached):
            _, vectors, taus = zip(*forward(), strict=True)
            embeddings = torch.cat(vectors)
        if cached:
            embeddings.requires_grad_()
        loss = loss_of(embeddings[: len(queries)], embeddings[len(queries) :], taus[0].detach(), slice(0, len(queries)))
        if cached:
            loss.backward()
            for rows, recomputed, _ in forward():
                self.engine.backward((recomputed * embeddings.grad[rows]).sum())
        else:
            self.engine.backward(loss)
        return loss.item()

    def _make_engine(self) -> None:
        phase = ContrastivePhase(
            queries="x",
            batch_size=1,
            learning_rate=NEGLIGIBLE_RATE,
            lora=Lora(r=self.rank, alpha=2 * self.rank, dropout=0.0),
        )
        add_lora(self.model, phase.lora, seed=0)
        hold_in_fp32(self.model)
        self.model.log_temperature.requires_grad_(False)
        self.tower = FrozenTower(self.model.backbone, self.model.scale).to(self.device)
        module = TemperedEmbedder(self.model, (-10.0, 10.0)).to(self.device).train()
        dtype = "float32" if self.small else "bfloat16"
        self.engine = make_engine(module, phase, Compute(zero_stage=1, dtype=dtype))


def print_steps(rows: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        flags = ("yes" if row[key] else "no" for key in ("gradient_cache", "activation_checkpointing"))
        setting = (str(row["token_budget"]), *flags)
        if row.get("out_of_memory"):
            cells.append((*setting, "out of memory", "", ""))
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        cells.append((*setting, peak, f"{row['seconds']:.2f}", f"{row['utilization']:.1%}"))
    print_table(("token budget", "gradient cache", "checkpointing", "peak GiB", "seconds", "utilization (MFU)"), cells)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "check": Bench.check,
    "embed": Bench.embed,
    "train": Bench.train,
    "memory": Bench.memory,
    "large": Bench.large,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=("2b", "7b"), default="2b")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections")
    parser.add_argument("--compile", action="store_true", help="compile the language model's layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=2048, help="in `embed` (2048)")
    parser.add_argument("--pairs", type=int, default=96, help="in a step of `train` (96)")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(words)
    chosen = options.only.split(",")
    if unknown := set(chosen) - SECTIONS.keys():
        parser.error(f"no section '{min(unknown)}'; choose from {', '.join(SECTIONS)}")
    size = "tiny" if options.tiny else options.size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("no GPU found; try --tiny")
    start_process_group(device)
    bench = Bench(size, device, options.rounds, options.items, options.pairs)
    if options.compile:
        backbone = bench.model.backbone.model
        for layer in (*backbone.language_model.layers, *backbone.visual.blocks):
            layer.compile(dynamic=True)
    for name, section in SECTIONS.items():
        if name in chosen:
            section(bench)
            # Written after each section, so that an interrupted run keeps what it has.
            write_result(f"gpu-{size}", bench.figures, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
