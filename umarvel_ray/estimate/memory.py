"""Memory of one worker in a training step, in bytes.

What is counted: weights, the adapters with their gradient and Adam state as ZeRO spreads them (arXiv 1910.02054,
section 3), DeepSpeed's reduction bucket, the activations of one forward chunk, the loss. What is not: the device's own
context, fragments, and the working memory of kernels; leave a tenth free for those. The vision cache is host memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from umarvel_ray.estimate.load import Load
from umarvel_ray.estimate.shape import Shape, TextShape, VisionShape
from umarvel_ray.recipe import Recipe

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
BUCKET = 500_000_000  # numbers: DeepSpeed's default `reduce_bucket_size`
LIVE = 1_000_000_000  # weights: DeepSpeed's default `stage3_max_live_parameters`
LABELLED = 2  # tokens of a pair that the reranker's loss looks at


class Memory(NamedTuple):
    """Bytes of one worker. `optimizer`: adapters, their gradient, master copy and Adam moments; `bucket`: DeepSpeed's
    buffer for reducing gradients."""

    language: float
    tower: float
    optimizer: float
    bucket: float
    activations: float
    loss: float


def memory(shape: Shape, load: Load, recipe: Recipe) -> Memory:
    """The peak of one optimiser step, part by part."""
    engine, workers = recipe.engine, recipe.cluster.workers
    width = WIDTH[engine.dtype]
    chunk = min(engine.token_budget, load.tokens)
    kept = 1 if engine.gradient_cache or load.pairs else load.chunks(engine.token_budget)
    rank, dropout = load.step.lora.r, load.step.lora.dropout > 0
    adapters = shape.text.lora_parameters(rank)
    activations = text_activations(shape.text, rank, dropout, width, load.length, engine.activation_checkpointing, kept)
    picture = shape.vision.tokens(recipe.model.max_pixels)
    pictures = min(load.pictures, chunk / picture)
    return Memory(
        language=language_bytes(shape.text.parameters, width, engine.zero_stage, workers),
        tower=shape.vision.parameters * width,
        optimizer=optimizer_bytes(adapters, engine.zero_stage, workers),
        bucket=bucket_bytes(adapters, engine.zero_stage, recipe.cluster.gpus_per_worker > 0),
        activations=chunk * activations + pictures * picture * tower_activations(shape.vision, width),
        loss=loss_bytes(shape, load, recipe),
    )


def language_bytes(parameters: int, width: int, zero: int, workers: int) -> float:
    """Frozen weights: whole on every worker, or spread by ZeRO-3, which gathers up to LIVE of them at a time."""
    if zero < 3:
        return parameters * width
    return width * (parameters / workers + min(parameters, LIVE))


def optimizer_bytes(trainable: int, zero: int, workers: int) -> float:
    """Adapters and gradient, in fp32 whatever the model's precision, and 12 bytes of ZeRO's copy and Adam moments.

    ZeRO-1 spreads the 12 over the workers, ZeRO-2 the gradient too, ZeRO-3 the adapters too. Without ZeRO there is no
    copy.
    """
    if zero == 0:
        return trainable * 16
    weights = 4 / (workers if zero == 3 else 1)
    gradient = 4 / (workers if zero >= 2 else 1)
    return trainable * (weights + gradient + 12 / workers)


def bucket_bytes(trainable: int, zero: int, gpu: bool) -> float:
    """The reduction bucket, fp32: a GPU gives all of it, a CPU only the pages that are written."""
    return 4 * (BUCKET if gpu else min(BUCKET, trainable)) if zero else 0


def text_activations(
    text: TextShape, rank: int, dropout: bool, width: int, length: float, checkpointed: bool, chunks: int = 1
) -> float:
    """Bytes per token at the peak of a forward and backward pass of the language model with adapters.

    What autograd keeps of a layer: the fp32 inputs of both norms; queries, keys and values of all heads, the output,
    row sums and mask of attention; gate, its activation, up, and their product; the input of each adapter and its
    low-rank output. Adapters on one input share it; with dropout each has its own, and a mask of that size. On top: the
    gradients of one MLP. Checkpointing keeps each layer's input, and all of this for one layer only.
    """
    h, ff, q, kv = text.hidden, text.intermediate, text.heads * text.head, text.key_heads * text.head
    inputs = 2 * (5 * h + q + ff) if dropout else 2 * h + ff
    numbers = inputs + 4 * q + 3 * ff + 7 * rank + length
    layer = width * numbers + 4 * (2 * h + text.heads + text.normed * (q + kv))
    mlp = 3 * ff * width
    if checkpointed:
        return chunks * text.layers * h * width + layer + mlp
    return chunks * (text.layers * layer + 4 * h) + mlp


def tower_activations(vision: VisionShape, width: int) -> float:
    """Bytes per merged token in the frozen tower: fp32 pixels, their copy, and the widest block, nothing kept."""
    gates = 3 if vision.form == "qwen2_5_vl" else 2
    return vision.merge**2 * ((4 + width) * vision.values + width * (2 * vision.width + gates * vision.intermediate))


def loss_bytes(shape: Shape, load: Load, recipe: Recipe) -> float:
    """Embeddings of all workers in fp32 with their gradient, and what the loss makes of them.

    InfoNCE: own queries against all documents three times (scaled, masked, gradient), for `two_way` once more against
    all queries, and the table of positives. Distillation: own queries and candidates, spread out. Reranker: logits of
    the labelled tokens of a chunk, in the model's precision, in fp32, and their gradient.
    """
    workers, text = recipe.cluster.workers, shape.text
    if load.pairs:
        pairs = min(load.queries, math.ceil(recipe.engine.token_budget / load.length))
        return pairs * LABELLED * text.vocabulary * (WIDTH[recipe.engine.dtype] + 8)
    embeddings = 2 * 4 * text.hidden * load.items * workers
    if load.name == "stage3":
        return embeddings + 2 * 4 * text.hidden * load.documents
    columns = load.documents * workers + getattr(load.step, "two_way", False) * load.queries * workers
    return embeddings + 3 * 4 * load.queries * columns + load.queries * load.documents * workers**2
