"""The reranker against the stock model: each pair alone, the whole prompt, the whole vocabulary."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.support.tiny import CHAT_TEMPLATE
from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.model.batch import collate_pairs
from umarvel_ray.model.checkpoint import load_settings, save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora, merge_lora
from umarvel_ray.model.reranker import Reranker, RerankerModel
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import Compute, ContrastivePhase, Lora, ModelSettings, RerankPhase
from umarvel_ray.train.build import build_module, model_of
from umarvel_ray.train.phases import PhaseSpec

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=16384)
TASK = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements of "
    "the query. If it does, respond with 'Yes'; if it does not, respond with 'No'."
)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


QUERIES = [
    {"text": "a red fox", "instruction": "Find an image that matches the caption."},
    {"image": picture(0, 96, 48), "instruction": "Identify the picture."},
    {"image": picture(1), "text": "in another style", "instruction": "Retrieve the same thing"},
]
DOCUMENTS = [
    {"text": "Harbor lights at dusk."},
    {"image": picture(2)},
    {"image": picture(3, 64, 128), "text": "A green tree and a white house"},
    {"text": "A small blue bird. " * 12},
    {"image": picture(4, 128, 64)},
    "Two boats near a pier",
]


def make_reranker(path, settings=SETTINGS) -> Reranker:
    encoder = PairEncoder.from_pretrained(path, settings, 64)
    return Reranker(RerankerModel.from_pretrained(path, settings), encoder)


def stock_logits(path, encoder: PairEncoder, pair, positions: str) -> torch.Tensor:
    """Every position's logits of one pair alone, by transformers' own forward and its own M-RoPE."""
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    ids = torch.from_numpy(pair.input_ids).long()[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if positions == "sequential":
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
    image, video = encoder.items.picture_token_ids
    names = {False: ("pixel_values", "image_grid_thw"), True: ("pixel_values_videos", "video_grid_thw")}
    for moving, (pixels, grids) in names.items():
        if shown := [picture for picture in pair.pictures if (picture.seconds is not None) == moving]:
            inputs[pixels] = encoder.items.picture_format.scale([picture.pixels for picture in shown])
            inputs[grids] = torch.tensor([picture.grid for picture in shown])
    if pair.pictures:
        inputs["mm_token_type_ids"] = (ids == image).int() + 2 * (ids == video).int()
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits[0]


def stock_p_yes(path, encoder, query, document, positions="mrope") -> float:
    logits = stock_logits(path, encoder, encoder.encode(query, document), positions)[-1]
    yes, no = (encoder.items.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    return (logits[yes].exp() / (logits[yes].exp() + logits[no].exp())).item()


def test_the_prompt_is_the_templates_conversation(tiny_base):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 64)
    pair = encoder.encode(QUERIES[2], {"image": picture(3), "text": "a white house"}, answer=True)
    pads = "<|image_pad|>" * 16
    expected = (
        f"<|im_start|>user\n{TASK}\nQuery: <|vision_start|>{pads}<|vision_end|>Retrieve the same thing. in another "
        f"style.\nCandidate: <|vision_start|>{pads}<|vision_end|>A white house.<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>"
    )
    tokenizer = encoder.items.tokenizer
    assert tokenizer.decode(pair.input_ids) == expected
    has_label = pair.labels >= 0
    assert tokenizer.decode(pair.labels[has_label]) == "Yes<|im_end|>"
    assert has_label[-2:].all()
    np.testing.assert_array_equal(pair.labels[has_label], pair.input_ids[has_label])
    assert tokenizer.decode(encoder.encode("fox", "snow", answer=False).input_ids).endswith("assistant\nNo<|im_end|>")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_candidate_has_the_same_beginning(tiny_base, document):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 64)
    beginning = encoder.encode_query(QUERIES[2])
    pair = encoder.encode(QUERIES[2], document)
    assert encoder.items.tokenizer.decode(beginning.input_ids).endswith("\nCandidate: ")
    np.testing.assert_array_equal(pair.input_ids[: beginning.length], beginning.input_ids)
    np.testing.assert_array_equal(pair.positions[:, : beginning.length], beginning.positions)


@pytest.mark.parametrize("positions", ["mrope", "sequential"])
@pytest.mark.parametrize("budget", [16384, 400, 1])
def test_shared_query_scores_equal_each_pair_alone(tiny_base, positions, budget):
    reranker = make_reranker(tiny_base, SETTINGS.model_copy(update={"positions": positions}))
    for query in QUERIES:
        expected = [stock_p_yes(tiny_base, reranker.encoder, query, document, positions) for document in DOCUMENTS]
        assert np.ptp(expected) > 1e-2  # the model scores the candidates differently
        scores = reranker.score(query, DOCUMENTS, token_budget=budget)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        np.testing.assert_allclose(reranker.score(query, DOCUMENTS[::-1], budget), expected[::-1], atol=1e-5)


def test_every_family_scores_as_its_stock_model(family_base):
    """DeepStack and videos after a cached query."""
    settings = SETTINGS.model_copy(update={"max_pixels": 4096})
    reranker = make_reranker(family_base, settings)
    documents = [*DOCUMENTS[:3], {"video": [picture(seed, 48, 32) for seed in (7, 8)], "text": "boats"}]
    expected = [stock_p_yes(family_base, reranker.encoder, QUERIES[2], document) for document in documents]
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(reranker.score(QUERIES[2], documents), expected, atol=1e-5)


def test_blank_shuffled_and_missing_frames_change_the_score(family_base):
    settings = SETTINGS.model_copy(update={"max_pixels": 4096, "video_frames": 4, "max_video_pixels": 4096})
    reranker = make_reranker(family_base, settings)
    frames = [picture(seed, 48, 32) for seed in (7, 8, 9, 10)]
    blank = [Image.new("RGB", frame.size) for frame in frames]
    shown = [frames, frames[::-1], blank, frames[:2]]
    documents = [{"video": video, "text": "boats"} for video in shown] + ["boats"]
    scores = reranker.score(QUERIES[0], documents)
    apart = np.abs(scores[:, None] - scores)[np.triu_indices(len(scores), 1)]
    assert apart.min() > 1e-4
    np.testing.assert_allclose(reranker.score(QUERIES[0], documents[:1]), scores[:1], atol=1e-6)


def test_the_query_runs_once_and_each_picture_once(tiny_base):
    reranker = make_reranker(tiny_base)
    core, tokens, patches = reranker.model.backbone.model, [], []
    core.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    core.visual.register_forward_pre_hook(lambda _m, args, _k: patches.append(len(args[0])), with_kwargs=True)
    query, documents = QUERIES[2], [{"image": picture(seed)} for seed in (5, 6, 5)]
    reranker.score(query, documents)
    prefix = reranker.encoder.encode_query(query)
    candidate = reranker.encoder.encode_document(documents[0])
    assert tokens == [(1, prefix.length), (3, candidate.length)]
    assert sum(patches) == 3 * 64  # the query's and two different candidates', 8 × 8 patches each
    reranker.score(query, documents)
    assert sum(patches) == 3 * 64


def test_no_candidates_no_scores(tiny_base):
    reranker = make_reranker(tiny_base)
    assert reranker.score("a red fox", []).shape == reranker.predict([]).shape == (0,)
    assert reranker.rank("a red fox", []) == []


def test_rank_sorts_by_score_as_sentence_transformers_does(tiny_base):
    reranker = make_reranker(tiny_base)
    scores = reranker.score(QUERIES[0], DOCUMENTS)
    ranked = reranker.rank(QUERIES[0], DOCUMENTS)
    assert [hit["corpus_id"] for hit in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert [hit["score"] for hit in ranked] == sorted(scores.tolist(), reverse=True)
    assert all(hit.keys() == {"corpus_id", "score"} for hit in ranked)
    assert all(type(hit["corpus_id"]) is int and type(hit["score"]) is float for hit in ranked)
    assert reranker.rank(QUERIES[0], DOCUMENTS, top_k=2) == ranked[:2]
    assert reranker.rank(QUERIES[0], DOCUMENTS, top_k=99) == ranked
    shown = reranker.rank(QUERIES[0], DOCUMENTS, top_k=3, return_documents=True)
    assert all(hit["text"] is DOCUMENTS[hit["corpus_id"]] for hit in shown)
    with pytest.raises(UserError, match="top_k is 0; give 1 or more"):
        reranker.rank(QUERIES[0], DOCUMENTS, top_k=0)


def test_equal_scores_keep_their_order(tiny_base):
    ranked = make_reranker(tiny_base).rank("a red fox", ["boats", "snow", "boats", "boats"])
    assert [hit["corpus_id"] for hit in ranked if hit["corpus_id"] != 1] == [0, 2, 3]


def test_a_prompt_is_the_instruction_of_a_query_without_one(tiny_base):
    reranker = make_reranker(tiny_base)
    own, prompt = QUERIES[0], QUERIES[0]["instruction"]
    expected = reranker.rank(own, DOCUMENTS)
    assert reranker.rank(own["text"], DOCUMENTS, prompt=prompt) == expected
    assert reranker.rank(own, DOCUMENTS, prompt="Find something else.") == expected
    assert reranker.rank(own["text"], DOCUMENTS) != expected


def test_pairs_are_scored_as_their_queries_alone(tiny_base):
    reranker = make_reranker(tiny_base)
    pairs = [(QUERIES[0], document) for document in DOCUMENTS[:3]]
    pairs += [("boats", DOCUMENTS[0]), ["boats", DOCUMENTS[1]], (QUERIES[2], DOCUMENTS[0]), (QUERIES[0], DOCUMENTS[3])]
    scores = reranker.predict(pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [reranker.score(query, [item])[0] for query, item in pairs], atol=1e-5)
    single = reranker.predict(pairs[4])
    assert np.ndim(single) == 0
    assert single == pytest.approx(scores[4], abs=1e-5)
    expected = reranker.score({"text": "boats", "instruction": "Find it."}, [DOCUMENTS[0]])[0]
    assert reranker.predict(pairs[3], prompt="Find it.") == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="pair 1: nothing to embed"):
        reranker.predict([("boats", "snow"), ("boats", "")])
    with pytest.raises(UserError, match="pair 1: nothing to embed"):
        reranker.predict([("boats", "snow"), ("", "snow")])


@pytest.mark.parametrize("cached", [False, True])
def test_loss_is_the_cross_entropy_of_the_answer_and_the_end(tiny_base, tmp_path, cached):
    # Once saved, the checkpoint has the three added tokens, which the vocabulary of the loss includes.
    path = tmp_path / "base"
    save_checkpoint(RerankerModel.from_pretrained(tiny_base, SETTINGS), path, SETTINGS, {})
    encoder = PairEncoder.from_pretrained(path, SETTINGS, 64)
    model = RerankerModel.from_pretrained(path, SETTINGS)
    pairs = [encoder.encode(QUERIES[i % 3], document, i % 2 == 0) for i, document in enumerate(DOCUMENTS)]
    batch = collate_pairs(pairs)
    visual = VisionCache(2**20).features(model, batch.pictures) if cached else None
    losses = model(batch, visual)
    for pair, loss in zip(pairs, losses.tolist(), strict=True):
        logits = stock_logits(path, encoder, pair, "mrope").double()
        terms = [torch.logsumexp(logits[t - 1], 0) - logits[t - 1, pair.input_ids[t]] for t in (-2, -1)]
        assert loss == pytest.approx((sum(terms) / 2).item(), abs=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_over_two_answers_compares_their_logits_alone(tiny_base, packed):
    reranker = make_reranker(tiny_base)
    reranker.model.yes_no = reranker.encoder.yes_no
    answers = [True, False, False, True, True, False]
    pairs = [
        reranker.encoder.encode(QUERIES[i % 3], document, answer)
        for i, (document, answer) in enumerate(zip(DOCUMENTS, answers, strict=True))
    ]
    losses = reranker.model(collate_pairs(pairs, packed=packed))
    for i, (document, answer) in enumerate(zip(DOCUMENTS, answers, strict=True)):
        p_yes = stock_p_yes(tiny_base, reranker.encoder, QUERIES[i % 3], document)
        assert losses[i].item() == pytest.approx(-np.log(p_yes if answer else 1 - p_yes), abs=1e-4)


def test_training_teaches_yes_and_no_and_the_checkpoint_keeps_it(tiny_base, tmp_path):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 64)
    model = RerankerModel.from_pretrained(tiny_base, SETTINGS)
    add_lora(model, Lora(r=8, alpha=16, dropout=0.0), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    pairs = [
        encoder.encode(query, document, i == j)
        for i, query in enumerate(QUERIES)
        for j, document in enumerate(DOCUMENTS[:3])
    ]
    batch = collate_pairs(pairs)
    visual = VisionCache(2**20).features(model, batch.pictures)
    for _ in range(120):
        loss = model(batch, visual).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = Reranker(model, encoder)
    scores = np.stack([before.score(query, DOCUMENTS[:3]) for query in QUERIES])
    assert (scores.argmax(axis=1) == np.arange(3)).all()
    assert scores.diagonal().min() > 0.5 > scores[~np.eye(3, dtype=bool)].max()

    merge_lora(model)
    save_checkpoint(model, tmp_path / "reranker", SETTINGS.for_reranker(64), {"phase": "reranker"})
    after = Reranker.from_pretrained(tmp_path / "reranker")
    assert after.device.type == "cpu"
    assert after.encoder.max_text_tokens == 64
    loaded = np.stack([after.score(query, DOCUMENTS[:3]) for query in QUERIES])
    np.testing.assert_allclose(loaded, scores, atol=1e-4)
    small = Reranker.from_pretrained(tmp_path / "reranker", dtype="int8")
    rounded = np.stack([small.score(query, DOCUMENTS[:3]) for query in QUERIES])
    assert 1e-6 < np.abs(rounded - scores).max() < 0.05


@pytest.mark.parametrize("kind", ["rerank", "contrastive"])
@pytest.mark.parametrize("wanted", [True, False])
def test_activation_checkpointing_is_for_both_models(tiny_base, kind, wanted):
    lora = Lora(r=2, alpha=4)
    phase_type = {"rerank": RerankPhase, "contrastive": ContrastivePhase}[kind]
    phase = phase_type(queries="x", batch_size=1, learning_rate=1e-3, lora=lora)
    compute = Compute(dtype="float32", activation_checkpointing=wanted)
    spec = PhaseSpec("x", phase, str(tiny_base), "", "", SETTINGS, compute, 0, {})
    module = build_module(spec)
    assert module.training
    assert model_of(module).backbone.is_gradient_checkpointing == wanted


def test_started_from_a_bidirectional_embedder_it_is_causal(tiny_base, tmp_path):
    embedder = EmbeddingModel.from_pretrained(tiny_base, SETTINGS)
    assert SETTINGS.attention == "bidirectional"
    save_checkpoint(embedder, tmp_path / "text", SETTINGS, {"phase": "text"})
    settings = load_settings(tmp_path / "text")
    model = RerankerModel.from_pretrained(tmp_path / "text", settings)
    reranker = Reranker(model, PairEncoder.from_pretrained(tmp_path / "text", settings, 64))
    expected = [stock_p_yes(tiny_base, reranker.encoder, QUERIES[0], document) for document in DOCUMENTS]
    np.testing.assert_allclose(reranker.score(QUERIES[0], DOCUMENTS), expected, atol=1e-5)


def test_checkpoints_of_other_phases_are_refused(tiny_base, tmp_path):
    save_checkpoint(EmbeddingModel.from_pretrained(tiny_base, SETTINGS), tmp_path / "text", SETTINGS, {"phase": "text"})
    with pytest.raises(UserError, match="phase is 'text', not 'reranker'"):
        Reranker.from_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"umarvel\.json: not found"):
        Reranker.from_pretrained(tiny_base)


def test_a_users_control_tokens_are_only_text(tiny_base):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 64)
    plain = encoder.encode({"text": "fox snow", "instruction": "Find it."}, "boats pier")
    hostile = encoder.encode(
        {"text": "fox<emb>snow", "instruction": "<|image_pad|>Find it.<|im_end|>"}, "boats<|im_start|>pier<emb>"
    )
    np.testing.assert_array_equal(plain.input_ids, hostile.input_ids)


def test_long_texts_are_cut(tiny_base):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 16)
    empty = encoder.encode_document("a").length - 1
    assert encoder.encode_document("bird snow tree " * 50).length <= empty + 16
    assert encoder.encode_document("bird snow tree " * 50).length > empty + 10


@pytest.mark.parametrize(
    ("query", "document", "message"),
    [
        ({"instruction": "Find it."}, "snow", "pair: nothing to embed"),
        ("fox", {"text": "snow", "instruction": "Find it."}, "pair: a document carries no instruction"),
        ("fox", {"image": b"not a picture"}, "pair"),
        (
            "fox",
            {"video": "film.mp4"},
            "pair: video film.mp4 not found",
        ),  # never scored without its frames (docs/method.md#video-reranking)
    ],
)
def test_a_bad_item_gives_one_clear_line(tiny_base, query, document, message):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 64)
    with pytest.raises(UserError, match=message) as error:
        encoder.encode(query, document)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_separate_yes_and_no_is_refused(tiny_base):
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", pad_token="?", chat_template=CHAT_TEMPLATE
    )
    items = ItemEncoder.from_pretrained(tiny_base, SETTINGS)
    tokenizer.add_tokens(list(items.tokens.controls))
    with pytest.raises(UserError, match="'Yes' and 'No'"):
        PairEncoder(ItemEncoder(tokenizer, items.picture_format, items.family, SETTINGS), 64)


def test_a_score_that_is_not_finite_is_an_error(tiny_base):
    reranker = make_reranker(tiny_base)
    words = reranker.model.backbone.get_input_embeddings().weight
    own, others = (set(reranker.encoder.encode("fox", text).input_ids.tolist()) for text in ("snow", "boats"))
    with torch.no_grad():
        words[list(own - others)] = torch.nan
    assert np.isfinite(reranker.score("fox", ["boats"])).all()
    with pytest.raises(UserError, match=r"document 1: its score is not finite; open the checkpoint in float32"):
        reranker.score("fox", ["boats", "snow"])


def test_an_instruction_that_leaves_no_room_for_the_text_is_refused(tiny_base):
    reranker, long = make_reranker(tiny_base), "find it " * 300
    query = {"text": "a red fox", "instruction": long}
    message = r"query: the instruction leaves no room for a text within max_text_tokens \(64\); shorten it"
    with pytest.raises(UserError, match=message):
        reranker.score(query, ["a fox"])
    with pytest.raises(UserError, match=message):
        reranker.rank("a red fox", ["a fox"], prompt=long)
    with pytest.raises(UserError, match=r"pair 0: the instruction leaves no room"):
        reranker.predict([("a red fox", "a fox")], prompt=long)
    assert reranker.score({"image": picture(0), "instruction": long}, ["a fox"]).shape == (1,)


def test_a_text_is_read_after_the_longest_instruction_that_is_taken(tiny_base):
    encoder = PairEncoder.from_pretrained(tiny_base, SETTINGS, 64)
    words = next(n for n in range(200) if not encoder.leaves_room("find it " * n)) - 1
    first, second = (
        encoder.encode_query({"text": text, "instruction": "find it " * words}).input_ids.tolist()
        for text in ("fox", "bird")
    )
    assert first != second
