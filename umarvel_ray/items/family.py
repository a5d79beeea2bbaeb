"""Differences between backbone families that transformers does not hide: how a video is tokenized, and DeepStack."""

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

    Attributes:
        timestamps: each frame group of a video is its own picture, preceded by its time in seconds (Qwen3-VL).
        tokens_per_second: M-RoPE time positions per second of video (Qwen2.5-VL); None counts frame groups.
    """

    timestamps: bool = False
    tokens_per_second: float | None = None


def read_model_config(path: str | Path) -> PretrainedConfig:
    """Read a checkpoint's `config.json`.

    Raises:
        UserError: not a valid configuration, or an unsupported model family.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}/config.json: not a valid model configuration ({reason})") from None
    family_of(config, path)
    return config


def family_of(config: PretrainedConfig, path: str | Path) -> Family:
    """The family of a model configuration.

    Raises:
        UserError: an unsupported family; the message names `path`.
    """
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
    """Turn off DeepStack in a Qwen3-VL configuration, as the reference does (docs/method.md#deepstack-dropped).

    No effect on other families, which have no DeepStack.
    """
    vision: Any = config.vision_config
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = []
