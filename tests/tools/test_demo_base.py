"""The shipped base: as documented, opens with stock transformers, and knows what pictures show."""

import io
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import umarvel_ray.demo
from tests.support.with_torchvision import run_with_torchvision
from tools.demo.corpus import read_corpus
from tools.demo.fast_tower import Tower
from tools.demo.pair_sampler import NEAR, PairSampler
from tools.demo.reading import Reader
from tools.demo.views import patches_of
from umarvel_ray.data.dataset import item_of
from umarvel_ray.model.batch import collate
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.reranker import Reranker, RerankerModel

DEMO = Path(umarvel_ray.demo.__file__).parent
BASE = DEMO / "base"
needs_base = pytest.mark.skipif(not (BASE / "model.safetensors").exists(), reason="the base is not built")
pytestmark = needs_base


@pytest.fixture(scope="module")
def model():
    return Qwen2VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def captioned():
    """Training pictures with a short description: [(PIL picture, text)], each of another concept."""
    documents = {r["id"]: r for r in pq.read_table(DEMO / "data/documents.parquet").to_pylist()}
    pairs, concepts = [], set()
    for row in pq.read_table(DEMO / "data/train.parquet").to_pylist():
        picture = documents[row["positive_ids"][0]]["image"]
        if row["task"] == "emoji_task0" and picture and row["concept"] not in concepts:
            concepts.add(row["concept"])
            pairs.append((Image.open(io.BytesIO(picture)).convert("RGB"), row["text"]))
    return pairs[:: len(pairs) // 64][:64]


def test_weights_are_small_whole_and_tied(model):
    assert sum(f.stat().st_size for f in BASE.glob("*.safetensors")) <= 15e6
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    "text",
    [
        "a red car, parked; what's up?",
        "türkiye 你好 🎉 ﷺ \x07",
        "platypus 1815–1866",
        "<|im_start|>user\nhello<|im_end|>",
    ],
)
def test_tokenizer_loses_nothing_but_case_accents_and_spaces(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert tokenizer.convert_tokens_to_ids("<unk>") not in ids
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert tokenizer(decoded, add_special_tokens=False).input_ids == ids
    plain = tokenizer.backend_tokenizer.normalizer.normalize_str
    if "<|" not in text:
        assert "".join(decoded.split()) == "".join(plain(text).split())


def test_tokenizer_has_the_recipes_words(tokenizer):
    for word in ("Yes", "No", "<emb>", "<instruction_start>", "<instruction_end>", "<|image_pad|>", "<|video_pad|>",
                 "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"):  # fmt: skip
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_chat_template_adds_no_system_prompt(tokenizer):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
    )


