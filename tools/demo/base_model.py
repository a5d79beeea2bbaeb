"""The demo's tiny base: a real Qwen2-VL configuration, tokenizer, image processor and chat template in one directory.

The sizes keep the bf16 weights under 15 MB: a 64x64 picture is 8x8 patches, merged 2x2 into 16 language tokens. The
tokenizer is an uncased unigram model over part of BERT's word pieces (a word is the same piece whatever punctuation
precedes it) with UTF-8 byte fallback, so no text is lost and a teacher can give each piece a vector.
"""

import copy
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

PATCH, MERGE, TEMPORAL, SIDE = 8, 2, 2, 64
HIDDEN = 256
PAD, END = "<|endoftext|>", "<|im_end|>"
CONTROL_TOKENS = [
    PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<emb>", "<instruction_start>", "<instruction_end>",
]  # fmt: skip
UNKNOWN = "<unk>"  # required by the unigram model; with byte fallback no text produces it
TYPOGRAPHY = {"[‐‑‒–—―−]": "-", "[‘’‚′]": "'", "[“”„″]": '"', "▁": "_"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as in Qwen2-VL

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(pieces: list[tuple[str, float]]) -> PreTrainedTokenizerFast:
    """The ids are in this order: control tokens, unknown, the 256 bytes, the pieces.

    Args:
        pieces: (piece, log probability), with a leading "▁" at word starts.
    """
    lowest = min(score for _, score in pieces)
    names = CONTROL_TOKENS + [UNKNOWN] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(name, lowest - 20.0) for name in names] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=names.index(UNKNOWN), byte_fallback=True))
    plain = [normalizers.Replace(Regex(fancy), simple) for fancy, simple in TYPOGRAPHY.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), *plain]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}\p{M}]"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        additional_special_tokens=CONTROL_TOKENS[1:],
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(vocabulary_size: int) -> Qwen2VLConfig:
    """The configuration; a control token's id is its position in CONTROL_TOKENS."""
    token_id = CONTROL_TOKENS.index
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary_size,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True,
            "pad_token_id": token_id(PAD),
            "bos_token_id": None,
            "eos_token_id": token_id(END),
        },
        vision_config={
            "depth": 4,
            "embed_dim": 160,
            "num_heads": 5,
            "mlp_ratio": 4,
            "hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer, the chat template and the two preprocessor files.

    The latter are written as plain JSON, because the classes that would write them need torchvision.
    """
    tokenizer.save_pretrained(folder)
    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "merge_size": MERGE,
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": pixels,
        "temporal_patch_size": TEMPORAL,
    }
    picture = shared | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    video = shared | {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture, indent=2) + "\n")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")


def save_base(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face directory with bf16 weights; `folder` must not be in use."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    save_processor(tokenizer, folder)
