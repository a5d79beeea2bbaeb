"""The estimates of a recipe as aligned plain text, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

from umarvel_ray.errors import UserError
from umarvel_ray.estimate.flops import step_flops, text_forward, vision_forward
from umarvel_ray.estimate.load import (
    CHARACTERS_PER_TOKEN,
    Load,
    corpus,
    item_tokens,
    loads,
    template_tokens,
)
from umarvel_ray.estimate.memory import Memory, memory
from umarvel_ray.estimate.shape import Shape, read_shape
from umarvel_ray.recipe import Recipe
from umarvel_ray.train.phases import VISION_CACHE_BYTES

PEAK, PEAK_OF = 989e12, "an H100 SXM's 989 TFLOP/s in bf16"
UTILIZATION = 0.4  # assumed share of the peak
GIB, FLOAT32 = 2**30, 4


def estimate(recipe: Recipe) -> str:
    """Steps, tokens, FLOPs, hours and memory of every phase, and the size of mining, as lines of plain text."""
    try:
        shape = read_shape(recipe.base)
    except UserError as error:
        return f"No estimate: {error}"
    phases = loads(recipe, shape)
    tables = [_work(recipe, shape, phases), _memory(recipe, shape, phases)]
    return "\n\n".join(filter(None, [_header(recipe, shape), *tables, _mining(recipe, shape)]))


def _header(recipe: Recipe, shape: Shape) -> str:
    picture = shape.vision.tokens(recipe.model.max_pixels)
    return (
        f"Estimate for {recipe.cluster.workers} workers; nothing was loaded or run.\n"
        f"base: {shape.parameters:,} parameters, {shape.vision.parameters:,} of them in the vision tower\n"
        f"assumed: every picture at max_pixels = {picture} tokens, {CHARACTERS_PER_TOKEN} characters per token, "
        f"{template_tokens(recipe.base, shape)} template tokens per item, no padding"
    )


def _work(recipe: Recipe, shape: Shape, phases: Sequence[Load]) -> str:
    picture, cluster = shape.vision.tokens(recipe.model.max_pixels), recipe.cluster
    gpu, price = cluster.gpus_per_worker > 0, _price_of(recipe)
    work = ["queries", "documents", "tokens", "chunks", "TFLOP"]
    rows = [["per worker and step", *work, "rows", "source", "steps", "hours", *(["cost"] if price else [])]]
    total = 0.0
    for load in phases:
        flops = step_flops(shape, load, recipe.compute, picture)
        counts = [load.queries, load.documents, round(load.tokens), load.chunks(recipe.compute.token_budget)]
        hours = _hours(flops * load.steps) if gpu and load.steps else None
        row = [*map(_count, counts), _short(flops / 1e12), _count(load.rows), load.origin, _count(load.steps)]
        row.append("-" if hours is None else f"{hours:.2f}")
        if price:
            cost = (hours or 0) * cluster.workers * cluster.gpus_per_worker * price
            total += cost
            row.append(f"{cost:,.0f}")
        rows.append([load.name, *row])
    note = f"\nhours: for all steps, at {UTILIZATION:.0%} of {PEAK_OF}, including recomputation" if gpu else ""
    if price:
        note += (
            f"\ncost: {total:,.0f} for training, at {price:g} per hour of a GPU; starts, mining and scoring come on top"
        )
    return _aligned(rows) + note


def _memory(recipe: Recipe, shape: Shape, phases: Sequence[Load]) -> str:
    compute = recipe.compute
    rows = [["GiB per worker", *Memory._fields, "sum"]]
    for load in phases:
        parts = memory(shape, load, recipe)
        rows.append([load.name, *(_short(part / GIB) for part in (*parts, sum(parts)))])
    note = f"ZeRO-{compute.zero_stage}, {compute.dtype}; leave a tenth free for the device context and fragmentation"
    if compute.cache_vision:
        note += f"\nhost memory: up to {VISION_CACHE_BYTES / GIB:.0f} GiB per worker for the vision cache"
    return f"{_aligned(rows)}\n{note}"


def _mining(recipe: Recipe, shape: Shape) -> str | None:
    sizes = corpus(recipe)
    if sizes is None:
        return None
    queries, documents, source = sizes
    picture, embedders = shape.vision.tokens(recipe.model.max_pixels), recipe.cluster.embedders
    flops = 0.0
    for count, side in ((queries, source.query), (documents, source.document)):
        length = item_tokens(side, recipe, shape)
        flops += text_forward(shape.text, count * length, length)
        flops += vision_forward(shape.vision, count * side.pictures, picture)
    size = _short(FLOAT32 * shape.text.hidden * (queries + documents) / GIB)
    line = f"mining embeds {queries:,} queries and {documents:,} documents: {size} GiB of float32 vectors"
    if recipe.cluster.gpus_per_embedder:
        line += f", {_hours(flops / embedders):.2f} hours on {embedders} GPUs"
    return line


def _price_of(recipe: Recipe) -> float | None:
    """Of a GPU's hour, if the recipe trains on GPUs."""
    return recipe.cluster.gpu_hour_price if recipe.cluster.gpus_per_worker else None


def _hours(flops: float) -> float:
    return flops / (UTILIZATION * PEAK) / 3600


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
