"""Floating-point operations of a training step: two per weight and token, four per attended position and dimension.

The usual count (Kaplan et al., arXiv 2001.08361, section 2.1), adjusted for LoRA and memory savings. Frozen weights
need no weight gradient, so a backward pass costs as much as one forward pass rather than two. Activation checkpointing
repeats the forward pass once, and so does the gradient cache.
"""

from __future__ import annotations

from umarvel_ray.estimate.load import Load
from umarvel_ray.estimate.shape import Shape, TextShape, VisionShape
from umarvel_ray.recipe import Compute


def text_forward(text: TextShape, tokens: float, length: float) -> float:
    """FLOPs of `tokens` tokens in items of `length` tokens, without adapters and the language-model head."""
    weights = sum(i * o for i, o in text.linears)
    return tokens * text.layers * (2 * weights + 4 * text.heads * text.head * length)


def text_backward(text: TextShape, tokens: float, length: float) -> float:
    """FLOPs of activation gradients: once through frozen weights, twice for the two operands of attention."""
    weights = sum(i * o for i, o in text.linears)
    return tokens * text.layers * (2 * weights + 8 * text.heads * text.head * length)


def vision_forward(vision: VisionShape, pictures: float, tokens: int) -> float:
    """FLOPs of the tower on pictures of `tokens` merged tokens each; windowed blocks attend within their window."""
    patches = tokens * vision.merge**2
    window = min(patches, vision.window**2)
    attended = vision.whole * patches + (vision.depth - vision.whole) * window
    weights = vision.values * vision.width + vision.depth * vision.block + vision.mergers / vision.merge**2
    return pictures * patches * (2 * weights + 4 * vision.width * attended)


def step_flops(shape: Shape, load: Load, compute: Compute, picture: int) -> float:
    """FLOPs of one worker in one optimizer step.

    A frozen tower runs once per step. A trained one runs as often as the language model; its backward pass costs two
    forward passes, or two of the projector's if only the projector trains.

    Args:
        picture: merged tokens of one picture.
    """
    text, tokens, phase = shape.text, load.tokens, load.phase
    repeats = compute.activation_checkpointing + (compute.gradient_cache and not load.pairs)
    full = phase.language_model == "full"
    trained = 2 * (text.matrices if full else text.lora_parameters(phase.lora.r)) * tokens
    forward = text_forward(text, tokens, load.length) + (0 if full else trained)
    backward = text_backward(text, tokens, load.length) + (trained if full else 2 * trained)
    tower = vision_forward(shape.vision, load.pictures, picture)
    if phase.vision == "full":
        tower *= 3 + repeats
    elif phase.vision == "projector":
        tower = (1 + repeats) * tower + 2 * 2 * shape.vision.mergers * load.pictures * picture
    return (1 + repeats) * forward + backward + tower
