"""The recipe: one typed tree for a whole run. Unknown keys and wrong types are rejected with the key's full path.

A recipe is a YAML file (or the name of one shipped in `umarvel_ray/recipes`) plus `a.b=c` overrides. It may build on
another with `extends: NAME`. `umarvel VERB RECIPE --dry-run` prints it resolved.
"""

from __future__ import annotations

import os
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from umarvel_ray.errors import UserError
from umarvel_ray.section import Section
from umarvel_ray.wording import Message, PairMessage, Preparation
from umarvel_ray.yaml_text import parse_yaml, read_yaml

SHIPPED = Path(__file__).parent / "recipes"

# The phases by name, which is also the name of their checkpoint, and the recipe section of each.
TEXT, IMAGE_TEXT, INSTRUCTION = STAGE1 = ("text", "image-text", "instruction")
HARD_NEGATIVES, RERANKER, DISTILLATION = "hard-negatives", "reranker", "distillation"
LADDER = (*STAGE1, HARD_NEGATIVES, DISTILLATION)  # the embedder's checkpoints, in order
KEYS = {
    TEXT: "stage1.text",
    IMAGE_TEXT: "stage1.image_text",
    INSTRUCTION: "stage1.instruction",
    HARD_NEGATIVES: "stage2.train",
    RERANKER: "reranker.train",
    DISTILLATION: "stage3.train",
}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
SEEDS = 2**63  # PyTorch takes no larger ones
SHOWN = 60  # characters of a wrong name or value in an error
SLOT = re.compile(r"\{\w*\}")


def _path(text: str) -> str:
    """`~` is the home folder."""
    if not text.isprintable() or not text.strip():
        raise ValueError("is empty or has characters that cannot be printed")
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(_path)]


class ModelSettings(Section):
    """Everything that changes an embedding; stored in each checkpoint, so that later jobs use the same settings."""

    attention: Literal["bidirectional", "causal"] = Field(
        default="bidirectional", description="which tokens of its item a token attends to: all, or those before it"
    )
    pooling: Literal["mean", "last", "end"] = Field(
        default="mean",
        description="mean: over all tokens' hidden states; last: the token that predicts <emb>, or the last one where "
        "<emb> was cut off; end: the very last token",
    )
    instruction_mask: bool = Field(default=True, description="leave the instruction's tokens out of the mean")
    compression_prompt: bool = Field(
        default=False, description="append 'Summarize above … in one word:' to each item's text"
    )
    generation_prompt: bool = Field(
        default=False, description="append the header of another assistant turn (docs/method.md#generation-prompt)"
    )
    positions: Literal["mrope", "sequential"] = Field(
        default="mrope", description="rotary positions: M-RoPE, or 0, 1, 2 … on all axes as in the reference"
    )
    deepstack: bool = Field(default=True, description="Qwen3-VL only: use the tower's intermediate features")
    min_pixels: PositiveInt = Field(default=4 * 28 * 28, description="smaller pictures are scaled up to this area")
    max_pixels: PositiveInt = Field(default=300 * 28 * 28, description="larger pictures are scaled down to this area")
    resize_twice: bool = Field(
        default=False,
        description="resize to multiples of 28 first, as the reference does (docs/method.md#picture-resizing)",
    )
    video_frames: PositiveInt = Field(default=12, description="frames taken from a video, evenly spaced")
    video_fps: Positive | None = Field(
        default=None,
        description="frames per second of a video that are taken instead, from 4 to video_frames",
    )
    max_video_pixels: PositiveInt = Field(
        default=12 * 128 * 28 * 28, description="pixels of all frames of a video together, after resizing"
    )
    max_text_tokens: PositiveInt = Field(
        default=480, description="longer texts are cut; instruction and text of a query count together"
    )
    # Absent from the settings' digest where they are null, so that older checkpoints keep theirs.
    message: Message | None = Field(default=None, description="an embedder's message written out")
    pair: PairMessage | None = Field(default=None, description="a reranker's message written out")
    preparation: Preparation | None = Field(default=None, description="of pictures, before they are resized")

    @property
    def longest(self) -> int | None:
        """The most tokens of a document, or of its text: None for no limit."""
        return self.message.max_document_tokens if self.message else self.max_text_tokens

    def for_reranker(self, max_text_tokens: int) -> ModelSettings:
        """These settings for a reranker: causal, with a text limit of its own."""
        return self.model_copy(update={"attention": "causal", "max_text_tokens": max_text_tokens})


