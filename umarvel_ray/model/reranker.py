"""The reranker: a generative pointwise model that answers Yes or No to a (query, candidate) pair (method section 4).

Score = softmax over the two logits of "Yes" and "No" at the answer's place. A query is read once: its keys and values
serve all its candidates. Attention is always causal, whatever the embedder it may start from uses: keys of the query
must not depend on the candidate. Trained on the answer word and the end of the turn alone (trap T22: the reference
spreads the loss over the constant tokens around them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from umarvel_ray.errors import UserError
from umarvel_ray.items.item import Item
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder
from umarvel_ray.items.pictures import Picture, PictureFormat, PixelScale
from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.batch import PairBatch, collate_pairs, token_buckets
from umarvel_ray.model.checkpoint import PROVENANCE, load_settings, read_provenance
from umarvel_ray.model.int8 import load_as
from umarvel_ray.model.multimodal import last_hidden_state, read_pictures, tower_features
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import RERANKER, ModelSettings

VISION_CACHE_BYTES = 256 * 2**20

Visual = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ReadQuery:
    """A query the model has read: per layer its keys and values (1, heads, L, d), and where its candidates go on."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    length: int
    next_position: int

    def for_candidates(self, count: int) -> DynamicCache:
        """The same keys and values for each of `count` rows, without copying them."""
        return DynamicCache([(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in self.layers])


class RerankerModel(nn.Module):
    """Pairs in, losses out; queries and candidates in, two logits out."""

    def __init__(self, backbone: PreTrainedModel, scale: PixelScale) -> None:
        super().__init__()
        self.backbone = backbone
        self.scale = scale

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: ModelSettings,
        dtype: torch.dtype | str = torch.float32,
        quantized: bool = False,
    ) -> RerankerModel:
        """Load a base, an embedder's checkpoint or a reranker's, with causal attention.

        `quantized`, raises: see `load_backbone`.
        """
        backbone, _ = load_backbone(path, settings.model_copy(update={"attention": "causal"}), dtype, quantized)
        return cls(backbone, PictureFormat.from_pretrained(path, settings).scale)

    def forward(self, batch: PairBatch, visual: Visual | None = None) -> torch.Tensor:
        """Next-token loss on the labelled tokens.

        Args:
            visual: the tower's output by image key, in place of running it; needs every key of the batch.

        Returns:
            float32 (B,), each pair's mean over its labelled tokens; every pair needs its answer.
        """
        hidden = self._read(batch, visual)
        rows, places = torch.nonzero(batch.labels[:, 1:] >= 0, as_tuple=True)
        # The vocabulary is large and the labelled tokens few: logits for those alone.
        logits = self.backbone.lm_head(hidden[rows, places]).float()
        losses = F.cross_entropy(logits, batch.labels[rows, places + 1], reduction="none")
        pairs = batch.sequence_of(rows, places)
        sums = torch.zeros(len(batch), device=losses.device).index_add(0, pairs, losses)
        return sums / torch.bincount(pairs, minlength=len(batch))

    @torch.no_grad()
    def read_query(self, query: PairBatch, visual: Visual | None = None) -> ReadQuery:
        """Run the part of the prompt that all candidates share (a batch of one)."""
        cache = DynamicCache()
        self._read(query, visual, cache=cache)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return ReadQuery(layers, query.input_ids.shape[1], int(query.positions.max()) + 1)

    @torch.no_grad()
    def answer_logits(
        self, query: ReadQuery, candidates: PairBatch, token_ids: Sequence[int], visual: Visual | None = None
    ) -> torch.Tensor:
        """Logits of `token_ids` at the answer's place: float32 (B, len(token_ids))."""
        count = len(candidates)
        before = candidates.attention_mask.new_ones(count, query.length)
        hidden = self._read(
            candidates,
            visual,
            candidates.positions + query.next_position,
            torch.cat([before, candidates.attention_mask], dim=1),
            query.for_candidates(count),
        )
        last = hidden[torch.arange(count, device=hidden.device), candidates.attention_mask.sum(dim=1) - 1]
        return F.linear(last, self.backbone.lm_head.weight[list(token_ids)]).float()

    def run_tower(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]:
        """See `tower_features`."""
        return tower_features(self.backbone.model.visual, pictures, self.scale)

    def _read(
        self,
        batch: PairBatch,
        visual: Visual | None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        if visual is None:
            visual = read_pictures(self.backbone, batch.pictures, self.scale)
        return last_hidden_state(self.backbone, batch, visual, positions, attention_mask, cache)


class Reranker:
    """Scores documents for a query with a trained checkpoint.

    >>> reranker = Reranker.from_pretrained(path)
    >>> reranker.score({"text": "a red car", "instruction": "Find an image that matches."}, [{"image": "car.jpg"}])
    """

    def __init__(self, model: RerankerModel, encoder: PairEncoder, device: torch.device | str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.encoder = encoder
        self.device = torch.device(device)
        self.vision = VisionCache(VISION_CACHE_BYTES, self.device)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | str = "float32"
    ) -> Reranker:
        """Load a reranker's checkpoint.

        Args:
            dtype: of PyTorch, or "int8" (see `int8`).

        Raises:
            UserError: not a checkpoint, or another stage's; missing or truncated files.
        """
        phase = read_provenance(path).get("phase")
        if phase != RERANKER:
            raise UserError(
                f"{Path(path) / PROVENANCE}: phase is '{phase}', not '{RERANKER}'; give a reranker checkpoint"
            )
        settings = load_settings(path)
        encoder = PairEncoder.from_pretrained(path, settings, settings.max_text_tokens)
        model = load_as(dtype, device, partial(RerankerModel.from_pretrained, path, settings))
        return cls(model, encoder, device)

    def score(self, query: Item | str, documents: Sequence[Item | str], token_budget: int = 16384) -> np.ndarray:
        """P(yes) of each document: float32 (n,), in the order given.

        Raises:
            UserError: an empty item, a key that is not known, an instruction on a document, a bad picture.
        """
        encoded = [self.encoder.encode_document(item, f"document {i}") for i, item in enumerate(documents)]
        return self.score_encoded(self.encoder.encode_query(query), encoded, token_budget)

    @torch.inference_mode()
    def score_encoded(
        self, query: EncodedPair, documents: Sequence[EncodedPair], token_budget: int = 16384
    ) -> np.ndarray:
        """`score` for sides that are tokenised already.

        Args:
            token_budget: padded tokens of a batch, the query's included for every row.
        """
        scores = np.empty(len(documents), dtype=np.float32)
        if not documents:
            return scores
        tensors = self._tensors([query])
        read = self.model.read_query(tensors, self.vision.features(self.model, tensors.pictures))
        for bucket in token_buckets([query.length + document.length for document in documents], token_budget):
            tensors = self._tensors([documents[index] for index in bucket])
            visual = self.vision.features(self.model, tensors.pictures)
            logits = self.model.answer_logits(read, tensors, self.encoder.yes_no, visual)
            scores[bucket] = logits.softmax(dim=1)[:, 0].cpu().numpy()
        return scores

    def _tensors(self, sides: Sequence[EncodedPair]) -> PairBatch:
        return collate_pairs(sides, self.device)
