"""The model card, parsed as the Hugging Face hub parses it."""

import ast
import re

from huggingface_hub import ModelCard

from umarvel_ray.model.card import model_card
from umarvel_ray.recipe import ModelSettings, load_recipe

SCORES = {"caption": 0.25, "average": 0.5}
RECORD = {
    "settings": ModelSettings().model_dump(mode="json"),
    "phase": "distillation",
    "parent": "/home/someone/runs/x/checkpoints/hard-negatives",
    "recipe": load_recipe("qwen2vl-7b", ["seed=7"]).model_dump(mode="json"),
    "data": "/data/M-BEIR",
    "metrics": {"step": 7, "loss": 0.134874},
    "versions": {"torch": "2.13.0"},
    "license": "apache-2.0",
    "evaluation": {
        "k": {"caption": 5},
        "chance": {"local": SCORES, "global": SCORES},
        "local": {"caption": 0.75, "average": 1.0},
    },
}


def with_settings(**changes) -> str:
    return model_card({"settings": ModelSettings(**changes).model_dump(mode="json")})


def test_the_hub_can_read_its_front_matter():
    data = ModelCard(model_card(RECORD)).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert (data.license, data.base_model) == ("apache-2.0", "Qwen/Qwen2-VL-7B-Instruct")
    assert "sentence-transformers" in data.tags


def test_the_card_states_what_the_record_holds():
    text = model_card(RECORD)
    for part in ("`distillation`", "parent: `hard-negatives`", "data: `M-BEIR`", "seed: `7`", "loss | 0.1349", "torch"):
        assert part in text
    assert "| caption | 5 | 0.75 | 0.25 |" in text
    assert "/home" not in text  # no paths of the machine it was trained on


def test_unknown_facts_are_left_out():
    text = with_settings()
    data = ModelCard(text).data
    assert data.license is None
    assert data.base_model is None
    assert not re.search(r"None|Evaluation|training step", text)


def test_settings_in_words():
    assert "the mean over all tokens except the instruction's" in with_settings()
    assert "the mean over all tokens, scaled" in with_settings(instruction_mask=False)
    assert "the hidden state before `<emb>`, scaled" in with_settings(pooling="last")
    text = with_settings(attention="causal", positions="sequential", deepstack=False, compression_prompt=True)
    for part in ("attention: causal", "positions: sequential", "DeepStack: off", "compression prompt"):
        assert part in text


def test_a_rerankers_card_shows_how_to_use_a_reranker():
    text = model_card({"settings": ModelSettings().model_dump(mode="json"), "phase": "reranker"})
    assert "Reranker.from_pretrained" in text
    assert "Embedder" not in text
    assert ModelCard(text).data.pipeline_tag == "text-ranking"


def test_the_code_examples_are_valid_python():
    for record in (RECORD, RECORD | {"phase": "reranker"}):
        for code in re.findall(r"```python\n(.*?)```", model_card(record), re.DOTALL):
            ast.parse(code)