class Data(Section):
    """Where documents, queries and pools are read from."""

    root: PathText = Field(description="a folder of Parquet tables, an M-BEIR folder, or 'builtin:demo'")
    format: Literal["parquet", "mbeir"] = Field(default="parquet", description="layout of `root` (docs/guide.md)")
    cache: PathText | None = Field(
        default=None,
        description="where tables are kept in a form that is read by row, shared by all nodes; null: the run folder",
    )


class Lora(Section):
    """Low-rank adapters on the language model's linear layers (docs/method.md#lora-targets)."""

    r: PositiveInt = Field(default=128, description="rank")
    alpha: PositiveInt = Field(default=256, description="scale: an adapter's output is multiplied by alpha / r")
    dropout: Fraction = Field(default=0.05, description="dropout probability on an adapter's input")
    init: PathText | None = Field(
        default=None, description="directory of a PEFT adapter to start from; null: a new one"
    )


class Rates(Section):
    """Peak learning rates of single parts; null: the phase's `learning_rate`. All follow its warmup and decay."""

    projector: Positive | None = Field(default=None, description="vision tower's projector (patch merger)")
    vision: Positive | None = Field(default=None, description="vision tower without its projector")
    temperature: Positive | None = Field(default=None, description="log τ, if it is learned")


class Temperature(Section):
    """Temperature τ of a loss; if learned, exp of a clamped log-parameter (docs/method.md#temperature-bounds)."""

    init: Positive | Literal["parent"] = Field(default=0.05, description="a value, or the parent checkpoint's")
    learn: bool = Field(default=False, description="train τ along with the weights")
    minimum: Positive = Field(default=0.01, description="lower bound of a learned τ")
    maximum: Positive = Field(default=1.0, description="upper bound of a learned τ")

    @model_validator(mode="after")
    def _starts_within_its_bounds(self) -> Temperature:
        if self.learn and self.init != "parent" and not self.minimum <= self.init <= self.maximum:
            raise ValueError(f"init {self.init} of a learned temperature is outside {self.minimum} to {self.maximum}")
        return self


class Phase(Section):
    """One training run: a query table, and AdamW with linear warmup and cosine decay. Subclasses define the loss."""

    queries: str = Field(description="name of the query table to train on")
    batch_size: PositiveInt = Field(description="queries in the global batch, over all workers")
    epochs: Positive = Field(default=1.0, description="passes over the queries; fractions are allowed")
    max_steps: PositiveInt | None = Field(
        default=None, description="number of optimizer steps; null: as `epochs` gives"
    )
    learning_rate: Positive = Field(description="peak learning rate, before `lr_scaling`")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        default="none", description="how learning_rate scales with batch_size / reference_batch (paper Table 4)"
    )
    reference_batch: PositiveInt | None = Field(default=None, description="batch size that learning_rate refers to")
    warmup_ratio: Fraction = Field(default=0.03, description="share of the steps with a linearly rising rate")
    weight_decay: NonNegative = Field(default=0.0, description="AdamW's decoupled weight decay")
    clip_norm: Positive = Field(default=1.0, description="gradients are clipped to this global norm")
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_eps: Positive = 1e-8
    language_model: Literal["lora", "qlora", "full"] = Field(
        default="lora",
        description="what is trained: adapters; adapters on 4-bit weights; all weights but the token embeddings",
    )
    lora: Lora = Lora()
    vision: Literal["frozen", "projector", "full"] = Field(
        default="frozen", description="which part of the vision tower is trained"
    )
    learning_rates: Rates = Rates()
    max_per_task: PositiveInt | None = Field(
        default=None, description="at most this many queries of a task per epoch, sampled anew each epoch; null: all"
    )
    homogeneous: float = Field(default=0.0, ge=0, le=1, description="share of global batches drawn from a single task")
    checkpoint_every: PositiveInt = Field(default=50, description="optimizer steps between saved training states")

    @model_validator(mode="after")
    def _scaling_needs_a_reference(self) -> Phase:
        if self.lr_scaling != "none" and self.reference_batch is None:
            raise ValueError(
                f"lr_scaling={self.lr_scaling} needs reference_batch, the batch size that learning_rate refers to"
            )
        return self

    @model_validator(mode="after")
    def _rates_have_their_part(self) -> Phase:
        if self.learning_rates.projector and self.vision == "frozen":
            raise ValueError("learning_rates.projector needs vision: projector or full")
        if self.learning_rates.vision and self.vision != "full":
            raise ValueError("learning_rates.vision needs vision: full")
        if self.lora.init and self.language_model == "full":
            raise ValueError("lora.init needs language_model: lora or qlora")
        return self

    @property
    def peak_rate(self) -> float:
        """The learning rate after warmup, scaled to the batch size by `lr_scaling`."""
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        return self.learning_rate * (self.batch_size / (self.reference_batch or self.batch_size)) ** power


