"""Estimates of a dry run against transformers' modules, torch's counters and DeepSpeed's tensors."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.support.exactness import spawn
from tests.support.zero_memory import weigh
from umarvel_ray import demo
from umarvel_ray.data.dataset import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.estimate.flops import text_backward, text_forward, vision_forward
from umarvel_ray.estimate.load import loads
from umarvel_ray.estimate.memory import (
    BUCKET,
    bucket_bytes,
    loss_bytes,
    optimizer_bytes,
    text_activations,
    trained,
    trained_tower_activations,
)
from umarvel_ray.estimate.shape import PUBLISHED, read_shape, shape_of
from umarvel_ray.estimate.table import estimate
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model.lora import TARGETS
from umarvel_ray.recipe import SHIPPED, Phase, load_recipe

MODELS = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}
TEXT = {
    "vocab_size": 70, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
}  # fmt: skip
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 48, "mlp_ratio": 3, "num_heads": 3, "hidden_size": 96, "patch_size": 8},
    "qwen2_5_vl": {
        "depth": 3, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "out_hidden_size": 96, "patch_size": 8,
        "window_size": 32, "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3, "hidden_size": 48, "intermediate_size": 80, "num_heads": 3, "out_hidden_size": 96, "patch_size": 8,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip
FAMILIES = sorted(MODELS)
BILLIONS = {"2-VL-2B": 2.21, "2-VL-7B": 8.29, "2.5-VL-7B": 8.29, "3-VL-4B": 4.44, "3-VL-8B": 8.77}  # the model cards


def tiny(form: str, tied: bool = True) -> dict:
    text = TEXT | ({"head_dim": 32} if form == "qwen3_vl" else {})
    return {"model_type": form, "text_config": text, "vision_config": VISION[form], "tie_word_embeddings": tied}


def build(config: dict, device: str = "cpu", attention: str = "sdpa"):
    settings = transformers.AutoConfig.for_model(**config, attn_implementation=attention)
    settings.text_config.is_causal = False
    with torch.device(device):
        return MODELS[config["model_type"]](settings)


def adapted(form: str, dtype: torch.dtype, dropout: float, rank: int = 8, attention: str = "sdpa"):
    model = build(tiny(form), attention=attention).to(dtype).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_dropout=dropout, target_modules=TARGETS), model)
    for p in model.parameters():
        if p.requires_grad:
            p.data, p.grad = p.data.to(dtype), torch.zeros_like(p, dtype=dtype)
    return model.train()


def run_text(model, rows: int, length: int, grad: bool = False) -> torch.Tensor:
    """Last hidden states of `rows` items of `length` tokens; one item is padded."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -1] = 0
    embeds = model.get_input_embeddings()(torch.randint(0, 70, (rows, length))).requires_grad_(grad)
    positions = torch.arange(length).expand(3, rows, length)
    run = model.model.language_model
    return run(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", yaml.safe_load(PUBLISHED.read_text()))
def test_the_known_bases_have_the_parameters_that_transformers_builds(name):
    shape, model = read_shape(name), build(yaml.safe_load(PUBLISHED.read_text())[name], "meta")
    model.tie_weights()
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision.parameters == sum(p.numel() for p in model.model.visual.parameters())
    (billions,) = (value for part, value in BILLIONS.items() if part in name)
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FAMILIES)
def test_other_shapes_are_counted_exactly(form, tied):
    model = build(tiny(form, tied), "meta")
    model.tie_weights()
    shape = shape_of(tiny(form, tied))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision.parameters == sum(p.numel() for p in model.model.visual.parameters())
    adapters = adapted(form, torch.float32, 0.0, rank=5)
    assert shape.text.lora_parameters(5) == sum(p.numel() for p in adapters.parameters() if p.requires_grad)


