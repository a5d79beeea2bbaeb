"""Floating-point operations of a training step: two for every weight a token meets, four for every attended position.

The usual count (Kaplan et al., arXiv 2001.08361, section 2.1), with what LoRA and memory savers change: frozen weights
need no gradient of their own, so a backward pass costs one forward pass more, not two as where all weights train;
activation checkpointing repeats the forward pass once, the gradient cache once more.
"""

from __future__ import annotations

from umarvel_ray.estimate.load import Load
from umarvel_ray.estimate.shape import Shape, TextShape, VisionShape
from umarvel_ray.recipe import Compute


def text_forward(text: TextShape, tokens: float, length: float) -> float:
    """FLOPs of `tokens` tokens in items of `length`, without adapters and without a head over the vocabulary."""
    weights = sum(i * o for i, o in text.linears)
    return tokens * text.layers * (2 * weights + 4 * text.heads * text.head * length)


def text_backward(text: TextShape, tokens: float, length: float) -> float:
    """The gradient of activations through frozen weights (once) and of both operands of attention (twice)."""
    weights = sum(i * o for i, o in text.linears)
    return tokens * text.layers * (2 * weights + 8 * text.heads * text.head * length)


def vision_forward(vision: VisionShape, pictures: float, tokens: int) -> float:
    """FLOPs of the tower on pictures that become `tokens` tokens each; local blocks attend within their window."""
    patches = tokens * vision.merge**2
    near = min(patches, vision.window**2)
    attended = vision.whole * patches + (vision.depth - vision.whole) * near
    weights = vision.values * vision.width + vision.depth * vision.block + vision.mergers / vision.merge**2
    return pictures * patches * (2 * weights + 4 * vision.width * attended)


def step_flops(shape: Shape, load: Load, compute: Compute, picture: int) -> float:
    """FLOPs of one worker in one optimiser step; `picture` is the tokens of one.

    A frozen tower runs once a step. One that trains runs as often as the language model; its backward pass costs two
    forward passes, or two of its projector's where that trains alone.
    """
    text, tokens, phase = shape.text, load.tokens, load.phase
    again = compute.activation_checkpointing + (compute.gradient_cache and not load.pairs)
    whole = phase.language_model == "full"
    own = 2 * (text.matrices if whole else text.lora_parameters(phase.lora.r)) * tokens  # for what trains
    forward = text_forward(text, tokens, load.length) + (0 if whole else own)
    backward = text_backward(text, tokens, load.length) + (own if whole else 2 * own)
    seen = vision_forward(shape.vision, load.pictures, picture)
    if phase.vision == "full":
        seen *= 3 + again
    elif phase.vision == "projector":
        seen = (1 + again) * seen + 2 * 2 * shape.vision.mergers * load.pictures * picture
    return (1 + again) * forward + backward + seen