class ContrastivePhase(Phase):
    """InfoNCE over the global batch (paper eq. 1)."""

    kind: Literal["contrastive"] = "contrastive"
    two_way: bool = Field(default=False, description="add the document → query direction to the loss")
    temperature: Temperature = Temperature()
    hard_negatives: int = Field(default=0, ge=0, description="mined negatives added per query")
    in_batch_negatives: bool = Field(
        default=True, description="use the documents of other queries too; false: only a query's own mined negatives"
    )
    matryoshka: tuple[PositiveInt, ...] = Field(
        default=(), description="shorter vector lengths that are trained as well (arXiv 2205.13147)"
    )

    @model_validator(mode="after")
    def _has_negatives(self) -> ContrastivePhase:
        if not self.in_batch_negatives and (self.two_way or not self.hard_negatives):
            raise ValueError("in_batch_negatives: false needs hard_negatives above 0 and two_way: false")
        return self


class RerankPhase(Phase):
    """Loss on the answer to (query, document) pairs: each query with a positive and with `negatives` others."""

    kind: Literal["rerank"] = "rerank"
    loss: Literal["next_token", "yes_no"] = Field(
        default="next_token",
        description="next_token: over the vocabulary, on the answer and the end of the turn, as in the paper; yes_no: "
        "over the two logits whose softmax is the score",
    )
    negatives: PositiveInt = Field(default=1, description="documents that are answered No, per positive")
    easy_steps: Fraction = Field(
        default=0.0, description="share of the steps, the first ones, whose negatives are all drawn at random"
    )
    random_mix: Fraction = Field(
        default=0.0, description="after them, the share of negatives drawn at random from the query's pool"
    )


class DistillPhase(Phase):
    """KL divergence from the teacher's scores of each query's own candidates."""

    kind: Literal["distill"] = "distill"
    temperature: Temperature = Temperature(init="parent", learn=True)


TrainingPhase = ContrastivePhase | RerankPhase | DistillPhase


class Mining(Section):
    """Candidates for hard negatives and their filters (paper Table 5; docs/method.md#hard-negatives)."""

    depth: PositiveInt = Field(default=100, description="candidates kept per query before the filters")
    pool: Literal["local", "global"] = Field(
        default="global", description="search a query's own task's pool, or the union of the split's pools"
    )
    max_similarity: Annotated[float, Field(gt=-1.0, le=1.0)] | Literal["calibrate"] = Field(
        default=0.7,
        description="drop candidates above this cosine; 1: keep all; calibrate: chosen per task on validation",
    )
    margin: Fraction | None = Field(
        default=None, description="drop candidates whose cosine exceeds the positive's × (1 − margin); null: off"
    )
    min_rank: int = Field(default=0, ge=0, description="skip this many of the best candidates that pass the filters")
    random_mix: Fraction = Field(default=0.0, description="share of negatives drawn at random from the pool instead")
    random_mix_of: dict[str, Fraction] | None = Field(default=None, description="random_mix of single tasks, by name")
    max_queries: PositiveInt | None = Field(
        default=None, description="mine for, and train on, a sample of this many queries; null: all"
    )
    max_pool: PositiveInt | None = Field(
        default=None, description="search a sample of this many documents per pool, plus positives; also in stage 3"
    )


