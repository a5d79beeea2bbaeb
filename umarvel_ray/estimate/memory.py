"""Memory of one worker in a training step, in bytes.

Counted: frozen weights; trainable weights with gradient and Adam state as ZeRO partitions them (arXiv 1910.02054,
section 3); DeepSpeed's reduction bucket; the activations of one chunk; and the loss. Not counted: the device context,
fragmentation and kernel workspace, for which a tenth should stay free. The vision cache is host memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from umarvel_ray.estimate.load import Load
from umarvel_ray.estimate.shape import Shape, TextShape, VisionShape
from umarvel_ray.recipe import ContrastivePhase, DistillPhase, Phase, Recipe

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number
BUCKET = 500_000_000  # numbers: DeepSpeed's default `reduce_bucket_size`
LIVE = 1_000_000_000  # weights: DeepSpeed's default `stage3_max_live_parameters`
NF4 = (4 + 0.127) / 8  # bytes of a 4-bit weight with its quantized constants (QLoRA, arXiv 2305.14314, section 3)
LABELED = 2  # tokens of a pair that enter the reranker's loss


class Memory(NamedTuple):
    """Bytes of one worker, by part.

    Attributes:
        language, tower: frozen weights.
        optimizer: trainable weights with their gradients, master copy and Adam moments.
        bucket: DeepSpeed's buffer for reducing gradients.
    """

    language: float
    tower: float
    optimizer: float
    bucket: float
    activations: float
    loss: float


def memory(shape: Shape, load: Load, recipe: Recipe) -> Memory:
    """The peak of one optimizer step, by part."""
    compute, workers = recipe.compute, recipe.cluster.workers
    width = WIDTH[compute.dtype]
    chunk = min(compute.token_budget, load.tokens)
    kept = 1 if compute.gradient_cache or load.pairs else load.chunks(compute.token_budget)
    phase, checkpointed = load.phase, compute.activation_checkpointing
    whole = phase.language_model == "full"
    rank, dropout = (0, False) if whole else (phase.lora.r, phase.lora.dropout > 0)
    text, tower = trained(shape, phase)
    frozen = shape.text.tables if whole else shape.text.parameters
    language = language_bytes(frozen, shape.text.parameters, width, compute.zero_stage, workers)
    if phase.language_model == "qlora":
        language -= shape.text.matrices * (width - NF4)
    spread = workers if compute.zero_stage == 3 and phase.vision != "frozen" else 1
    activations = text_activations(shape.text, rank, dropout, width, load.length, checkpointed, kept, whole)
    picture = shape.vision.tokens(recipe.model.max_pixels)
    pictures = min(load.pictures, chunk / picture)
    seen = tower_activations(shape.vision, width)
    if phase.vision == "full":
        seen += kept * trained_tower_activations(shape.vision, width, checkpointed)
    return Memory(
        language=language,
        tower=(shape.vision.parameters - tower) * width / spread,
        optimizer=optimizer_bytes(text + tower, compute.zero_stage, workers),
        bucket=bucket_bytes(text + tower, compute.zero_stage, recipe.cluster.gpus_per_worker > 0),
        activations=chunk * activations + pictures * picture * seen,
        loss=loss_bytes(shape, load, recipe),
    )


def trained(shape: Shape, phase: Phase) -> tuple[int, int]:
    """Trainable parameters: of the language model (adapters, or all but the embedding tables), and of the tower."""
    text = shape.text
    whole = phase.language_model == "full"
    tower = {"frozen": 0, "projector": shape.vision.projector, "full": shape.vision.parameters}
    return text.parameters - text.tables if whole else text.lora_parameters(phase.lora.r), tower[phase.vision]


def language_bytes(frozen: int, parameters: int, width: int, zero: int, workers: int) -> float:
    """Frozen weights: complete on every worker, or partitioned by ZeRO-3, which gathers up to LIVE at a time."""
    if zero < 3:
        return frozen * width
    return width * (frozen / workers + min(parameters, LIVE))


def optimizer_bytes(trainable: int, zero: int, workers: int) -> float:
    """Trainable weights and gradients, always fp32, and 12 bytes for ZeRO's master copy and the Adam moments.

    ZeRO-1 partitions the 12 bytes over the workers, ZeRO-2 also the gradients, ZeRO-3 also the weights. Without ZeRO
    there is no master copy.
    """
    if zero == 0:
        return trainable * 16
    weights = 4 / (workers if zero == 3 else 1)
    gradient = 4 / (workers if zero >= 2 else 1)
    return trainable * (weights + gradient + 12 / workers)


def bucket_bytes(trainable: int, zero: int, gpu: bool) -> float:
    """The fp32 reduction bucket: allocated in full on a GPU; on a CPU only written pages count."""
    return 4 * (BUCKET if gpu else min(BUCKET, trainable)) if zero else 0


def text_activations(
    text: TextShape,
    rank: int,
    dropout: bool,
    width: int,
    length: float,
    checkpointed: bool,
    chunks: int = 1,
    whole: bool = False,
) -> float:
    """Bytes per token at the peak of a forward and backward pass of the language model.

    Autograd keeps the following of each layer: the fp32 inputs of both norms; the queries, keys and values of all
    heads; the output, row sums and mask of attention; the MLP's gate, its activation, the up projection and their
    product; and the input and low-rank output of each adapter. Adapters on the same input share it; with dropout, each
    has its own input and a mask of that size. If all weights train, it also keeps each linear layer's input and each
    norm's output before scaling. The gradients of one MLP come on top. With checkpointing only the input of each layer
    is kept, and all of the above for one layer.

    Args:
        rank: of the adapters; 0 if there are none.
        width: bytes of a number in the model's dtype.
        length: tokens of the mean item.
        chunks: whose activations are kept at the same time.
        whole: all weights train, not adapters.
    """
    h, ff, q, kv = text.hidden, text.intermediate, text.heads * text.head, text.key_heads * text.head
    inputs = 2 * (5 * h + q + ff) if dropout else 2 * h + ff
    numbers = inputs + 4 * q + 3 * ff + 7 * rank + length
    norms = 2 * h + text.normed * (q + kv)
    layer = width * (numbers + whole * norms) + 4 * (norms + text.heads)
    mlp = 3 * ff * width
    if checkpointed:
        return chunks * text.layers * h * width + layer + mlp
    return chunks * (text.layers * layer + 4 * h) + mlp


def tower_activations(vision: VisionShape, width: int) -> float:
    """Bytes per merged token in the frozen tower: fp32 pixels, their copy, and the widest block; nothing is kept."""
    gates = 3 if vision.form == "qwen2_5_vl" else 2
    return vision.merge**2 * ((4 + width) * vision.values + width * (2 * vision.width + gates * vision.intermediate))


def trained_tower_activations(vision: VisionShape, width: int, checkpointed: bool) -> float:
    """Bytes per merged token that autograd keeps of a trained tower.

    Per block and patch: the inputs and outputs of both norms (twice as much for RMSNorm), queries, keys and values
    before and after rotation, the output of attention, and the MLP's hidden values with the intermediate results of its
    activation and gate. Per merger: the inputs of its norm and of its two layers.
    """
    blocks = {"qwen2_vl": (12, 3), "qwen2_5_vl": (14, 4), "qwen3_vl": (12, 2)}[vision.form]
    block = blocks[0] * vision.width + blocks[1] * vision.intermediate
    kept = vision.depth * vision.width + block if checkpointed else vision.depth * block
    return vision.merge**2 * width * (kept + 3 * (1 + vision.deepstack) * vision.width)


def loss_bytes(shape: Shape, load: Load, recipe: Recipe) -> float:
    """The fp32 embeddings of all workers with their gradients, and the intermediate results of the loss.

    InfoNCE: similarities of the worker's queries with all documents, three times (scaled, masked, gradient), the same
    against all queries for `two_way`, and the table of positives. Distillation: the worker's queries and candidates.
    Reranker: the logits of the labeled tokens of a chunk, in the model's dtype and in fp32, and their gradient.
    """
    workers, text = recipe.cluster.workers, shape.text
    if load.pairs:
        pairs = min(load.queries, math.ceil(recipe.compute.token_budget / load.length))
        return pairs * LABELED * text.vocabulary * (WIDTH[recipe.compute.dtype] + 8)
    embeddings = 2 * 4 * text.hidden * load.items * workers
    if isinstance(load.phase, DistillPhase):
        return embeddings + 2 * 4 * text.hidden * load.documents
    columns = (
        load.documents * workers
        + (isinstance(load.phase, ContrastivePhase) and load.phase.two_way) * load.queries * workers
    )
    return embeddings + 3 * 4 * load.queries * columns + load.queries * load.documents * workers**2
