"""One reading of a batch by the backbone: the tower's features in the pictures' places, then the language model.

A picture's features are one tensor (tokens, (1 + k) · D): what the merger gives the language model, and behind it the k
DeepStack features that Qwen3-VL adds after its first k layers (arXiv 2406.04334). So one cache holds all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from umarvel_ray.items.pictures import Picture, PixelScale
from umarvel_ray.model.batch import Sequences
from umarvel_ray.model.packing import packed_arguments


def tower_features(visual: nn.Module, pictures: Sequence[Picture], scale: PixelScale) -> tuple[torch.Tensor, ...]:
    """Run the vision tower on at least one picture: a tensor (tokens, (1 + k) · D) each."""
    device = next(visual.parameters()).device
    grids = torch.tensor([picture.grid for picture in pictures], device=device)
    return split_features(visual, scale([picture.pixels for picture in pictures], device), grids)


def split_features(visual: nn.Module, pixel_values: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same from pixels as the tower reads them (patches, patch_dim) and grids (n, 3)."""
    output = visual(pixel_values.to(visual.dtype), grid_thw=grids)
    merged = torch.cat([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=-1)
    return merged.split((grids.prod(-1) // visual.spatial_merge_size**2).tolist())


def distinct(pictures: Sequence[Picture]) -> dict[str, Picture]:
    """The pictures by key, each once."""
    return {picture.key: picture for picture in pictures}


def read_pictures(backbone: PreTrainedModel, pictures: Sequence[Picture], scale: PixelScale) -> dict[str, torch.Tensor]:
    """The tower's features of each distinct picture by its key.

    A tower that trains reads a blank picture where there is none: ranks reduce its gradients, and gather its weights
    under ZeRO-3, in lockstep, whatever each one's texts and pictures are.
    """
    visual, shown = backbone.model.visual, distinct(pictures)
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
    """The last layer's normed hidden states (B, L, D), or (1, L, D) of a packed batch.

    Args:
        features: by picture key, of every picture in the batch; of a batch without any they count for nothing, but
            get their gradient, zero.
        positions, attention_mask: in place of the batch's, where it goes on from what `cache` holds.
    """
    core, config = backbone.model, backbone.config
    embeds = core.get_input_embeddings()(batch.input_ids)
    deepstack = {}
    if batch.pictures:
        shown = torch.cat([features[picture.key] for picture in batch.pictures]).to(embeds)
        first, *later = shown.split(embeds.shape[-1], dim=-1)
        places = (batch.input_ids == config.image_token_id) | (batch.input_ids == config.video_token_id)
        embeds = embeds.masked_scatter(places.unsqueeze(-1), first)
        if later:
            deepstack = {"visual_pos_masks": places, "deepstack_visual_embeds": later}
    elif features:
        embeds = embeds + 0 * sum(feature.sum() for feature in features.values())
    if batch.bounds is None:
        attention = {"attention_mask": batch.attention_mask if attention_mask is None else attention_mask}
    else:
        attention = packed_arguments(batch.bounds, batch.longest, config.text_config.is_causal)
    return core.language_model(
        inputs_embeds=embeds,
        position_ids=batch.positions if positions is None else positions,
        past_key_values=cache,
        use_cache=cache is not None,
        **attention,
        **deepstack,
    ).last_hidden_state