class Stage1(Section):
    """Progressive transition: text pairs, image-caption pairs, instructions; null skips a phase (paper Table 3)."""

    text: ContrastivePhase | None
    image_text: ContrastivePhase | None
    instruction: ContrastivePhase


class Stage2(Section):
    """Continual InfoNCE with mined, filtered hard negatives (paper Table 5)."""

    mining: Mining = Mining()
    train: ContrastivePhase


class RerankerStage(Section):
    """Generative pointwise reranker that answers Yes or No (docs/method.md#reranker)."""

    init: Literal["base", "embedder"] = Field(
        default="base", description="start from the base model, or from the embedder of stage 2"
    )
    mined_by: Literal["instruction", "hard-negatives"] = Field(
        default="instruction", description="phase whose embedder finds the negatives"
    )
    negatives_top: PositiveInt = Field(default=50, description="draw mined negatives from this many ranks")
    min_rank: int = Field(default=0, ge=0, description="skip this many of the best candidates that pass the filters")
    hold_out: int = Field(
        default=200, ge=0, description="mined queries kept out of training, on which the reranker is examined after it"
    )
    max_text_tokens: PositiveInt = Field(default=256, description="longer queries and documents are cut")
    train: RerankPhase


class Stage3(Section):
    """Distill recall-then-rerank into the embedder: KL on each query's top-k (docs/method.md#distillation).

    `train.kind: contrastive` is the paper's control ("continue-hard"): InfoNCE on the same queries, with the same
    candidates as the only negatives.
    """

    sample: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.1, description="share of the queries that the teacher scores"
    )
    top_k: PositiveInt = Field(default=50, description="candidates per query")
    alpha: Fraction = Field(default=0.5, description="teacher score = α·cosine + (1 − α)·P(yes)")
    train: Annotated[DistillPhase | ContrastivePhase, Field(discriminator="kind")]


class Embed(Section):
    """How the `embed` job embeds the documents."""

    checkpoint: PathText | None = Field(default=None, description="embedder's directory; null: the run's last embedder")
    preset: str | None = Field(
        default=None, description="the system that released `checkpoint`, without settings of its own (docs/guide.md)"
    )
    truncate_dim: PositiveInt | None = Field(default=None, description="leading dimensions to keep; null: all")


class InTraining(Section):
    """A sample of the validation split on which the states of a phase are measured while it trains."""

    queries: PositiveInt = Field(default=500, description="validation queries, over all tasks")
    max_pool: PositiveInt = Field(default=2000, description="documents of each task's pool, plus positives")


class Evaluate(Section):
    """Recall@k per task; exact search in local and global pools (docs/method.md#evaluation)."""

    split: str = Field(default="test", description="query table to evaluate")
    k: PositiveInt = Field(default=5, description="documents among which a positive counts as found")
    k_of: dict[str, PositiveInt] = Field(default_factory=dict, description="k of single tasks, by name")
    drop_query_image: bool = Field(default=True, description="remove documents that show the query's own picture")
    rerank_top: PositiveInt = Field(default=50, description="candidates per query that the reranker scores")
    rerank_weight: NonNegative | Literal["calibrate"] = Field(
        default="calibrate", description="w in cosine + w · P(yes); calibrate: chosen on the validation queries"
    )
    calibrate_on: PositiveInt | None = Field(
        default=None, description="calibrate w on a sample of this many validation queries; null: all"
    )
    in_training: InTraining | None = Field(
        default=None, description="recall of every saved state of an embedder, beside its training; null: none"
    )
    checkpoint: PathText | None = Field(
        default=None, description="evaluate this embedder alone; null: the base and the run's embedders"
    )
    preset: str | None = Field(default=None, description="the system that released `checkpoint`")
    reranker: PathText | None = Field(default=None, description="a reranker for the results of `checkpoint`")
    reranker_preset: str | None = Field(default=None, description="the system that released `reranker`")


