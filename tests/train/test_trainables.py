"""Language model, projector and tower: ranks, ZeRO and the gradient cache change nothing, for every family."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from tests.support.exactness import BOUNDS, SETTINGS, batches, spawn
from tests.support.tiny import make_tiny_base
from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.batch import collate
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora, save_adapter
from umarvel_ray.model.losses import info_nce
from umarvel_ray.model.trainable import make_trainable
from umarvel_ray.recipe import Compute, ContrastivePhase, Lora
from umarvel_ray.train.build import build_module, save_merged
from umarvel_ray.train.embedding_step import Passes, TemperedEmbedder, embedding_step
from umarvel_ray.train.engine import capture, learning_rate, load_trainable, make_engine, restore, start_step, take_step
from umarvel_ray.train.phases import PhaseSpec

pytestmark = pytest.mark.timeout(1200)
STEPS = 2
PICTURES_FIRST = [0, 2, 4, 1, 3, 5]
RATES = {"projector": 3e-3, "vision": 2e-4, "temperature": 5e-3}
LORA = Lora(r=4, alpha=8, dropout=0.0)
# Language model, tower, learning rates.
SETS = {
    "language": ("full", "frozen", {}),
    "projector": ("lora", "projector", {"projector": 3e-3}),
    "all": ("full", "full", RATES),
}
CASES = [
    {"trained": "all", "zero": 0, "budget": 200},
    {"trained": "all", "zero": 1, "cached": False},
    {"trained": "all", "zero": 2, "budget": 200},
    {"trained": "all", "zero": 3, "budget": 200},
    {"trained": "language", "zero": 1},
    {"trained": "projector", "zero": 1, "budget": 200},
]
OTHERS = {"qwen2_5_vl": {"trained": "all", "zero": 1, "budget": 200}, "qwen3_vl": {"trained": "all", "zero": 3}}
HALF = {"trained": "all", "zero": 1, "stop": 1}


def phase_of(trained: str) -> ContrastivePhase:
    language_model, vision, rates = SETS[trained]
    return ContrastivePhase(
        queries="x", batch_size=6, learning_rate=1e-3, warmup_ratio=0.0, clip_norm=0.5, weight_decay=0.1, adam_eps=1e-4,
        language_model=language_model, vision=vision, learning_rates=rates, lora=LORA,
    )  # fmt: skip


def build(base: Path, phase: ContrastivePhase) -> TemperedEmbedder:
    model = EmbeddingModel.from_pretrained(base, SETTINGS, torch.float32, temperature=0.07)
    make_trainable(model, phase, seed=3)
    return TemperedEmbedder(model, BOUNDS).train()


def part(name: str) -> str | None:
    """The part a parameter belongs to by its name in transformers; None for the token tables."""
    if "visual." in name:
        return "projector" if "visual.merger" in name or "deepstack_merger" in name else "vision"
    if "embed_tokens" in name or "lm_head" in name:
        return None
    return "temperature" if "temperature" in name else "language"


def plain_run(base: Path, trained: str) -> dict:
    """Ground truth: one process, one graph over single items, torch's AdamW with a group for every parameter."""
    language_model, vision, rates = SETS[trained]
    module = build(base, phase_of(trained)).eval()
    model = module.embedder
    chosen = {"temperature", "language"} | {"frozen": set(), "projector": {"projector"}, "full": {*RATES}}[vision]
    parameters = {
        n: p
        for n, p in module.named_parameters()
        if ("lora_" in n or part(n) in chosen - ({"language"} if language_model == "lora" else set()))
    }
    module.requires_grad_(False)
    for p in parameters.values():
        p.requires_grad_(True)
    peaks = {n: rates.get(part(n), 1e-3) for n in parameters}
    decays = {n: not n.endswith("bias") and not any(word in n for word in ("norm", "ln_q", "temp")) for n in parameters}
    groups = [{"params": [p], "weight_decay": 0.1 * decays[n]} for n, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-4)
    losses = []
    for number, (queries, documents, targets, relevant) in enumerate(batches(base, apart=False)[:STEPS]):
        q = torch.cat([model(collate([item])) for item in queries])
        d = torch.cat([model(collate([item])) for item in documents])
        similarity = (q @ d.T) / model.log_temperature.exp()
        loss = 0.0
        for i, j in enumerate(targets.tolist()):
            others = [k for k in range(9) if not relevant[i, k]]
            loss = loss - similarity[i, j] + torch.logsumexp(similarity[i, [j, *others]], dim=0)
        loss = loss / 6
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        for group, peak in zip(optimizer.param_groups, peaks.values(), strict=True):
            group["lr"] = peak * 0.5 * (1 + np.cos(np.pi * number / STEPS))
        optimizer.step()
        losses.append(loss.item())
    state = {f"param.{n}": p.detach() for n, p in parameters.items()}
    state |= {f"exp_avg.{n}": optimizer.state[p]["exp_avg"] for n, p in parameters.items()}
    return {"losses": losses, "state": state}


