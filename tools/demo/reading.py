"""Batched forward passes of pretraining: items to embed, pairs to judge and questions to answer."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPast

from tools.demo.base_model import CONTROL_TOKENS
from tools.demo.corpus import Corpus, Turn
from tools.demo.fast_tower import Tower
from tools.demo.pair_sampler import JudgedPair, common_prefix_length, without_prefix
from tools.demo.views import patches_of
from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.positions import Span, rotary_positions
from umarvel_ray.model.batch import collate, collate_pairs
from umarvel_ray.model.pooling import pool
from umarvel_ray.model.reranker import ReadQuery

IMAGE = CONTROL_TOKENS.index("<|image_pad|>")
MAX_TOKENS = 64  # of a prompt, an answer or a text


class Reader:
    """The model with a batched vision tower. Visual tokens are (n, 16, HIDDEN), one row per picture."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tower = Tower(model.model.visual)
        self._ids: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def answer_loss(self, turns: list[Turn], tokens: Tensor | None, each: bool = False) -> Tensor:
        """Next-token loss on the answers; `tokens` (n, 16, HIDDEN) are the turns' pictures."""
        name = CONTROL_TOKENS.index
        rows, answers = [], []
        for turn in turns:
            shown = [name("<|vision_start|>"), *[IMAGE] * 16, name("<|vision_end|>")] if tokens is not None else []
            prompt = [name("<|im_start|>"), *self.tokens("user"), *shown, *self.tokens(turn.prompt)[:MAX_TOKENS]]
            prompt += [name("<|im_end|>"), name("<|im_start|>"), *self.tokens("assistant")]
            answer = [*self.tokens(turn.answer)[:MAX_TOKENS], name("<|im_end|>")]
            rows.append(prompt + answer)
            answers.append((len(prompt), len(answer)))
        ids, mask = pad(rows)
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        for i, row in enumerate(rows):
            spans = [Span((1, 4, 4))] if tokens is not None else []
            row_positions = rotary_positions(np.array(row) == IMAGE, spans, "mrope")
            positions[:, i, : len(row)] = torch.from_numpy(row_positions.astype(np.int64))
        hidden = self.model.model.language_model(
            inputs_embeds=self._embedded(ids, tokens),
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        index = [(i, start - 1 + n) for i, (start, size) in enumerate(answers) for n in range(size)]
        rows_of, columns = torch.tensor(index).T
        logits = self.model.lm_head(hidden[rows_of, columns])
        loss = F.cross_entropy(logits, ids[rows_of, columns + 1], reduction="none" if each else "mean")
        if not each:
            return loss
        sums = torch.zeros(len(turns)).index_add(0, rows_of, loss)
        return sums / torch.tensor([size for _, size in answers])

    def judge(self, judged: list[JudgedPair], corpus: Corpus, yes_no: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """For each pair the logit of Yes minus that of No, and the next-token loss of the correct answer.

        The tower gets no gradient. The prefix that all prompts share is computed once.

        Args:
            yes_no: token ids of the two answers.
        """
        rows = [one.pair for one in judged]
        start = common_prefix_length(rows)
        shown = sorted({picture for one in judged for picture in one.pictures})
        with torch.no_grad():
            tokens = self.tower(patches_of(torch.from_numpy(corpus.pictures[shown])))[1] if shown else None
        place = {picture: n for n, picture in enumerate(shown)}
        language = self.model.model.language_model
        shared = DynamicCache()
        opening = torch.from_numpy(rows[0].input_ids[None, :start]).long()
        language(inputs_embeds=self._embedded(opening, None), past_key_values=shared)
        read = ReadQuery(tuple((layer.keys, layer.values) for layer in shared.layers), start, start)
        batch = collate_pairs([without_prefix(row, start) for row in rows])
        seen = torch.stack([tokens[place[picture]] for one in judged for picture in one.pictures]) if shown else None
        hidden = language(
            inputs_embeds=self._embedded(batch.input_ids, seen),
            attention_mask=torch.cat([batch.attention_mask.new_ones(len(rows), start), batch.attention_mask], 1),
            position_ids=batch.positions,
            past_key_values=read.for_candidates(len(rows)),
        ).last_hidden_state
        logits = self.model.lm_head(hidden[torch.arange(len(rows)), batch.attention_mask.sum(1) - 1])
        yes, no = yes_no
        answers = torch.tensor([yes if one.answers else no for one in judged])
        return logits[:, yes] - logits[:, no], F.cross_entropy(logits, answers, reduction="none")

    def items(self, items: list[EncodedItem], tokens: Tensor | None) -> Tensor:
        """Items read with full attention and pooled, as in the embedder: (n, HIDDEN).

        Args:
            tokens: visual tokens of the items' pictures.
        """
        batch = collate([replace(item, pictures=()) for item in items])
        read = self._read(batch.input_ids, tokens, batch.attention_mask.bool(), batch.positions)
        return pool(read.last_hidden_state, batch.pool_mask)

    def texts(self, texts: list[str]) -> Tensor:
        """Plain texts without the template, below the last layer, which is left to generation: (n, HIDDEN)."""
        ids, mask = pad([self.tokens(text)[:MAX_TOKENS] for text in texts])
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        return pool(self._read(ids, None, mask, positions).hidden_states[-2], mask)

    def _read(self, ids: Tensor, tokens: Tensor | None, mask: Tensor, positions: Tensor) -> BaseModelOutputWithPast:
        """The language model with full attention."""
        n, length = mask.shape
        return self.model.model.language_model(
            inputs_embeds=self._embedded(ids, tokens),
            attention_mask=torch.zeros(n, 1, length, length).masked_fill(~mask[:, None, None], -1e9),
            position_ids=positions,
            output_hidden_states=True,
            use_cache=False,
        )

    def _embedded(self, ids: Tensor, tokens: Tensor | None) -> Tensor:
        embedded = self.model.get_input_embeddings()(ids)
        return embedded if tokens is None else embedded.masked_scatter((ids == IMAGE)[..., None], tokens)


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, (n, longest)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask
