"""The reranker: a generative pointwise model that answers Yes or No to a (query, candidate) pair
(docs/method.md#reranker).

The score is the softmax over the logits of "Yes" and "No" at the position of the answer. Each query is run once, and
its keys and values are shared by all its candidates. Attention is therefore always causal, even if the model starts
from a bidirectional embedder: the query's keys must not depend on the candidate. The loss covers only the answer word
and the end of the turn (the reference spreads it over the constant tokens around them), or only the two logits of the
score (docs/method.md#reranker-loss).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from umarvel_ray.errors import UserError
from umarvel_ray.items.item import Item, listed, with_instruction
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder
from umarvel_ray.items.pictures import Picture, PictureFormat, PixelScale
from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.batch import PairBatch, collate_pairs, token_buckets
from umarvel_ray.model.checkpoint import PROVENANCE, load_settings, read_provenance
from umarvel_ray.model.device import PROBE, best_device, checked_device, require_device
from umarvel_ray.model.hub import model_folder
from umarvel_ray.model.int8 import load_as
from umarvel_ray.model.multimodal import last_hidden_state, read_pictures, tower_features
from umarvel_ray.model.vectors import NOT_FINITE
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.presets import preset_settings
from umarvel_ray.recipe import RERANKER, ModelSettings

VISION_CACHE_BYTES = 256 * 2**20
TOKEN_BUDGET = 16384

Visual = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ReadQuery:
    """A query that the model has run: per layer its keys and values (1, heads, L, d), and where candidates continue."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    length: int
    next_position: int

    def for_candidates(self, count: int) -> DynamicCache:
        """The same keys and values for each of `count` rows, without copying them."""
        return DynamicCache([(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in self.layers])


class RerankerModel(nn.Module):
    """Pairs in, losses out; queries and candidates in, two logits out.

    Attributes:
        yes_no: the tokens of the two answers, if the loss compares their logits alone; None: next-token loss.
    """

    def __init__(self, backbone: PreTrainedModel, scale: PixelScale) -> None:
        super().__init__()
        self.backbone = backbone
        self.scale = scale
        self.yes_no: tuple[int, int] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: ModelSettings,
        dtype: torch.dtype | str = torch.float32,
        quantized: bool = False,
    ) -> RerankerModel:
        """Load a base model, an embedder checkpoint or a reranker checkpoint, with causal attention.

        `quantized`, raises: see `load_backbone`.
        """
        backbone, _ = load_backbone(path, settings.model_copy(update={"attention": "causal"}), dtype, quantized)
        return cls(backbone, PictureFormat.from_pretrained(path, settings).scale)

    def forward(self, batch: PairBatch, visual: Visual | None = None) -> torch.Tensor:
        """Next-token loss on the tokens with labels or, with `yes_no`, cross-entropy over the two answers' logits.

        Args:
            visual: the tower's output by image key, instead of running it; needs every key of the batch.

        Returns:
            float32 (B,), each pair's mean over its tokens with labels; every pair needs its answer.
        """
        hidden = self._read(batch, visual)
        labeled = batch.labels[:, 1:] >= 0
        if self.yes_no:
            labeled &= batch.labels[:, :-1] < 0  # the first token of the answer alone
        rows, columns = torch.nonzero(labeled, as_tuple=True)
        # The vocabulary is large and few tokens have labels: logits for those alone, (n, vocabulary).
        logits = self.backbone.lm_head(hidden[rows, columns]).float()
        wanted = batch.labels[rows, columns + 1]
        if self.yes_no:
            logits, wanted = logits[:, list(self.yes_no)], (wanted == self.yes_no[1]).long()
        losses = F.cross_entropy(logits, wanted, reduction="none")  # (n,)
        pairs = batch.sequence_of(rows, columns)
        sums = torch.zeros(len(batch), device=losses.device).index_add(0, pairs, losses)
        return sums / torch.bincount(pairs, minlength=len(batch))

    @torch.no_grad()
    def read_query(self, query: PairBatch, visual: Visual | None = None) -> ReadQuery:
        """Run the part of the prompt that all candidates share; `query` is a batch of one."""
        cache = DynamicCache()
        self._read(query, visual, cache=cache)
        full: Sequence[Any] = cache.layers
        layers = tuple((layer.keys, layer.values) for layer in full)
        return ReadQuery(layers, query.input_ids.shape[1], int(query.positions.max()) + 1)

    @torch.no_grad()
    def answer_logits(
        self, query: ReadQuery, candidates: PairBatch, token_ids: Sequence[int], visual: Visual | None = None
    ) -> torch.Tensor:
        """Logits of `token_ids` at the position of the answer: float32 (B, len(token_ids))."""
        count = len(candidates)
        mask = candidates.attention_mask
        assert mask is not None  # candidates are padded, never packed
        before = mask.new_ones(count, query.length)
        hidden = self._read(
            candidates,
            visual,
            candidates.positions + query.next_position,
            torch.cat([before, mask], dim=1),
            query.for_candidates(count),
        )
        last = hidden[torch.arange(count, device=hidden.device), mask.sum(dim=1) - 1]
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
    >>> query = {"text": "a red car", "instruction": "Find an image that matches the caption."}
    >>> reranker.rank(query, [{"image": "boat.jpg"}, {"image": "car.jpg"}])
    [{"corpus_id": 1, "score": 0.93}, {"corpus_id": 0, "score": 0.08}]
    """

    def __init__(self, model: RerankerModel, encoder: PairEncoder, device: torch.device | str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.encoder = encoder
        self.device = torch.device(device)
        self.vision = VisionCache(VISION_CACHE_BYTES, self.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "float32",
        revision: str | None = None,
        settings: ModelSettings | None = None,
        preset: str | None = None,
        base: str | Path | None = None,
    ) -> Reranker:
        """Load a reranker checkpoint. One without `umarvel.json` (a released one) needs `settings` or `preset`.

        Args:
            path: a directory, or an id on the Hugging Face Hub, of a model or a PEFT adapter (see `model_folder`).
            device: by default the best one: "cuda", "mps" if the model runs there, or "cpu".
            dtype: a PyTorch dtype, or "int8" (see `int8`).
            revision: branch, tag or commit on the Hub.
            preset: the system that released the checkpoint, whose own code it then scores as: "lamra-rank" or
                "qwen3-vl-reranker" (docs/guide.md#presets).
            base: of an adapter, if it is neither named by it nor beside it.

        Raises:
            UserError: not a checkpoint, or that of another phase; missing or truncated files; a preset that is unknown
                or for other models; no such device.
        """
        folder = model_folder(path, revision, base)
        if preset:
            settings = preset_settings(preset, "reranker", folder)
        if settings is None or (folder / PROVENANCE).is_file():
            phase = read_provenance(folder).get("phase")
            if phase != RERANKER:
                place = folder / PROVENANCE
                raise UserError(f"{place}: phase is '{phase}', not '{RERANKER}'; give a reranker checkpoint")
        settings = settings or load_settings(folder)
        encoder = PairEncoder.from_pretrained(folder, settings, settings.max_text_tokens)
        chosen = best_device() if device is None else device
        require_device(chosen)
        model = load_as(dtype, chosen, partial(RerankerModel.from_pretrained, folder, settings))
        if device is None:
            chosen = checked_device(str(chosen), lambda tried: cls(model, encoder, tried).score(PROBE, [PROBE]))
        return cls(model, encoder, chosen)

    def rank(
        self,
        query: Item | str,
        documents: Sequence[Item | str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt: str | None = None,
        *,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query, in the shape of sentence-transformers' `CrossEncoder.rank`.

        Args:
            top_k: how many to return; by default all.
            return_documents: add each document, as it was given, under the key "text".
            prompt: the query's instruction, unless it has one of its own.

        Returns:
            dicts of "corpus_id" (the position in `documents`) and "score" (P(yes)), best first; equal scores keep
            the order of `documents`.

        Raises:
            UserError: `top_k` below 1; see `score`.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}; give 1 or more")
        documents = listed(documents, "documents")
        scores = self.score(with_instruction(query, prompt), documents, token_budget).tolist()
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_k]
        return [
            {"corpus_id": index, "score": scores[index]} | ({"text": documents[index]} if return_documents else {})
            for index in best
        ]

    def predict(
        self, pairs: Sequence[Any], prompt: str | None = None, *, token_budget: int = TOKEN_BUDGET
    ) -> np.ndarray:
        """P(yes) of (query, document) pairs, as sentence-transformers' `CrossEncoder.predict` takes them.

        Consecutive pairs with the same query share one run of it.

        Args:
            pairs: tuples or lists of a query and a document, or a single one of them.
            prompt: the instruction of every query without one of its own.

        Returns:
            float32 (n,), in the order given; a scalar for a single pair.

        Raises:
            UserError: see `score`.
        """
        if len(pairs) and not isinstance(pairs[0], list | tuple):
            single: np.ndarray = self.predict([pairs], prompt, token_budget=token_budget)[0]
            return single
        documents = [self.encoder.encode_document(document, f"pair {i}") for i, (_, document) in enumerate(pairs)]
        scores = np.empty(len(pairs), dtype=np.float32)
        start = 0
        for _, group in groupby(query if isinstance(query, str) else id(query) for query, _ in pairs):
            end = start + len(list(group))
            query = self.encoder.encode_query(with_instruction(pairs[start][0], prompt), f"pair {start}")
            scores[start:end] = self.score_encoded(query, documents[start:end], token_budget)
            start = end
        return scores

    def score(self, query: Item | str, documents: Sequence[Item | str], token_budget: int = TOKEN_BUDGET) -> np.ndarray:
        """P(yes) of each document: float32 (n,), in the order given.

        Raises:
            UserError: see `PairEncoder.encode`.
        """
        encoded = [
            self.encoder.encode_document(item, f"document {i}") for i, item in enumerate(listed(documents, "documents"))
        ]
        return self.score_encoded(self.encoder.encode_query(query), encoded, token_budget)

    @torch.inference_mode()
    def score_encoded(
        self, query: EncodedPair, documents: Sequence[EncodedPair], token_budget: int = TOKEN_BUDGET
    ) -> np.ndarray:
        """`score` for sides that are tokenized already.

        Args:
            token_budget: the most tokens in a batch, padding included and the query counted in every row.
        """
        scores = np.empty(len(documents), dtype=np.float32)
        if not documents:
            return scores
        documents = [self.encoder.fitted(document, query.length) for document in documents]
        tensors = self._tensors([query])
        read = self.model.read_query(tensors, self.vision.features(self.model, tensors.pictures))
        for bucket in token_buckets([query.length + document.length for document in documents], token_budget):
            tensors = self._tensors([documents[index] for index in bucket])
            visual = self.vision.features(self.model, tensors.pictures)
            logits = self.model.answer_logits(read, tensors, self.encoder.yes_no, visual)
            scores[bucket] = logits.softmax(dim=1)[:, 0].cpu().numpy()
        if len(lost := np.flatnonzero(~np.isfinite(scores))):
            raise UserError(f"document {lost[0]}: its score is not finite; {NOT_FINITE}")
        return scores

    def _tensors(self, sides: Sequence[EncodedPair]) -> PairBatch:
        return collate_pairs(sides, self.device)
