"""Packed batches equal each item alone in stock transformers, and one masked softmax over the whole row."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from umarvel_ray.inference.cached_embedder import CachedEmbedder
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.model import packing
from umarvel_ray.model.batch import collate, collate_pairs, token_buckets
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.lora import add_lora
from umarvel_ray.model.packing import is_packed, packed_attention
from umarvel_ray.model.reranker import RerankerModel
from umarvel_ray.recipe import Lora, ModelSettings

LENGTHS = [5, 1, 7, 3]
PICTURES = {"min_pixels": 256, "max_pixels": 8192, "video_frames": 4, "max_video_pixels": 4096}


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ITEMS = [
    {"text": "a red fox crosses the snow", "instruction": "find an image that matches the caption"},
    {"image": picture(0)},
    {"text": "yes"},
    {"image": [picture(1, 128, 64), picture(0)], "text": "both " * 9, "instruction": "find the same"},
    {"video": [picture(2), picture(3), picture(4)], "text": "gray"},
]


def rows(heads: int, dtype: torch.dtype = torch.float64, device: str = "cpu", dimension: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    made = torch.randn(sum(LENGTHS), heads, dimension, generator=generator, dtype=torch.float64)
    return made.to(device, dtype).requires_grad_()


def bounds(device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, 5, 6, 13, 16], dtype=torch.int32, device=device)


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """The formula: a softmax over the whole row, with other items masked out."""
    item = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = item[:, None] == item
    if causal:
        seen &= torch.ones_like(seen).tril()
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_stays_within_an_item(causal):
    query, key, value = rows(4), rows(2), rows(2)
    upstream = rows(4).detach()
    output = packed_attention(query, key, value, bounds(), max(LENGTHS), causal, 0.3)
    truth = masked_attention(query, key, value, causal)
    torch.testing.assert_close(output, truth)
    found, expected = (torch.autograd.grad((o * upstream).sum(), (query, key, value)) for o in (output, truth))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_accepts_our_arguments(causal, monkeypatch):
    """Without a GPU, the kernel runs on meta tensors, which checks its arguments and the shapes of its results."""
    monkeypatch.setattr(packing, "_has_kernel", lambda query: True)
    query, key, value = (rows(heads, torch.bfloat16, "meta") for heads in (4, 2, 2))
    output = packed_attention(query, key, value, bounds("meta"), max(LENGTHS), causal)
    assert output.shape == query.shape
    output.sum().backward()
    assert key.grad.shape == key.shape


def test_heads_that_share_a_key_head_get_copies_of_it(tiny_base, monkeypatch):
    """torch's memory-efficient kernel on GPUs is wrong for a broadcast key head, whose stride is 0."""
    strides = []
    attention = F.scaled_dot_product_attention

    def watched(query, key, value, **options):
        if query.shape[1] > 1:
            strides.append((key.stride(1), value.stride(1)))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = RerankerModel.from_pretrained(tiny_base, ModelSettings(min_pixels=256, max_pixels=1024))
    assert model.backbone.config.text_config.num_key_value_heads == 1
    encoder = PairEncoder.from_pretrained(tiny_base, ModelSettings(), 64)
    query = model.read_query(collate_pairs([encoder.encode_query("a fox")]))
    model.answer_logits(query, collate_pairs([encoder.encode_document(text) for text in ("a", "b c d")]), (1, 2))
    assert strides
    assert all(min(pair) > 0 for pair in strides)


def test_queries_and_keys_are_cast_to_the_values_dtype():
    query, key, value = (rows(heads, torch.float32).transpose(0, 1)[None] for heads in (4, 2, 2))
    output, _ = packing.attention_forward(None, query, key, value.bfloat16(), None, 0.3, False, bounds(), max(LENGTHS))
    assert output.dtype == torch.bfloat16
    expected = masked_attention(*(tensor[0].transpose(0, 1) for tensor in (query, key, value)), False)
    torch.testing.assert_close(output[0].float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("causal", "dimension"), itertools.product((False, True), (64, 80, 128)))
def test_the_kernel_computes_the_same(causal, dimension):
    arguments = [rows(heads, torch.bfloat16, "cuda", dimension) for heads in (4, 2, 2)]
    truth = [tensor.detach().double().cpu().requires_grad_() for tensor in arguments]
    output = packed_attention(*arguments, bounds("cuda"), max(LENGTHS), causal, 0.3)
    expected = masked_attention(*truth, causal)
    torch.testing.assert_close(output.double().cpu(), expected, atol=2e-2, rtol=2e-2)
    output.sum().backward()
    expected.sum().backward()
    for one, other in zip(arguments, truth, strict=True):
        torch.testing.assert_close(one.grad.double().cpu(), other.grad, atol=5e-2, rtol=5e-2)