def _cases(rank: int, world: int, cases: list[dict], out: str) -> None:
    results = [_case(rank, world, **case) for case in cases]
    if rank == 0:
        torch.save(results, out)


def _case(rank, world, base, trained, zero, budget=400, cached=True, stop=STEPS, start=0, state=None) -> dict:
    phase = phase_of(trained)
    module = build(base, phase)
    if state:
        load_trainable(module, state)
    engine = make_engine(module, phase, Compute(zero_stage=zero, dtype="float32"))
    if state:
        restore(engine, state, start)
    losses = []
    for number, (queries, documents, targets, relevant) in enumerate(batches(base, apart=False)[:stop]):
        if number < start:
            continue
        # Pictures first, so that the second of two ranks has none.
        queries, targets, relevant = (
            [queries[i] for i in PICTURES_FIRST],
            targets[PICTURES_FIRST],
            relevant[PICTURES_FIRST],
        )

        def loss_of(q, d, tau, rows, targets=targets, relevant=relevant):
            return info_nce(q, d, targets, relevant, tau, rows)

        start_step(engine, learning_rate(phase, number, STEPS))
        query_rows, document_rows = (slice(rank * n // world, (rank + 1) * n // world) for n in (6, 9))
        passes = Passes(budget, cached)
        loss, _ = embedding_step(
            engine, queries[query_rows], documents[document_rows], loss_of, passes, lambda _: None, seed=number
        )
        take_step(engine)
        losses.append(loss)
    captured = capture(engine)
    engine.destroy()
    return {"losses": losses, "state": captured}


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {"qwen2_vl": tiny_base} | {family: make_tiny_base(folder / family, family=family) for family in OTHERS}


@pytest.fixture(scope="module")
def two_ranks(bases, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out.pt"
    cases = [{"base": bases["qwen2_vl"], **case} for case in [*CASES, HALF]]
    cases += [{"base": bases[family], **case} for family, case in OTHERS.items()]
    spawn(2, _cases, cases, str(out))
    results = iter(torch.load(out))
    return {
        "cases": [next(results) for _ in CASES],
        "half": next(results),
        "others": {family: next(results) for family in OTHERS},
    }


@pytest.fixture(scope="module")
def truth(bases):
    return {trained: plain_run(bases["qwen2_vl"], trained) for trained in SETS}


def assert_same(result: dict, truth: dict) -> None:
    assert result["losses"] == pytest.approx(truth["losses"][-len(result["losses"]) :], abs=1e-5)
    assert {n for n in result["state"] if "exp_avg_sq" not in n} == truth["state"].keys()
    for name, expected in truth["state"].items():
        torch.testing.assert_close(result["state"][name], expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_equal_plain_torch(number, two_ranks, truth):
    """Rank 1 has no pictures, so its tower takes part in reducing the gradients only thanks to blank pictures."""
    case = CASES[number]
    assert_same(two_ranks["cases"][number], truth[case["trained"]])


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_equal_plain_torch(family, bases, two_ranks):
    case = OTHERS[family]
    assert_same(two_ranks["others"][family], plain_run(bases[family], case["trained"]))


def test_one_rank_resumes_where_two_stopped(bases, two_ranks, truth, tmp_path):
    resumed = {**HALF, "base": bases["qwen2_vl"], "stop": STEPS, "start": 1, "state": two_ranks["half"]["state"]}
    whole = {"base": bases["qwen2_vl"], "trained": "all", "zero": 1}
    spawn(1, _cases, [whole, resumed], str(tmp_path / "out.pt"))
    for result in torch.load(tmp_path / "out.pt"):
        assert_same(result, truth["all"])


def test_adapters_start_from_ours_and_from_pefts(tiny_base, tmp_path):
    """Same vectors as a model adapted by PEFT itself, whether PEFT saved the adapter or we did."""
    encoder = ItemEncoder.from_pretrained(tiny_base, SETTINGS)
    batch = collate([encoder.encode(text, "query") for text in ("a red fox", "two boats")])
    torch.manual_seed(0)
    model = EmbeddingModel.from_pretrained(tiny_base, SETTINGS).eval()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model\..*\.(q|v)_proj", init_lora_weights=False)
    peft = get_peft_model(model.backbone, config)  # adapts model.backbone in place
    with torch.no_grad():
        expected = model(batch)
    peft.save_pretrained(tmp_path / "peft")
    for source, copy in (("peft", "ours"), ("ours", "again")):
        lora = Lora(r=4, alpha=8, dropout=0.0, init=str(tmp_path / source))
        own = EmbeddingModel.from_pretrained(tiny_base, SETTINGS).eval()
        add_lora(own, lora, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(own(batch), expected, atol=1e-6, rtol=0)
        save_adapter(own, lora, tmp_path / copy)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("rank", "made with r: 4, alpha: 8; set lora.r and lora.alpha to these"),
        ("variant", "made with use_dora, which is not supported"),
        ("config", "not a readable PEFT adapter"),
        ("names", "'base_model.model.elsewhere' fits no layer of this model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_a_one_line_error(change, line, tiny_base, tmp_path):
    model = EmbeddingModel.from_pretrained(tiny_base, SETTINGS)
    add_lora(model, LORA, seed=0)
    save_adapter(model, LORA, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    if change == "config":
        config.unlink()
    elif change == "names":
        save_file({"base_model.model.elsewhere": torch.zeros(4, 4)}, weights)
    elif change == "variant":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    lora = LORA.model_copy(update={"init": str(tmp_path), "r": 8 if change == "rank" else 4})
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*" + line):
        add_lora(EmbeddingModel.from_pretrained(tiny_base, SETTINGS), lora, seed=0)


def test_quantization_needs_bitsandbytes(tiny_base, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"qlora needs bitsandbytes; pip install 'umarvel-ray\[qlora\]'"):
        load_backbone(tiny_base, SETTINGS, quantized=True)


def spec_of(base: Path, folder: Path, phase: ContrastivePhase) -> PhaseSpec:
    return PhaseSpec(
        name="text", phase=phase, parent=str(base), output=str(folder / "checkpoints" / "text"), folder=str(folder),
        settings=SETTINGS, compute=Compute(dtype="float32"), seed=3, provenance={},
    )  # fmt: skip


@pytest.mark.parametrize(("language_model", "vision"), [("qlora", "frozen"), ("full", "projector")])
def test_the_checkpoint_is_the_parent_plus_what_was_trained(language_model, vision, tiny_base, tmp_path):
    """With qlora, too: the parent's full-precision weights plus B·A. Saving quantizes nothing, so no bitsandbytes."""
    phase = ContrastivePhase(
        queries="x", batch_size=2, learning_rate=1e-3, language_model=language_model, vision=vision, lora=LORA
    )
    spec = spec_of(tiny_base, tmp_path, phase)
    generator = torch.Generator().manual_seed(1)
    trained = {n: p for n, p in build_module(spec).named_parameters() if p.requires_grad}
    state = {f"param.{n}": torch.randn(p.shape, generator=generator) for n, p in trained.items()}
    save_merged(spec, state, {})
    paths = (tiny_base, Path(spec.output))
    base, saved = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in paths)
    assert (tmp_path / "checkpoints/adapters/text").exists() == (language_model == "qlora")
    changed = set()
    for name, value in base.items():
        prefix = "param.embedder.backbone." + name.removesuffix(".weight")
        if f"{prefix}.lora_A.default.weight" in state:
            value = value + 2 * state[f"{prefix}.lora_B.default.weight"] @ state[f"{prefix}.lora_A.default.weight"]
        value = state.get(f"param.embedder.backbone.{name}", value)
        torch.testing.assert_close(saved[name][: len(value)], value, atol=1e-6, rtol=1e-5)
        if not torch.equal(saved[name][: len(value)], base[name]):
            changed.add(part(name))
    assert changed == {"language"} | ({"projector"} if vision == "projector" else set())


def test_four_bit_weights_act_as_their_dequantized_values(tmp_path):
    """Only in the language model; adapters get the same gradients as in a plain model with the dequantized weights."""
    quantized = pytest.importorskip("bitsandbytes.functional")
    base = make_tiny_base(tmp_path, hidden=64)
    four, plain = (EmbeddingModel.from_pretrained(base, SETTINGS, quantized=bits) for bits in (True, False))
    layers = {name: layer for name, layer in four.backbone.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert len(layers) == 2 * 7
    assert all("language_model" in name for name in layers)
    for name, layer in layers.items():
        value = quantized.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        weight = plain.backbone.get_submodule(name).weight.data
        assert 0.01 < (value - weight).abs().mean() / weight.abs().mean() < 0.15
        weight.copy_(value)
    queries, documents, *_ = batches(base, apart=False)[0]
    batch, grads = collate([*queries, *documents]), []
    for model in (four, plain):
        add_lora(model, LORA, seed=0)
        model(batch)[:, 0].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)
    assert all(grad.abs().sum() > 0 for grad in grads[0].values())
