"""Tiny random base models of each backbone family: `make_tiny_base(dir)` takes a second.

They have all files of a real base (config, safetensors, tokenizer, image processor, chat template) but lack U-MARVEL's
three tokens, so that loading has to add them. Patches are 8 × 8 pixels, merged 2 × 2: a 64 × 64 picture is 16 tokens.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CORPUS = [
    "Find an image that matches the caption. Find a text that describes the picture.",
    "Identify the picture of the described thing. Retrieve the same thing in another style.",
    "A red fox crosses the snow. Harbour lights at dusk. Two boats near a pier. A small blue bird.",
    "The flag of a country with three stripes and a yellow star. A green tree and a white house.",
    "Query: Candidate: Does the candidate answer the query? Yes No Yes No Yes No Yes. No.",
    "system user assistant You are a helpful assistant.",
    *["Yes", "No"] * 8,
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VISION = {
    "qwen2_vl": lambda hidden: {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2},
    "qwen2_5_vl": lambda hidden: {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": hidden,
        "tokens_per_second": 1,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": lambda hidden: {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}

IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "size": {"shortest_edge": 4096, "longest_edge": 4096},
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def make_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `CORPUS`, with Qwen2-VL's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def make_tiny_base(
    directory: str | Path,
    *,
    family: str = "qwen2_vl",
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    vocab_size: int = 512,
) -> Path:
    """Write the directory and return its path. Equal arguments give equal weights."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocab_size)
    token = tokenizer.convert_tokens_to_ids
    config = AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 16,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            # At the usual 0.02, a model this small ignores its context, and tests of the context would always pass.
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=VISION[family](hidden)
        | {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2))
    return directory