def test_the_demo_base_has_the_parameters_in_its_file():
    with safe_open(demo.BASE / "model.safetensors", "np") as file:
        sizes = [np.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert read_shape("builtin:demo").parameters == sum(sizes)


def test_a_config_with_text_keys_at_the_top_level_gives_the_same_shape():
    config = yaml.safe_load(PUBLISHED.read_text())["Qwen/Qwen2-VL-7B-Instruct"]
    flat = {"model_type": "qwen2_vl", **config["text_config"], "vision_config": {"hidden_size": 3584}}
    assert shape_of(flat) == shape_of(config)


@pytest.mark.parametrize("content", ["{", '{"model_type": "bert"}', '{"model_type": "qwen2_vl"}', "[]"])
def test_a_config_of_another_model_is_a_one_line_error(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        read_shape(str(tmp_path))


@pytest.mark.parametrize("form", FAMILIES)
def test_flops_are_what_torch_counts(form):
    text, tokens, length = shape_of(tiny(form)).text, 3 * 40, 40
    model = adapted(form, torch.float32, 0.0, attention="eager")
    adapters = 2 * text.lora_parameters(8) * tokens
    with FlopCounterMode(display=False) as forward:
        output = run_text(model, 3, length, grad=True)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert text_forward(text, tokens, length) + adapters == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert text_backward(text, tokens, length) + 2 * adapters == pytest.approx(backward.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("form", FAMILIES)
def test_the_towers_flops_are_what_torch_counts(form):
    vision, pictures, side = shape_of(tiny(form)).vision, 2, 16  # patches: a multiple of the window's
    tower = build(tiny(form), attention="eager").model.visual
    grids = torch.tensor([[1, side, side]] * pictures)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.randn(pictures * side * side, vision.values), grid_thw=grids)
    assert vision_forward(vision, pictures, side * side // 4) == pytest.approx(counter.get_total_flops(), rel=0.02)


def peak_bytes(model, rows: int, length: int) -> int:
    """Peak memory of a forward and backward pass, from torch's own record of its allocations.

    On one thread, because bfloat16 attention allocates a workspace per thread on processors that support it.
    """

    def step():
        run_text(model, rows, length).float().mean(1).square().sum().backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    torch.set_num_threads(threads)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("form", "dtype", "dropout"),
    [
        ("qwen2_vl", torch.float32, 0.0),
        ("qwen2_vl", torch.bfloat16, 0.1),
        ("qwen2_5_vl", torch.bfloat16, 0.0),
        ("qwen3_vl", torch.bfloat16, 0.0),
        ("qwen3_vl", torch.float32, 0.1),
    ],
)
def test_activations_are_what_torch_allocates(form, dtype, dropout, checkpointed):
    """Within a tenth: the first layer keeps a little less, and the last norm is freed before the peak."""
    model = adapted(form, dtype, dropout)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows, length = 4, 64
    text = shape_of(tiny(form)).text
    per_token = text_activations(text, 8, dropout > 0, dtype.itemsize, length, checkpointed)
    assert per_token * rows * length == pytest.approx(peak_bytes(model, rows, length), rel=0.1)


@pytest.mark.parametrize("form", FAMILIES)
def test_a_fully_trained_language_model_is_counted_as_torch_does(form):
    model, text, rows, length = build(tiny(form)).requires_grad_(False), shape_of(tiny(form)).text, 4, 64
    model.model.language_model.requires_grad_(True).embed_tokens.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    phase = Phase(queries="x", batch_size=1, learning_rate=1, language_model="full", vision="projector")
    projector = [p for n, p in model.model.visual.named_parameters() if "merger" in n]
    counted = [sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in projector)]
    assert list(trained(shape_of(tiny(form)), phase)) == counted
    per_token = text_activations(text, 0, False, 4, length, checkpointed=False, whole=True)
    assert per_token * rows * length == pytest.approx(peak_bytes(model.train(), rows, length), rel=0.1)


@pytest.mark.parametrize("form", FAMILIES)
def test_a_trained_tower_keeps_what_torch_keeps(form):
    vision, side = shape_of(tiny(form)).vision, 16
    tower = build(tiny(form)).model.visual
    patches, grids = torch.randn(2 * side * side, vision.values), torch.tensor([[1, side, side]] * 2)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counted_elsewhere = {t.untyped_storage().data_ptr() for t in (patches, *tower.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = tower(patches, grid_thw=grids)
    found = sum(size for place, size in kept.items() if place not in counted_elsewhere)
    expected = trained_tower_activations(vision, 4, checkpointed=False) * len(patches) / vision.merge**2
    assert expected == pytest.approx(found, rel=0.05)
    del output


@pytest.mark.slow
def test_adapters_and_optimizer_are_what_deepspeed_holds(tiny_base, tmp_path):
    spawn(2, weigh, str(tiny_base), str(tmp_path / "found"))
    for (zero, dtype), (trainable, frozen, tower, held) in torch.load(tmp_path / "found").items():
        width = getattr(torch, dtype).itemsize
        bucket = bucket_bytes(trainable, zero, gpu=True)
        if zero in (1, 3):  # ZeRO-2 has freed it by now
            assert max(held) == bucket
        weights = width * (tower + frozen / (2 if zero == 3 else 1))
        rest = sum(size for size in held if size != BUCKET * 4) - weights
        assert optimizer_bytes(trainable, zero, 2) == pytest.approx(rest, rel=0.06), (zero, dtype)


def test_step_counts_follow_from_the_papers_batches():
    """The published 1,332,790 rows give 347, 1,225 and 1,041 steps (docs/method.md#hyperparameters)."""
    recipe = load_recipe("qwen2vl-7b")
    found = {load.name: load for load in loads(recipe, read_shape(recipe.base))}
    assert [found[name].steps for name in ("stage1.instruction", "stage2.train", "stage3.train")] == [347, 1224, 1041]
    assert [found[name].queries for name in ("stage1.text", "stage1.instruction", "stage2.train")] == [9, 60, 17]
    assert found["stage2.train"].documents == 17 * 6
    assert found["reranker.train"].queries == 2 * 8
    assert found["stage3.train"].documents == 2 * 50


def test_rows_and_tokens_of_the_demo_are_close_to_its_data():
    recipe = load_recipe("demo", ["stage1.instruction.max_steps=null", "stage1.instruction.max_per_task=null"])
    found = {load.name: load for load in loads(recipe, read_shape("builtin:demo"))}
    encoder = ItemEncoder.from_pretrained(demo.BASE, recipe.model)
    documents = {row["id"]: row for row in pq.read_table(demo.DATA / "documents.parquet").to_pylist()}
    for name, phase in (("stage1.text", recipe.stage1.text), ("stage1.instruction", recipe.stage1.instruction)):
        queries = pq.read_table(demo.DATA / f"{phase.queries}.parquet")
        load = found[name]
        assert load.rows == queries.num_rows
        sample = queries.take(np.arange(0, queries.num_rows, queries.num_rows // 150)).to_pylist()
        positives = [documents[row["positive_ids"][0]] for row in sample]
        lengths = [
            np.mean([encoder.encode(item_of(row), "query").length for row in sample]),
            np.mean([encoder.encode(item_of(row), "document").length for row in positives]),
        ]
        assert [load.query_length, load.document_length] == pytest.approx(lengths, rel=0.3)
    assert found["stage1.instruction"].steps == found["stage1.instruction"].rows // 128


def test_an_epoch_takes_at_most_max_per_task_of_a_task():
    recipe = load_recipe("demo")
    tasks = pq.read_table(demo.DATA / "train.parquet", columns=["task"])["task"].to_pylist()
    expected = sum(min(tasks.count(task), 1500) for task in set(tasks))
    assert {load.name: load.rows for load in loads(recipe, read_shape("builtin:demo"))}[
        "stage1.instruction"
    ] == expected


def test_loss_memory_of_a_large_batch_is_its_embeddings_and_similarities():
    recipe = load_recipe("qwen2vl-7b")
    shape = read_shape(recipe.base)
    load = loads(recipe, shape)[2]
    embeddings = torch.empty(2, 2 * 60 * 64, 3584, device="meta")  # queries and documents, values and gradients
    block = torch.empty(3, 60, 3840, device="meta")
    assert loss_bytes(shape, load, recipe) == embeddings.nbytes + block.nbytes + 3840 * 3840


def test_memory_falls_with_zero_and_checkpointing():
    def activations_and_optimizer(*overrides: str) -> tuple[float, float, float]:
        lines = estimate(load_recipe("qwen2vl-7b", overrides)).splitlines()
        row = [line.split() for line in lines if line.startswith("stage1.instruction")][1]
        return float(row[1]), float(row[3]), float(row[5].replace(",", ""))

    stages = [activations_and_optimizer(f"compute.zero_stage={stage}") for stage in range(4)]
    assert all(later[1] <= earlier[1] for earlier, later in pairwise(stages))
    assert stages[3][0] < stages[2][0] / 3
    assert activations_and_optimizer("compute.activation_checkpointing=false")[2] > 8 * stages[1][2]


def test_memory_depends_on_what_trains():
    def row(*changes: str) -> list[float]:
        overrides = [f"stage1.instruction.{change}" for change in changes]
        lines = estimate(load_recipe("qwen2vl-7b", overrides)).splitlines()
        cells = [line.split() for line in lines if line.startswith("stage1.instruction")]
        return [float(cell.replace(",", "")) for cell in cells[1][1:]]

    adapters, four, whole, all_ = row(), row("language_model=qlora"), row("language_model=full"), row("vision=full")
    assert four[0] < adapters[0] / 2
    assert four[1:6] == adapters[1:6]
    assert whole[0] == pytest.approx(2 * 2 * 152064 * 3584 / 2**30, rel=0.02)  # two tables in bf16
    assert whole[2] > 6.5e9 * 4 / 2**30  # weights and gradients, partitioned or not
    assert all_[1] == 0
    assert all_[2] > adapters[2] + 675_759_104 * 4 / 2**30
    assert all_[4] > adapters[4]


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_is_estimated(name):
    text = estimate(load_recipe(name))
    assert "?" not in text
    assert "mining embeds" in text
    tables = [block.splitlines() for block in text.split("\n\n")[1:3]]
    for table in tables:
        assert [line.split()[0] for line in table[1:7]] == [
            "stage1.text", "stage1.image_text", "stage1.instruction", "stage2.train", "reranker.train", "stage3.train",
        ]  # fmt: skip
        assert len({len(line) for line in table[:7]}) == 1


def test_a_price_gives_the_cost_of_every_phase():
    assert "cost" not in estimate(load_recipe("qwen2vl-7b"))
    assert "cost" not in estimate(load_recipe("demo", ["cluster.gpu_hour_price=2"]))  # trains on CPUs
    table = estimate(load_recipe("qwen2vl-7b", ["cluster.gpu_hour_price=2.5"])).split("\n\n")[1].splitlines()
    rows = [line.split() for line in table[1:7]]
    costs = [float(row[-1].replace(",", "")) for row in rows]
    assert costs == [pytest.approx(float(row[-2]) * 64 * 2.5, abs=0.005 * 64 * 2.5 + 0.5) for row in rows]
    total = float(re.match(r"cost: ([\d,]+) for training, at 2.5 per hour of a GPU", table[-1])[1].replace(",", ""))
    assert total == pytest.approx(sum(costs), abs=3)


def test_an_unknown_base_or_table_is_reported():
    assert estimate(load_recipe("demo", ["base=/nowhere"])).startswith("No estimate: base /nowhere")
    text = estimate(load_recipe("demo", ["data.root=/nowhere", "stage1.text.max_steps=null"]))
    assert re.search(r"stage1.text +.* \? +unknown +\? ", text)


def test_a_phase_that_is_left_out_is_not_estimated():
    recipe = load_recipe("demo", ["stage1.text=null"])
    assert [load.name for load in loads(recipe, read_shape(recipe.base))][:2] == [
        "stage1.image_text",
        "stage1.instruction",
    ]
