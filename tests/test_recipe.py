"""Recipes: the shipped ones resolve to the paper's numbers, and each mistake is one line that names the key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import SHIPPED, Phase, dump_recipe, load_recipe
from umarvel_ray.runs import Run, read_run_recipe
from umarvel_ray.train.engine import learning_rate

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def keys_of(tree: dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def test_the_papers_recipes_are_shipped():
    assert {"demo", *PAPER} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_reads_back_as_itself(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(str(copy)) == recipe


# Per phase: queries in the global batch (per device × devices), epochs, learning rate, LoRA's r and α, two-way loss, τ
# learned. From docs/method.md#hyperparameters; numbers that it does not give for a backbone are Qwen2-VL-7B's.
QWEN2VL_7B = {
    "stage1.text": (72 * 8, 2, 2e-4, 64, 128, False, False),
    "stage1.image_text": (60 * 16, 1, 1e-4, 128, 256, True, False),
    "stage1.instruction": (60 * 64, 1, 4e-4, 128, 256, False, True),
    "stage2.train": (17 * 64, 1, 1.5e-5, 128, 256, False, True),
    "reranker.train": (2 * 64 * 4, 1, 2e-5, 128, 256, None, None),
    "stage3.train": (2 * 64, 1, 1e-5, 128, 256, None, True),
}
QWEN25VL_7B = QWEN2VL_7B | {
    "stage1.text": (120 * 8, 2, 2e-4, 32, 64, False, False),
    "stage1.image_text": (60 * 16, 2, 6e-4, 32, 64, True, False),
    "stage1.instruction": (60 * 64, 1, 4e-4, 32, 128, False, True),
}
QWEN3VL_4B = QWEN2VL_7B | {
    "stage1.text": (216 * 8, 2, 2e-4, 64, 128, True, False),
    "stage1.image_text": (180 * 16, 1, 1e-4, 128, 256, True, False),
    "stage1.instruction": (80 * 64, 1, 4e-4, 128, 256, False, True),
    "stage2.train": (20 * 64, 1, 1.5e-5, 128, 256, False, True),
    "stage3.train": (3 * 64, 1, 1e-5, 128, 256, None, True),
}
QWEN3VL_8B = QWEN3VL_4B | {
    "stage1.text": (72 * 8, 2, 2e-4, 64, 128, True, False),
    "stage1.image_text": (60 * 16, 1, 1e-4, 128, 256, True, False),
    "stage1.instruction": (50 * 64, 1, 2e-4, 32, 64, False, True),
    "stage2.train": (12 * 64, 1, 1.5e-5, 128, 256, False, True),
    "stage3.train": (2 * 64, 1, 1e-5, 128, 256, None, True),
}
PAPER = {
    "qwen2vl-7b": QWEN2VL_7B,
    "qwen2vl-2b": QWEN2VL_7B,
    "qwen2.5vl-7b": QWEN25VL_7B,
    "qwen3vl-4b": QWEN3VL_4B,
    "qwen3vl-8b": QWEN3VL_8B,
}
EVERYWHERE = {
    "seed": 42,
    "compute.zero_stage": 1,
    "compute.dtype": "bfloat16",
    "compute.activation_checkpointing": True,
    "model.attention": "bidirectional",
    "model.pooling": "mean",
    "model.instruction_mask": True,
    "model.compression_prompt": False,
    "model.min_pixels": 4 * 28 * 28,
    "model.max_text_tokens": 480,
    "stage1.instruction.temperature.init": 0.05,
    "stage2.train.temperature.init": 0.05,
    "stage2.train.hard_negatives": 5,
    "stage2.mining.depth": 100,
    "stage2.mining.pool": "global",
    "stage2.mining.max_similarity": 0.7,
    "reranker.init": "base",
    "reranker.negatives_top": 50,
    "reranker.max_text_tokens": 256,
    "stage3.sample": 0.1,
    "stage3.top_k": 50,
    "stage3.alpha": 0.5,
    "stage3.train.kind": "distill",
    "stage3.train.temperature.init": 0.05,
    "evaluate.k": 5,
    "evaluate.k_of": {"fashion200k_task0": 10, "fashion200k_task3": 10, "fashioniq_task7": 10},
    "evaluate.rerank_top": 50,
}


def value_at(tree: dict, key: str):
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    tree = load_recipe(name).model_dump()
    for key, expected in PAPER[name].items():
        phase = value_at(tree, key)
        learned = phase.get("temperature", {}).get("learn")
        lora = phase["lora"]
        found = (phase["batch_size"], phase["epochs"], phase["learning_rate"], lora["r"], lora["alpha"])
        assert (*found, phase.get("two_way"), learned) == expected, key
        schedule = (phase["max_steps"], phase["weight_decay"], phase["warmup_ratio"], phase["clip_norm"])
        assert schedule == (None, 0, 0.03, 1)
        assert lora["dropout"] == 0.05
    for key, expected in EVERYWHERE.items():
        assert value_at(tree, key) == expected, key
    assert tree["model"]["max_pixels"] == (224 * 224 if "qwen3" in name else 300 * 28 * 28)


def test_overrides_win_over_the_file_which_wins_over_its_parent(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: demo\nname: child\nseed: 7\nstage1: {text: {batch_size: 32}}\n")
    recipe = load_recipe(str(child), ["stage1.text.max_steps=5", "evaluate.k_of={flags_task4: 1}"])
    parent = load_recipe("demo")
    assert (recipe.seed, recipe.stage1.text.batch_size, recipe.stage1.text.max_steps) == (7, 32, 5)
    assert recipe.stage1.text.learning_rate == parent.stage1.text.learning_rate
    assert recipe.evaluate.k_of == {"flags_task4": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.text.batchsize=3", "stage1.text.batchsize"),
        ("shade=red", "'shade'"),
        ("stage1.text.batch_size=many", "stage1.text.batch_size"),
        ("stage1.text.batch_size=0", "stage1.text.batch_size"),
        ("model.pooling=max", "model.pooling"),
        ("compute.zero_stage=4", "compute.zero_stage"),
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
        ("stage3.train.kind=both", "stage3.train: "),
        ("stage3.train.batch_size=0", "stage3.train.batch_size: "),
        ("stage3.train.rate=1", "'stage3.train.rate'"),
        ("stage3.train.vision=some", "stage3.train.vision: "),
        ("stage3.train.lora.init={}", "stage3.train.lora.init: "),
        ("seed={a: 1}", "seed: Input should be a valid integer (got {'a': 1})"),
        ("cluster.workers=80", "recipe demo: stage2.train.batch_size is 64, too small for 80 workers; lower"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,", "line"),
        ("- 1\n- 2\n", "mapping"),
        ("extends: nowhere\n", "nowhere"),
        ("name: x\n", "base"),
        ("extends: broken.yaml\n", "broken.yaml: it extends itself"),
        ("extends: [demo, demo]\n", "extends is ['demo', 'demo']"),
        ("extends: 3\n", "extends is 3"),
        (f"extends: {'a' * 5000}\n", "no recipe 'aaa"),
        (b"extends: demo\nname: caf\xe9\n", "byte 24 is not UTF-8; save the file as UTF-8"),
        ("extends: demo\nname: é\n".encode("utf-16"), "byte 1 is not UTF-8"),
        ("extends: demo\nseed: 1\nseed: 2\n", "line 2: not valid YAML (key 'seed' occurs twice)"),
        ("extends: demo\nstage1: {text: {epochs: 1, epochs: 2}}\n", "key 'epochs' occurs twice"),
        ("extends: demo\nname: " + "[" * 3000, "nested too deeply"),
        ("extends: demo\nname: " + "[" * 60 + "]" * 60, "name: Input should be a valid string"),
        ("extends: demo\nname: 2024-13-45\n", "month must be in 1..12"),
        ("extends: demo\nname: ''\n", "name: is empty"),
        ('extends: demo\nname: "a\\0b"\n', "cannot be printed"),
        ('extends: demo\ndata: {root: "a\\nb"}\n', "data.root: is empty or has"),
        ("extends: demo\nstage1: {text: {epochs: .inf}}\n", "stage1.text.epochs: Input should be a finite number"),
        ("extends: demo\nstage1: {text: {learning_rate: .inf}}\n", "finite"),
        ("extends: demo\nstage2: {mining: {max_similarity: .nan}}\n", "max_similarity"),
        ("extends: demo\nevaluate: {rerank_weight: .inf}\n", "rerank_weight"),
        ("extends: demo\ncluster: {cpus_per_worker: .inf}\n", "cpus_per_worker"),
        ("extends: demo\nseed: -1\n", "seed: Input should be greater"),
        (f"extends: demo\nseed: {2**63}\n", "seed: Input should be less"),
        ("extends: demo\noutput: 'runs/{x}'\n", "output: {x} is not replaced by anything"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(text, message, tmp_path, monkeypatch):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_recipes_that_extend_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_recipe("a.yaml")


FINITE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(st.sampled_from(sorted(keys_of(load_recipe("demo").model_dump()))), FINITE)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, value):
    try:
        recipe = load_recipe("demo", [f"{key}={yaml.safe_dump(value)}"])
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert recipe.run_dir
        assert load_recipe("demo", [f"{key}={yaml.safe_dump(value)}"]) == recipe


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe("demo", ["data.root=~/data", "output=~/runs/{name}", "base=~/base"])
    assert (recipe.data.root, str(recipe.run_dir), recipe.base) == (
        "/home/me/data",
        "/home/me/runs/demo",
        "/home/me/base",
    )


@pytest.mark.parametrize(("scaling", "rate"), [("none", 1e-4), ("sqrt", 2.828427e-4), ("linear", 8e-4)])
def test_the_learning_rate_scales_with_the_batch(scaling, rate):
    """Paper Table 4: 480 queries at 1e-4; eight times as many at 2.8e-4 by the square root."""
    phase = Phase(queries="train", batch_size=3840, learning_rate=1e-4, lr_scaling=scaling, reference_batch=480)
    assert [learning_rate(phase, step, 100) for step in (0, 1, 2)] == pytest.approx([rate / 3, rate * 2 / 3, rate])
    assert learning_rate(phase, 3 + 97 // 2, 100) == pytest.approx(rate / 2, rel=0.03)


def test_a_folder_made_before_a_key_existed_is_the_same_run(tmp_path):
    recipe = load_recipe("demo", [f"output={tmp_path}"])
    tree = recipe.model_dump(mode="json")
    del tree["stage3"]["alpha"], tree["stage1"]["text"]["lr_scaling"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert Run.open(recipe).dir == tmp_path
    with pytest.raises(UserError, match=r"stage3\.train\.kind"):
        Run.open(load_recipe("demo", [f"output={tmp_path}", "stage3.train.kind=contrastive"]))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- 1\n", b""])
def test_a_runs_damaged_recipe_is_one_line(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    for open_ in (lambda: Run.open(load_recipe("demo", [f"output={tmp_path}"])), lambda: read_run_recipe(tmp_path)):
        with pytest.raises(UserError, match=r"recipe\.yaml"):
            open_()


def test_phases_train_adapters_on_the_language_model_by_default():
    for name in NAMES:
        recipe = load_recipe(name)
        for phase in (recipe.stage1.text, recipe.stage1.instruction, recipe.stage2.train, recipe.reranker.train):
            assert (phase.language_model, phase.vision, phase.lora.init) == ("lora", "frozen", None)
            assert set(phase.learning_rates.model_dump().values()) == {None}
        assert recipe.stage2.train.matryoshka == ()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["stage2.train.learning_rates.projector=1e-4"], "learning_rates.projector needs vision: projector or full"),
        (
            ["stage2.train.vision=projector", "stage2.train.learning_rates.vision=1e-4"],
            "learning_rates.vision needs vision: full",
        ),
        (["stage3.train.lora.init=x", "stage3.train.language_model=full"], "lora.init needs language_model: lora"),
        (["stage2.train.language_model=qlora", "compute.zero_stage=3"], "stage2.train: ZeRO-3 cannot shard 4-bit"),
        (["stage1.text.learning_rates.temperature=1e-4"], "stage1.text.learning_rates.temperature needs a temperature"),
        (["reranker.train.learning_rates.temperature=1e-4"], "reranker.train.learning_rates.temperature needs"),
        (["stage2.train.matryoshka=[0]"], "stage2.train.matryoshka.0"),
        (["stage1.text.hard_negatives=2"], "stage1.text comes before mining: hard_negatives must be 0"),
        (["stage1.instruction.batch_size=1"], "stage1.instruction.batch_size is 1, too small for 2 workers"),
        (["reranker.min_rank=300"], "reranker.min_rank and reranker.train.negatives need 301 ranks, more than"),
        (["reranker.negatives_top=1", "reranker.train.negatives=7"], "negatives exceeds reranker.negatives_top"),
        (["stage2.mining.min_rank=48"], "stage2.mining.min_rank and stage2.train.hard_negatives need 51 ranks"),
        (["stage2.mining.margin=.nan"], "stage2.mining.margin"),
        (["stage3.sample=0"], "stage3.sample"),
    ],
)
def test_settings_that_conflict_are_one_line(overrides, line):
    with pytest.raises(UserError, match=line):
        load_recipe("demo", overrides)


def test_settings_that_fit_together_are_accepted():
    changes = [
        "vision=full",
        "learning_rates={projector: 1e-4, vision: 1e-5, temperature: 1e-3}",
        "matryoshka=[64, 32]",
    ]
    recipe = load_recipe("demo", [f"stage2.train.{change}" for change in changes] + ["compute.zero_stage=3"])
    assert recipe.stage2.train.learning_rates.vision == 1e-5
    assert recipe.stage2.train.matryoshka == (64, 32)
    assert load_recipe("demo", ["stage3.train.learning_rates.temperature=1e-3"]).stage3.train.temperature.learn