def adapted(base, attention: str, pooling: str) -> Embedder:
    settings = ModelSettings(attention=attention, pooling=pooling, **PICTURES)
    embedder = Embedder.from_pretrained(base, settings=settings)
    add_lora(embedder.model, Lora(r=4, alpha=8, dropout=0.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in embedder.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return embedder


def adapter_gradients(embedder: Embedder, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    upstream = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(2))
    parameters = {name: p for name, p in embedder.model.named_parameters() if ".lora_" in name}
    return dict(zip(parameters, torch.autograd.grad((vectors * upstream).sum(), parameters.values()), strict=True))


@pytest.mark.parametrize(
    ("attention", "pooling"), [("bidirectional", "mean"), ("bidirectional", "last"), ("causal", "mean")]
)
def test_packed_items_equal_items_alone_in_stock_transformers(family_base, attention, pooling):
    """Vectors and adapter gradients of text, pictures and videos, with DeepStack if the family has it."""
    embedder = adapted(family_base, attention, pooling)
    encoded = [embedder.encoder.encode(item, "query") for item in ITEMS]
    forms = [embedder.model(collate(encoded, packed=packed)) for packed in (True, False)]
    gradients = [adapter_gradients(embedder, vectors) for vectors in forms]
    embedder.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    embedder.model.train()
    forms.append(embedder.model(collate(encoded, packed=True)))
    gradients.append(adapter_gradients(embedder, forms[-1]))
    embedder.model.eval()
    embedder.model.backbone.set_attn_implementation("eager")
    alone = torch.cat([embedder.model(collate([item])) for item in encoded])
    cosines = alone @ alone.T - 2 * torch.eye(len(alone))
    assert cosines.max() < 0.999, "the items must differ for this test to mean anything"
    expected = adapter_gradients(embedder, alone)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for vectors, found in zip(forms, gradients, strict=True):
        torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_picture_does_not_depend_on_the_others(family_base):
    embedder = Embedder.from_pretrained(family_base, settings=ModelSettings(**PICTURES))
    model, encoder = embedder.model, embedder.encoder
    pictures = [shown for item in ITEMS for shown in encoder.encode(item, "query").pictures]
    with torch.inference_mode():
        together = model.run_tower(pictures)
        model.backbone.set_attn_implementation("eager")
        alone = [model.run_tower([shown])[0] for shown in pictures]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_packed_pairs_equal_pairs_alone(tiny_base):
    settings = ModelSettings(**PICTURES)
    encoder = PairEncoder.from_pretrained(tiny_base, settings, 64)
    model = RerankerModel.from_pretrained(tiny_base, settings)
    pairs = [encoder.encode(ITEMS[0], item, answer=bool(n % 2)) for n, item in enumerate([*ITEMS[1:3], "a boat"])]
    with torch.inference_mode():
        packed = model(collate_pairs(pairs, packed=True))
        alone = torch.cat([model(collate_pairs([pair])) for pair in pairs])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert len(set(alone.tolist())) == len(pairs)


def test_embedders_pack_on_a_gpu(tiny_base, monkeypatch):
    """Simulated on a CPU: the library's embedder and the bulk one, whose cache holds features without pixels."""
    settings = ModelSettings(**PICTURES)
    expected = Embedder.from_pretrained(tiny_base, settings=settings).encode_query(ITEMS)
    monkeypatch.setattr("umarvel_ray.model.embedder.is_packed", lambda choice, device: True)
    embedder = Embedder.from_pretrained(tiny_base, settings=settings)
    for budget in (1, 100, 10_000):
        np.testing.assert_allclose(embedder.encode_query(ITEMS, token_budget=budget), expected, atol=1e-5, rtol=0)
    bulk = CachedEmbedder("cpu", "float32", 100, threads=1, cache_bytes=2**20)
    bulk.load(CheckpointRef.of(tiny_base, settings))
    png = io.BytesIO()
    picture(0).save(png, "PNG")
    rows = [{"id": "a", "text": ITEMS[0]["text"]}, {"id": "b", "text": None, "image": png.getvalue()}]
    wanted = embedder.encode_document([{"text": ITEMS[0]["text"]}, {"image": png.getvalue()}])
    for _ in range(2):
        _, vectors, _ = bulk.embed(rows, "document")
        np.testing.assert_allclose(vectors, wanted, atol=1e-5, rtol=0)


def test_packed_buckets_are_as_full_as_possible():
    lengths = np.random.default_rng(0).integers(1, 200, 300).tolist()
    for budget in (1, 500, 5000):
        buckets = token_buckets(lengths, budget, packed=True)
        assert sorted(i for bucket in buckets for i in bucket) == list(range(300))
        sizes = [sum(lengths[i] for i in bucket) for bucket in buckets]
        assert all(size <= budget or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
        heads = [lengths[bucket[0]] for bucket in buckets]
        assert all(size + head > budget for size, head in zip(sizes, heads[1:], strict=False))
    assert token_buckets([], 10, packed=True) == []


def test_auto_packs_on_gpus_only():
    assert [is_packed("auto", device) for device in ("cpu", "cuda", "cuda:1")] == [False, True, True]
    assert is_packed(True, "cpu")
    assert not is_packed(False, "cuda")


def test_an_item_that_is_not_finite_does_not_affect_the_others(tiny_base):
    embedder = Embedder.from_pretrained(tiny_base, settings=ModelSettings(**PICTURES))
    batch = collate([embedder.encoder.encode(item, "query") for item in ITEMS[:4]], packed=True)
    features = {shown.key: torch.full((int(np.prod(shown.grid)) // 4, 32), torch.nan) for shown in batch.pictures}
    with torch.inference_mode():
        vectors = embedder.model(batch, features)
    assert vectors.isfinite().all(dim=1).tolist() == [True, False, True, False]
    assert F.cosine_similarity(vectors[0], vectors[2], dim=0) < 0.999