MODELS = {"checkpoint", "preset", "reranker", "reranker_preset"}  # of `Evaluate`: results name them by their content


class Compute(Section):
    """DeepSpeed and memory: settings that change speed and memory use, and results only by rounding."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="what ZeRO shards over the workers: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of frozen weights and the forward pass; trained parameters stay float32"
    )
    token_budget: PositiveInt = Field(default=16384, description="most tokens in one forward pass, padding included")
    packed: bool | Literal["auto"] = Field(
        default="auto", description="place items end to end in one row without padding; auto: on GPUs"
    )
    gradient_cache: bool = Field(
        default=True, description="embed each batch in chunks, twice, to hold the activations of one chunk only"
    )
    activation_checkpointing: bool = Field(
        default=True, description="recompute layer activations in the backward pass to save memory"
    )
    cache_vision: bool = Field(default=True, description="cache the frozen tower's outputs by picture content")


class Cluster(Section):
    """Resources that the Ray jobs request."""

    workers: PositiveInt = Field(default=8, description="training workers (ranks)")
    cpus_per_worker: Positive = 4
    gpus_per_worker: NonNegative = Field(default=1, description="0: train on CPUs")
    embedders: PositiveInt = Field(default=8, description="actors that embed or rerank")
    cpus_per_embedder: Positive = 2
    gpus_per_embedder: NonNegative = Field(default=1, description="0: embed and rerank on CPUs")
    preprocess_tasks: PositiveInt = Field(default=16, description="parallel CPU tasks that read and tokenize items")
    max_failures: int = Field(default=3, ge=0, description="restarts of a failed worker group or actor")
    gpu_hour_price: NonNegative | None = Field(
        default=None, description="in any currency; `--dry-run` then says what the stages cost"
    )


class Recipe(Section):
    """A whole run."""

    name: str
    seed: int = Field(default=42, ge=0, lt=SEEDS, description="seeds batch plans, samples, new adapters and dropout")
    output: PathText = Field(default="runs/{name}", description="run folder; {name} is replaced by the name")
    base: PathText = Field(description="directory or Hugging Face Hub id of the base model, or 'builtin:demo'")
    data: Data
    model: ModelSettings = ModelSettings()
    compute: Compute = Compute()
    cluster: Cluster = Cluster()
    stage1: Stage1
    stage2: Stage2
    reranker: RerankerStage
    stage3: Stage3
    embed: Embed = Embed()
    evaluate: Evaluate = Evaluate()

    @field_validator("name")
    @classmethod
    def _can_be_shown(cls, name: str) -> str:
        if not name.isprintable() or not name.strip():
            raise ValueError("is empty or has characters that cannot be printed")
        return name

    @field_validator("output")
    @classmethod
    def _has_no_other_slot(cls, output: str) -> str:
        if other := SLOT.search(output.replace("{name}", "")):
            raise ValueError(f"{other[0]} is not replaced by anything; only {{name}} is")
        return output

    @model_validator(mode="after")
    def _negatives_need_mining(self) -> Recipe:
        for name in STAGE1:
            phase = self.phases().get(name)
            if isinstance(phase, ContrastivePhase) and (phase.hard_negatives or not phase.in_batch_negatives):
                raise ValueError(
                    f"{KEYS[name]} comes before mining: hard_negatives must be 0 and in_batch_negatives true"
                )
        depth, reranker = self.stage2.mining.depth, self.reranker
        for key, ranks in (
            ("stage2.mining.min_rank and stage2.train.hard_negatives",
             self.stage2.mining.min_rank + self.stage2.train.hard_negatives),
            ("reranker.min_rank and reranker.train.negatives", reranker.min_rank + reranker.train.negatives),
        ):  # fmt: skip
            if ranks > depth:
                raise ValueError(f"{key} need {ranks} ranks, more than stage2.mining.depth ({depth})")
        if reranker.train.negatives > reranker.negatives_top:
            raise ValueError("reranker.train.negatives exceeds reranker.negatives_top")
        if self.reranker.train.queries != self.stage2.train.queries:
            raise ValueError("reranker.train.queries must be stage2.train.queries, whose negatives it learns from")
        return self

    @model_validator(mode="after")
    def _phases_fit_the_rest(self) -> Recipe:
        for name, phase in self.phases().items():
            if phase.batch_size < self.cluster.workers:
                raise ValueError(
                    f"{KEYS[name]}.batch_size is {phase.batch_size}, too small for {self.cluster.workers} workers; "
                    f"lower cluster.workers or raise it"
                )
            if phase.language_model == "qlora" and self.compute.zero_stage == 3:
                raise ValueError(
                    f"{KEYS[name]}: ZeRO-3 cannot shard 4-bit weights; set compute.zero_stage to 0, 1 or 2"
                )
            learned = not isinstance(phase, RerankPhase) and phase.temperature.learn
            if phase.learning_rates.temperature and not learned:
                raise ValueError(f"{KEYS[name]}.learning_rates.temperature needs a temperature with learn: true")
        return self

    def phases(self) -> dict[str, TrainingPhase]:
        """The recipe's phases by name, in the order in which they run."""
        phases = {
            TEXT: self.stage1.text,
            IMAGE_TEXT: self.stage1.image_text,
            INSTRUCTION: self.stage1.instruction,
            HARD_NEGATIVES: self.stage2.train,
            RERANKER: self.reranker.train,
            DISTILLATION: self.stage3.train,
        }
        return {name: phase for name, phase in phases.items() if phase}

    @property
    def run_dir(self) -> Path:
        return Path(self.output.replace("{name}", self.name)).absolute()


