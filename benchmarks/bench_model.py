"""What the speed benchmarks share: a model of realistic cost, items with picture files, timing, and the result file.

The model is Qwen2-VL with random weights and the demo base's tokenizer and processor: the demo base itself is so small
that calling its layers costs more than their arithmetic.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_torchvision  # noqa: F401  (before transformers)
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from umarvel_ray import demo
from umarvel_ray.items.images import open_image
from umarvel_ray.items.template import EMB, format_string
from umarvel_ray.recipe import ModelSettings

RESULTS = Path(__file__).parent / "results"
BASE = demo.BASE
SETTINGS = ModelSettings(min_pixels=4 * 16 * 16, max_pixels=100 * 16 * 16)
TEXT_MODEL = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.05}  # fmt: skip
VISION_MODEL = {"hidden_size": 384, "embed_dim": 192, "depth": 4, "num_heads": 3}
SHAPE = (
    f"Qwen2-VL, random weights, fp32: language model {TEXT_MODEL['num_hidden_layers']} × {TEXT_MODEL['hidden_size']} "
    f"(MLP {TEXT_MODEL['intermediate_size']}), vision tower {VISION_MODEL['depth']} × {VISION_MODEL['embed_dim']}; "
    "a picture is up to 100 tokens"
)
PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "deepspeed")
KINDS = {"short text": 0.4, "long text": 0.2, "image": 0.2, "image+text": 0.2}
EXTRACTS = (2, 8)  # in a long text
FILE_SIDES = (150, 500)  # pixels


def make_model(folder: Path, text: dict = TEXT_MODEL, vision: dict = VISION_MODEL, dtype: str = "float32") -> Path:
    """Write the HF directory of such layers; the same weights at every call."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((BASE / "config.json").read_text())
    config["text_config"] |= text | {"is_causal": False, "layer_types": None}
    config["vision_config"] |= vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config | {"dtype": dtype})).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    size = {"shortest_edge": SETTINGS.min_pixels, "longest_edge": SETTINGS.max_pixels}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(json.loads((BASE / name).read_text()) | {"size": size}))
    return folder


def make_peer_model(folder: Path) -> Path:
    """The same weights for other libraries: their chat template closes an item as ours does, so tokens are the same."""
    make_model(folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + f"{{{{ '<|im_start|>assistant\\n{EMB}.<|im_end|>\\n' }}}}")
    return folder


class ItemMaker:
    """Mixed items from the demo's documents: texts short and long, and pictures enlarged to JPEG files of web size."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        folder.mkdir()
        rows = pq.read_table(demo.DATA / "documents.parquet", columns=["text", "image", "source"]).to_pylist()
        self.short = [row["text"] for row in rows if row["text"] and row["source"] in ("emoji", "clipart", "keywords")]
        self.extracts = [row["text"] for row in rows if row["text"] and row["source"] == "wiki"]
        self.images = [row["image"] for row in rows if row["image"]]

    def short_text(self) -> str:
        return format_string(self._pick(self.short))

    def long_text(self) -> str:
        return format_string(" ".join(self._pick(self.extracts) for _ in range(self.rng.integers(*EXTRACTS))))

    def image_file(self) -> str:
        """A new file; no two are the same picture."""
        number = len(list(self.folder.iterdir()))
        size = tuple(self.rng.integers(*FILE_SIDES, 2).tolist())
        picture = open_image(self.images[number], "picture").resize(size, Image.Resampling.BICUBIC)
        path = self.folder / f"{number}.jpg"
        picture.save(path, quality=90)
        return str(path)

    def item(self, kind: str) -> dict[str, str]:
        item = {}
        if kind.startswith("image"):
            item["image"] = self.image_file()
        if kind.endswith("text"):
            item["text"] = self.long_text() if kind == "long text" else self.short_text()
        return item

    def items(self, count: int) -> list[dict[str, str]]:
        """In random order, of the kinds in `KINDS`."""
        return [self.item(kind) for kind in self.rng.choice(list(KINDS), count, p=list(KINDS.values()))]

    def pairs(self, kinds: Sequence[tuple[str, str]], count: int) -> tuple[list[dict], list[dict]]:
        """Queries and their documents, of random pairs of kinds."""
        chosen = [self._pick(kinds) for _ in range(count)]
        return [self.item(query) for query, _ in chosen], [self.item(document) for _, document in chosen]

    def _pick(self, values: Sequence[Any]) -> Any:
        return values[self.rng.integers(len(values))]


def race(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by the clock and of the processor, of each side in each round; within a round all sides run in turn.

    A shared machine is not equally fast at all times: ratios are taken within a round.
    """
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    taken = {name: {clock: [] for clock in clocks} for name in sides}
    names = list(sides)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begin = {clock: now() for clock, now in clocks.items()}
            sides[name]()
            for clock, now in clocks.items():
                taken[name][clock].append(now() - begin[clock])
            print(f"  round {number + 1}, {name}: {taken[name]['seconds'][-1]:.2f} s", flush=True)
    return taken


def median_ratio(others: list[float], ours: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def machine() -> dict[str, Any]:
    """Where this was measured."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
    }


def report(
    name: str,
    setting: str,
    work: dict[str, int],
    taken: dict[str, dict[str, list[float]]],
    wanted: dict[str, float],
    differences: dict[str, float],
    **results: Any,
) -> None:
    """Print the table and write `results/NAME.json`.

    Args:
        setting: what was measured, in words.
        work: what every side does in a round, by unit: their best rates are shown.
        taken: what `race` returns, ours first.
        wanted: the ratio asked of ours against a side.
        differences: between the sides' results, by name.
        results: what else goes into the file.
    """
    own = next(iter(taken.values()))
    rates = {
        side: {unit: count / min(times["seconds"]) for unit, count in work.items()} for side, times in taken.items()
    }
    faster = {side: {clock: median_ratio(times[clock], own[clock]) for clock in times} for side, times in taken.items()}
    figures = {"machine": machine(), "setting": setting, "work": work, "taken": taken, "rates": rates,
               "ours_faster": faster, "wanted": wanted, "differences": differences, **results}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{setting}\n{figures['machine']}\n")
    print(
        f"| {name} | " + " | ".join(f"{unit}/s" for unit in work) + " | ours is faster | by processor time | wanted |"
    )
    print("|---|" + "---:|" * (len(work) + 3))
    for side, by_clock in faster.items():
        cells = [*(f"{rate:.1f}" for rate in rates[side].values()), *(f"{ratio:.2f}×" for ratio in by_clock.values())]
        print(f"| {side} | " + " | ".join([*cells, f"{wanted[side]:.1f}×" if side in wanted else ""]) + " |")
    for what, difference in differences.items():
        print(f"largest difference, {what}: {difference:.1e}")


def arguments(words: Sequence[str]) -> dict[str, int]:
    """`items=64 rounds=1` as keyword arguments."""
    return {name: int(value) for name, value in (word.split("=") for word in words)}
