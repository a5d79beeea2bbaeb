"""What differs between the backbones beyond what transformers hides: how a video is written down, and DeepStack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from umarvel_ray.errors import UserError


@dataclass(frozen=True)
class Family:
    """A backbone family.

    timestamps: each step of a video is written as its second and a picture of its own (Qwen3-VL). tokens_per_second:
    steps lie as far apart on M-RoPE's time axis as their seconds do (Qwen2.5-VL); None counts them.
    """

    timestamps: bool = False
    tokens_per_second: float | None = None


def read_model_config(path: str | Path) -> PretrainedConfig:
    """A checkpoint's `config.json`.

    Raises:
        UserError: not a valid configuration, or not that of a supported family.
    """
    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}/config.json: not a valid model configuration ({reason})") from None
    family_of(config, path)
    return config


def family_of(config: PretrainedConfig, path: str | Path) -> Family:
    """The adapter of a configuration. Raises UserError, naming `path`, for a family without one."""
    match config.model_type:
        case "qwen2_vl":
            return Family()
        case "qwen2_5_vl":
            return Family(tokens_per_second=config.vision_config.tokens_per_second)
        case "qwen3_vl":
            return Family(timestamps=True)
    raise UserError(
        f"{path}/config.json: model_type '{config.model_type}' is not supported; "
        "use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"
    )


def without_deepstack(config: PretrainedConfig) -> None:
    """Have Qwen3-VL's tower make no DeepStack features (as the reference does, trap T9); others have none anyway."""
    vision: Any = config.vision_config
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = []
