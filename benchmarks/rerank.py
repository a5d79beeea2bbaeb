"""Reranking on the CPU in fp32: each query, a picture, is scored against 50 texts.

- ours: `Reranker.score`, which reads the query once for all its candidates;
- whole pairs: the same model on each pair's whole conversation, in batches with the same token budget. It gets the
  query picture's features for free instead of running the vision tower for every pair, which favors it.

    python -m benchmarks.rerank [queries=2] [documents=50] [rounds=3]     → benchmarks/results/rerank.json
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common.items import ItemMaker
from benchmarks.common.results import integer_arguments, report_comparison
from benchmarks.common.small_model import SETTINGS, SHAPE, make_model
from benchmarks.common.timing import alternate
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.model.batch import PairBatch, collate_pairs, token_buckets
from umarvel_ray.model.reranker import Reranker, RerankerModel
from umarvel_ray.model.vision_cache import VisionCache

OURS, WHOLE = "umarvel-ray", "whole pairs"
TARGETS = {WHOLE: 3.0}
INSTRUCTION = "Find a text that describes the thing in the picture."
TOKEN_BUDGET = 2048


@torch.inference_mode()
def score_whole(reranker: Reranker, query: dict, documents: list[dict]) -> np.ndarray:
    """P(yes) of each pair, float32 (n,)."""
    pairs = [reranker.encoder.encode(query, document) for document in documents]
    vision = VisionCache(2**30)
    scores = np.empty(len(pairs), dtype=np.float32)
    for bucket in token_buckets([pair.length for pair in pairs], TOKEN_BUDGET):
        batch = collate_pairs([pairs[index] for index in bucket])
        logits = answer_logits(
            reranker.model, batch, vision.features(reranker.model, batch.pictures), reranker.encoder.yes_no
        )
        scores[bucket] = logits.softmax(dim=1)[:, 0].numpy()
    return scores


def answer_logits(
    model: RerankerModel, batch: PairBatch, visual: dict[str, torch.Tensor], yes_no: tuple[int, int]
) -> torch.Tensor:
    """Logits of Yes and No after the last token (B, 2), computed by transformers' model only."""
    core = model.backbone.model
    embeds = core.get_input_embeddings()(batch.input_ids)
    is_image = (batch.input_ids == core.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(is_image, torch.cat([visual[picture.key] for picture in batch.pictures]))
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=batch.attention_mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    last = hidden[torch.arange(len(batch)), batch.attention_mask.sum(1) - 1]
    return F.linear(last, model.backbone.lm_head.weight[list(yes_no)])


def main(queries: int = 2, documents: int = 50, rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = ItemMaker(folder / "pictures")
        pictures = [maker.item("image") | {"instruction": INSTRUCTION} for _ in range(queries)]
        texts = [[maker.item("short text") for _ in range(documents)] for _ in pictures]
        path = make_model(folder / "model")
        model = RerankerModel.from_pretrained(path, SETTINGS)
        reranker = Reranker(model, PairEncoder.from_pretrained(path, SETTINGS, SETTINGS.max_text_tokens))
        scores: dict[str, np.ndarray] = {}

        def ours() -> None:
            reranker.vision = VisionCache(2**30)
            scores[OURS] = np.stack([reranker.score(*pair, TOKEN_BUDGET) for pair in zip(pictures, texts, strict=True)])

        def whole() -> None:
            scores[WHOLE] = np.stack([score_whole(reranker, *pair) for pair in zip(pictures, texts, strict=True)])

        times = alternate({OURS: ours, WHOLE: whole}, rounds)
        query = [reranker.encoder.encode_query(item).length for item in pictures]
        candidate = [reranker.encoder.encode_document(item).length for side in texts for item in side]
    report_comparison(
        "rerank",
        f"{SHAPE}. {queries} queries of {min(query)} to {max(query)} tokens, each with {documents} candidates of "
        f"{min(candidate)} to {max(candidate)}; {TOKEN_BUDGET} tokens per batch; scores from "
        f"{scores[OURS].min():.3f} to {scores[OURS].max():.3f}",
        {"pairs": queries * documents},
        times,
        TARGETS,
        {"scores": float(np.abs(scores[OURS] - scores[WHOLE]).max())},
    )


if __name__ == "__main__":
    main(**integer_arguments(sys.argv[1:]))