@torch.no_grad()
def test_captions_fit_their_own_picture_better(model, tokenizer, captioned):
    """The loss of a training picture's description is lower with that picture than with another concept's."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(BASE)
    pictures = processor(images=[picture for picture, _ in captioned], return_tensors="pt")
    assert pictures["image_grid_thw"].tolist() == [[1, 8, 8]] * len(captioned)
    seen = model.model.get_image_features(pictures["pixel_values"], pictures["image_grid_thw"])
    seen = torch.stack(list(getattr(seen, "pooler_output", seen)))
    image_id = model.config.image_token_id

    def losses(tokens):
        values = []
        for (_, text), shown in zip(captioned, tokens, strict=True):
            prompt = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 16
            prompt += "<|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"
            prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
            answer_ids = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
            ids = torch.tensor([prompt_ids + answer_ids])
            embedded = model.get_input_embeddings()(ids).masked_scatter((ids == image_id)[..., None], shown)
            positions, _ = model.model.get_rope_index(
                ids, mm_token_type_ids=(ids == image_id).int(), image_grid_thw=pictures["image_grid_thw"][:1]
            )
            logits = model(inputs_embeds=embedded, position_ids=positions).logits[0, len(prompt_ids) - 1 : -1]
            values.append(F.cross_entropy(logits, torch.tensor(answer_ids)).item())
        return np.array(values)

    own, other = losses(seen), losses(seen.roll(len(captioned) // 2, 0))
    assert own.mean() < other.mean() - 0.2
    assert (own < other).mean() > 0.7


@torch.no_grad()
def test_pretraining_sees_what_the_library_sees(model, captioned):
    """The batched tower and patches of pretraining against transformers' own, one picture at a time."""
    pictures = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture, _ in captioned[:3]])
    patches = patches_of(torch.from_numpy(pictures))
    expected = Qwen2VLImageProcessorPil.from_pretrained(BASE)(
        images=[picture for picture, _ in captioned[:3]], return_tensors="pt"
    )
    assert torch.equal(patches.flatten(0, 1), expected["pixel_values"])
    _, tokens = Tower(model.model.visual)(patches)
    seen = model.model.get_image_features(expected["pixel_values"], expected["image_grid_thw"])
    torch.testing.assert_close(tokens, torch.stack(list(getattr(seen, "pooler_output", seen))), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def sampler():
    return PairSampler(DEMO / "data", "validation", read_corpus(DEMO / "data", "validation"), BASE, {})


@pytest.fixture
def rows(monkeypatch):
    """(query, document, answers) of every pair that was drawn."""
    drawn, judged = [], PairSampler._judged

    def remember(self, query, document, answers):
        drawn.append((query, self.documents[document], answers))
        return judged(self, query, document, answers)

    monkeypatch.setattr(PairSampler, "_judged", remember)
    return drawn


def test_negatives_do_not_answer_and_half_resemble_the_positive(sampler, rows):
    texts = {row["text"] for row in sampler.documents.values() if row["text"]}
    texts |= {text for own in sampler.corpus.texts for text in own}
    generator = np.random.default_rng(0)
    meanings = {
        text: F.normalize(torch.from_numpy(generator.standard_normal(384)).float(), dim=0) for text in sorted(texts)
    }
    near = PairSampler(DEMO / "data", "validation", sampler.corpus, BASE, meanings)
    near.draw(400, 3, random.Random(0))
    assert len(rows) == 1600
    pool = near.pools["wiki_task1"]
    places = []
    for start in range(0, len(rows), 4):
        (query, right, answers), *others = rows[start : start + 4]
        assert answers
        assert right["id"] in query["positive_ids"]
        meaning = meanings.get(right["text"])
        for _, wrong, answers in others:
            assert not answers
            assert wrong["id"] not in query["positive_ids"]
            assert wrong["concept"] != query["concept"] or query["task"].endswith("task7")
            if query["task"] == "wiki_task1":
                alike = [float(meanings[near.documents[i]["text"]] @ meaning) for i in pool if i != right["id"]]
                places.append(sum(a > float(meanings[wrong["text"]] @ meaning) for a in alike))
    share = np.mean(np.array(places) < NEAR)
    drawn_at_random = NEAR / len(pool)
    assert abs(share - (0.5 + 0.5 * drawn_at_random)) < 0.12


@torch.no_grad()
def test_pretraining_judges_pairs_as_the_reranker_scores_them(model, tokenizer, sampler, rows):
    judged = sampler.draw(8, 1, random.Random(0))
    assert [one.answers for one in judged] == [True, False] * 8
    assert {len(one.pictures) for one in judged} == {0, 1, 2}
    scores, losses = Reader(model, tokenizer).judge(judged, sampler.corpus, sampler.encoder.yes_no)
    reranker = Reranker(RerankerModel.from_pretrained(BASE, sampler.encoder.items.settings), sampler.encoder)
    expected = [reranker.score(item_of(query), [item_of(document)])[0] for query, document, _ in rows]
    np.testing.assert_allclose(scores.sigmoid(), expected, atol=1e-5)
    told = torch.tensor([one.answers for one in judged])
    likely = torch.where(told, scores.sigmoid(), 1 - scores.sigmoid())
    assert (losses.exp() * likely >= 1 - 1e-5).all()  # Yes and No share what the other tokens leave


@torch.no_grad()
def test_pretraining_reads_items_as_the_embedder_does(model, tokenizer, sampler):
    rows = [row for row in sampler.queries if row["image"] is not None and row["text"]][:3]
    encoder, reader = sampler.encoder.items, Reader(model, tokenizer)
    items = [encoder.encode(item_of(row), "query") for row in rows]
    shown = [sampler.corpus.number[row["image"]] for row in rows]
    _, tokens = reader.tower(patches_of(torch.from_numpy(sampler.corpus.pictures[shown])))
    embedder = EmbeddingModel.from_pretrained(BASE, encoder.settings).eval()
    read = F.normalize(reader.items(items, tokens), dim=-1)
    torch.testing.assert_close(read, embedder(collate(items)), atol=1e-4, rtol=1e-4)


def test_auto_processor_opens_it():
    run_with_torchvision(f"""
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(BASE)!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
batch = processor(text=[text], images=[Image.new("RGB", (64, 64), "red")], return_tensors="pt")
assert (batch["input_ids"] == processor.image_token_id).sum() == 16, batch["input_ids"]
assert batch["image_grid_thw"].tolist() == [[1, 8, 8]]
""")