def count_steps(phase: Phase, queries: int) -> int:
    """Optimizer steps of a phase: `max_steps`, or the full batches in `epochs` passes over `queries` rows."""
    return phase.max_steps or max(1, int(phase.epochs * queries) // phase.batch_size)


def load_recipe(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by shipped name or path and apply `a.b=c` overrides (values are YAML).

    Raises:
        UserError: unknown recipe, invalid YAML, unknown key, wrong type, malformed override.
    """
    tree = _read_tree(source)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = _key_path(first["loc"], tree)
        if first["type"] == "extra_forbidden":
            raise UserError(f"recipe {source}: unknown key '{where}'; remove it or check its spelling") from None
        reason = first["msg"].removeprefix("Value error, ")
        of_a_section = first["type"] in ("value_error", "missing") and isinstance(first["input"], dict)
        got = "" if of_a_section else f" (got {_short(first['input'])})"
        raise UserError(f"recipe {source}: {f'{where}: ' if where else ''}{reason}{got}") from None


def _short(value: Any) -> str:
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = SHOWN
    return shown.repr(value)


def _key_path(location: tuple[str | int, ...], tree: Any) -> str:
    """Where an error is, as a dotted key: pydantic's location without the names of union members."""
    path = []
    for part in location:
        if isinstance(tree, dict) and part not in tree and tree.get("kind") == part:
            continue
        path.append(str(part))
        tree = tree.get(part) if isinstance(tree, dict) else None
    return ".".join(path)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with keys in the order of the classes above."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _read_tree(source: str, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with all that it extends. `children`: the files that extend it."""
    shipped = SHIPPED / f"{source}.yaml"
    path = shipped if os.path.isfile(shipped) else Path(source)  # of a name that is too long, `Path.is_file` raises
    if not os.path.isfile(path):
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise UserError(f"no recipe {_short(source)}; give a YAML file or one of: {names}")
    if path.resolve() in children:
        raise UserError(f"recipe {path}: it extends itself; let it extend another one")
    tree = read_yaml(path, f"recipe {path}")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected a mapping of keys to values")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise UserError(f"recipe {path}: extends is {_short(parent)}; give the name of a recipe, or a YAML file")
    return merge(_read_tree(parent, (*children, path.resolve())), tree)


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A tree with the values of another in place of its own."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {_short(override)}: write it as key.sub=value")
    value = parse_yaml(text, f"override {_short(override)}")
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"override {_short(override)}: '{part}' is a value, not a section")
    node[leaf] = value
