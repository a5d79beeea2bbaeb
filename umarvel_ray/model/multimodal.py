"""The backbone's forward pass: the vision tower's features replace picture tokens, then the language model runs.

A picture's features are one tensor (tokens, (1 + k) · D): the merger's output for the language model, followed by the k
DeepStack features that Qwen3-VL adds after its first k layers (arXiv 2406.04334). One cache can thus hold them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from umarvel_ray.items.pictures import Picture, PixelScale
from umarvel_ray.model.batch import Sequences
from umarvel_ray.model.packing import packed_arguments


def vision_tower(backbone: PreTrainedModel) -> nn.Module:
    """The backbone's vision tower, its projector included."""
    return backbone.get_submodule("model.visual")


def tower_features(visual: nn.Module, pictures: Sequence[Picture], scale: PixelScale) -> tuple[torch.Tensor, ...]:
    """Run the vision tower on at least one picture; returns a tensor (tokens, (1 + k) · D) for each."""
    device = next(visual.parameters()).device
    grids = torch.tensor([picture.grid for picture in pictures], device=device)
    return split_features(visual, scale([picture.pixels for picture in pictures], device), grids)


def split_features(visual: Any, pixel_values: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tower_features` from the tower's own inputs: pixels (patches, patch_dim) and grids int64 (n, 3)."""
    output = visual(pixel_values.to(visual.dtype), grid_thw=grids)
    merged = torch.cat([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=-1)
    return torch.split(merged, (grids.prod(-1) // visual.spatial_merge_size**2).tolist())


def distinct(pictures: Sequence[Picture]) -> dict[str, Picture]:
    """The pictures by key, each once."""
    return {picture.key: picture for picture in pictures}


def read_pictures(backbone: PreTrainedModel, pictures: Sequence[Picture], scale: PixelScale) -> dict[str, torch.Tensor]:
    """The vision tower's features of each distinct picture by its key.

    A tower that is being trained gets a blank picture if there is none: ranks reduce its gradients, and gather its
    weights under ZeRO-3, in lockstep, whether or not a rank has pictures.
    """
    visual: Any = vision_tower(backbone)
    shown = distinct(pictures)
    if not shown and visual.training and any(parameter.requires_grad for parameter in visual.parameters()):
        shown = distinct([_blank(visual.spatial_merge_size, scale.patch_size)])
    return dict(zip(shown, tower_features(visual, list(shown.values()), scale), strict=True)) if shown else {}


def _blank(merge: int, patch: int) -> Picture:
    """A black picture of one token."""
    return Picture(np.zeros((merge**2, 3 * patch**2), np.uint8), (1, merge, merge), key="blank")


def last_hidden_state(
    backbone: PreTrainedModel,
    batch: Sequences,
    features: Mapping[str, torch.Tensor],
    positions: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """The last layer's hidden states after its norm: (B, L, D), or (1, L, D) when packed.

    Args:
        features: by picture key, of every picture in the batch, on any device: caches keep them where there is room.
            If the batch has no pictures, they do not change the output but still receive a gradient, which is zero.
        positions, attention_mask: override the batch's when it continues what `cache` holds.
    """
    core: Any = backbone.model
    config = backbone.config
    embeds: torch.Tensor = core.get_input_embeddings()(batch.input_ids)  # (B, L, D)
    deepstack: dict[str, Any] = {}
    if batch.pictures:
        shown = torch.cat([features[picture.key].to(embeds) for picture in batch.pictures])  # (tokens, (1 + k) · D)
        first, *later = torch.split(shown, embeds.shape[-1], dim=-1)
        is_picture = (batch.input_ids == config.image_token_id) | (batch.input_ids == config.video_token_id)  # (B, L)
        embeds = embeds.masked_scatter(is_picture.unsqueeze(-1), first)
        if later:
            deepstack = {"visual_pos_masks": is_picture, "deepstack_visual_embeds": later}
    elif features:
        embeds = embeds + 0 * sum(feature.sum().to(embeds) for feature in features.values())
    if batch.bounds is None:
        attention = {"attention_mask": batch.attention_mask if attention_mask is None else attention_mask}
    else:
        attention = packed_arguments(batch.bounds, batch.longest, config.text_config.is_causal)
    output = core.language_model(
        inputs_embeds=embeds,
        position_ids=batch.positions if positions is None else positions,
        past_key_values=cache,
        use_cache=cache is not None,
        **attention,
        **deepstack,
    )
    hidden: torch.Tensor = output.last_hidden_state
    return hidden
