"""Recipes: every shipped one resolves, the paper's numbers stand, and each mistake is one line that names the key."""

from __future__ import annotations

import pytest
import yaml

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import SHIPPED, Step, dump_recipe, load_recipe
from umarvel_ray.runs import Run
from umarvel_ray.train.engine import learning_rate

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def test_the_promised_recipes_are_shipped():
    assert {"demo", "qwen2vl-7b", "qwen2vl-2b", "qwen2.5vl-7b", "qwen3vl-4b"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_reads_back_as_itself(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(str(copy)) == recipe


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [  # paper/method.md, sections 0 and 2
        ("qwen2vl-7b", "stage1.text.batch_size", 576),
        ("qwen2vl-7b", "stage1.text.two_way", False),
        ("qwen2vl-7b", "stage1.text.temperature.learn", False),
        ("qwen2vl-7b", "stage1.image_text.batch_size", 960),
        ("qwen2vl-7b", "stage1.image_text.two_way", True),
        ("qwen2vl-7b", "stage1.image_text.learning_rate", 1e-4),
        ("qwen2vl-7b", "stage1.instruction.batch_size", 3840),
        ("qwen2vl-7b", "stage1.instruction.learning_rate", 4e-4),
        ("qwen2vl-7b", "stage1.instruction.temperature.init", 0.05),
        ("qwen2vl-7b", "stage2.train.batch_size", 1088),
        ("qwen2vl-7b", "stage2.train.hard_negatives", 5),
        ("qwen2vl-7b", "stage2.train.learning_rate", 1.5e-5),
        ("qwen2vl-7b", "stage2.mining.max_similarity", 0.7),
        ("qwen2vl-7b", "reranker.init", "base"),
        ("qwen2vl-7b", "reranker.train.batch_size", 512),
        ("qwen2vl-7b", "stage3.sample", 0.1),
        ("qwen2vl-7b", "stage3.top_k", 50),
        ("qwen2vl-7b", "stage3.train.batch_size", 128),
        ("qwen2vl-7b", "evaluate.k_of.fashioniq_task7", 10),
        ("qwen2vl-2b", "stage1.instruction.batch_size", 3840),
        ("qwen2vl-2b", "cluster.gpus_per_worker", 1),
        ("qwen2.5vl-7b", "stage1.instruction.lora.r", 32),
        ("qwen2.5vl-7b", "stage1.instruction.lora.dropout", 0.05),
        ("qwen3vl-4b", "stage1.instruction.batch_size", 5120),
        ("qwen3vl-4b", "stage1.text.two_way", True),
        ("qwen3vl-4b", "model.max_pixels", 224 * 224),
        ("qwen3vl-4b", "stage3.train.batch_size", 192),
    ],
)
def test_the_papers_numbers(name, key, value):
    node = load_recipe(name).model_dump()
    for part in key.split("."):
        node = node[part]
    assert node == value


def test_overrides_win_over_the_file_which_wins_over_its_parent(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: demo\nname: child\nseed: 7\nstage1: {text: {batch_size: 32}}\n")
    recipe = load_recipe(str(child), ["stage1.text.max_steps=5", "evaluate.k_of={flags_task4: 1}"])
    parent = load_recipe("demo")
    assert (recipe.seed, recipe.stage1.text.batch_size, recipe.stage1.text.max_steps) == (7, 32, 5)
    assert recipe.stage1.text.learning_rate == parent.stage1.text.learning_rate
    assert recipe.evaluate.k_of == {"flags_task4": 1}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stage1.text.batchsize=3", "stage1.text.batchsize"),
        ("colour=red", "colour"),
        ("stage1.text.batch_size=many", "stage1.text.batch_size"),
        ("stage1.text.batch_size=0", "stage1.text.batch_size"),
        ("model.pooling=max", "model.pooling"),
        ("engine.zero_stage=4", "engine.zero_stage"),
        ("stage2.train.hard_negatives=5000", "hard_negatives"),
        ("seed.x=1", "seed"),
        ("name.x=1", "'name' is a value"),
        ("seed", "key.sub=value"),
        ("model={a: [}", "not valid YAML"),
        ("stage1.text.lr_scaling=sqrt", "reference_batch"),
        ("stage1.text.in_batch_negatives=false", "hard_negatives"),
        ("stage2.train={in_batch_negatives: false, hard_negatives: 2, two_way: true}", "stage2.train"),
        ("stage1.instruction=null", "stage1.instruction"),
        ("stage2.mining.random_mix_of={a: 2}", "random_mix_of.a"),
        ("stage3.objective=both", "stage3.objective"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override, said):
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [1,", "line"), ("- 1\n- 2\n", "mapping"), ("extends: nowhere\n", "nowhere"), ("name: x\n", "base")],
)
def test_a_broken_file_is_one_line_that_names_it(text, said, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("scaling", "rate"), [("none", 1e-4), ("sqrt", 2.828427e-4), ("linear", 8e-4)])
def test_the_learning_rate_grows_with_the_batch(scaling, rate):
    """Paper Table 4: 480 queries at 1e-4; eight times as many at 2.8e-4 by the square root."""
    step = Step(queries="train", batch_size=3840, learning_rate=1e-4, lr_scaling=scaling, reference_batch=480)
    assert [learning_rate(step, number, 100) for number in (0, 1, 2)] == pytest.approx([rate / 3, rate * 2 / 3, rate])
    assert learning_rate(step, 3 + 97 // 2, 100) == pytest.approx(rate / 2, rel=0.03)


def test_a_folder_made_before_a_key_existed_is_the_same_run(tmp_path):
    recipe = load_recipe("demo", [f"output={tmp_path}"])
    tree = recipe.model_dump(mode="json")
    del tree["stage3"]["objective"], tree["stage1"]["text"]["lr_scaling"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert Run.open(recipe).dir == tmp_path
    with pytest.raises(UserError, match=r"stage3\.objective"):
        Run.open(load_recipe("demo", [f"output={tmp_path}", "stage3.objective=continue-hard"]))


def test_the_demo_file_has_no_key_twice():
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key twice in line {node.start_mark.line + 1}"
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for name in NAMES:
        yaml.load((SHIPPED / f"{name}.yaml").read_text(), Strict)
