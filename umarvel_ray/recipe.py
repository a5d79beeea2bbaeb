"""The recipe: one typed tree for a whole run. Unknown keys and wrong types are refused with the key's full path.

A recipe is a YAML file (or the name of one shipped in `umarvel_ray/recipes`) plus `a.b=c` overrides. It may start from
another with `extends: NAME`. `umarvel VERB RECIPE --dry-run` prints it resolved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from umarvel_ray.errors import UserError

SHIPPED = Path(__file__).parent / "recipes"

# The phases, which also name their checkpoints, and where a recipe describes each.
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


class Section(BaseModel):
    """A part of the tree: immutable, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    """Everything that changes an embedding; stored in each checkpoint so that no later job can disagree (rule 2)."""

    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pooling: Literal["mean", "last"] = "mean"
    instruction_mask: bool = True
    compression_prompt: bool = False
    generation_prompt: bool = False
    positions: Literal["mrope", "sequential"] = "mrope"
    deepstack: bool = True
    min_pixels: PositiveInt = 4 * 28 * 28
    max_pixels: PositiveInt = 300 * 28 * 28
    resize_twice: bool = Field(default=False, description="to multiples of 28 first, as the reference (trap T9)")
    video_frames: PositiveInt = Field(default=12, description="frames of a video, spread evenly over it")
    max_video_pixels: PositiveInt = Field(default=12 * 128 * 28 * 28, description="of all its frames together")
    max_text_tokens: PositiveInt = 480

    @classmethod
    def reference(cls, generation_prompt: bool = True) -> ModelSettings:
        """How the authors' released checkpoints are evaluated by their own code (method 1.1 to 1.5).

        Args:
            generation_prompt: their evaluation appends one, their training does not (trap T4).
        """
        return cls(
            positions="sequential",
            deepstack=False,
            generation_prompt=generation_prompt,
            resize_twice=True,
            max_text_tokens=1024,
        )

    def for_reranker(self, max_text_tokens: int) -> ModelSettings:
        """The same for a reranker of this embedder: causal, with a text limit of its own."""
        return self.model_copy(update={"attention": "causal", "max_text_tokens": max_text_tokens})


class Data(Section):
    """Where documents, queries and pools are read from."""

    root: str = Field(description="a folder of Parquet tables, an M-BEIR folder, or 'builtin:demo'")
    format: Literal["parquet", "mbeir"] = "parquet"


class Lora(Section):
    """Low-rank adapters on the language model's linear layers (method section 2)."""

    r: PositiveInt = 128
    alpha: PositiveInt = 256
    dropout: Fraction = 0.05
    init: str | None = Field(default=None, description="directory of a PEFT adapter to go on from; null starts anew")


class Rates(Section):
    """Learning rates of parts; null is the step's `learning_rate`. All follow its warm-up and decay."""

    projector: Positive | None = None
    vision: Positive | None = Field(default=None, description="of the tower without its projector")
    temperature: Positive | None = None


class Temperature(Section):
    """InfoNCE temperature: exp of a clamped log-parameter when learned (trap T15)."""

    init: Positive | Literal["parent"] = Field(default=0.05, description="a value, or the parent's (trap T16)")
    learn: bool = False
    minimum: Positive = 0.01
    maximum: Positive = 1.0


class Phase(Section):
    """One training run: a set of queries, and AdamW with warm-up and cosine decay. Subclasses say the loss."""

    queries: str = Field(description="name of the query table to train on")
    batch_size: PositiveInt = Field(description="queries in the global batch, over all workers")
    epochs: Positive = 1.0
    max_steps: PositiveInt | None = None
    learning_rate: Positive
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        default="none", description="how learning_rate grows with batch_size / reference_batch (paper Table 4)"
    )
    reference_batch: PositiveInt | None = Field(default=None, description="the batch that learning_rate is meant for")
    warmup_ratio: Fraction = 0.03
    weight_decay: NonNegative = 0.0
    clip_norm: Positive = 1.0
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_eps: Positive = 1e-8
    language_model: Literal["lora", "qlora", "full"] = Field(
        default="lora", description="adapters; adapters on 4-bit weights; all weights but the token tables"
    )
    lora: Lora = Lora()
    vision: Literal["frozen", "projector", "full"] = Field(default="frozen", description="what of the tower trains")
    learning_rates: Rates = Rates()
    max_per_task: PositiveInt | None = Field(default=None, description="queries of a task in an epoch, drawn anew")
    homogeneous: float = Field(default=0.0, ge=0, le=1, description="share of global batches drawn from a single task")
    checkpoint_every: PositiveInt = 50

    @model_validator(mode="after")
    def _scaling_needs_a_reference(self) -> Phase:
        if self.lr_scaling != "none" and self.reference_batch is None:
            raise ValueError(f"lr_scaling={self.lr_scaling} needs reference_batch, what learning_rate is meant for")
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
        """The learning rate after warm-up: scaled to the batch size by `lr_scaling`."""
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        return self.learning_rate * (self.batch_size / (self.reference_batch or self.batch_size)) ** power


class ContrastivePhase(Phase):
    """InfoNCE over the global batch (paper eq. 1); `two_way` adds the document → query direction."""

    kind: Literal["contrastive"] = "contrastive"
    two_way: bool = False
    temperature: Temperature = Temperature()
    hard_negatives: int = Field(default=0, ge=0, description="mined documents added per query")
    in_batch_negatives: bool = Field(default=True, description="false: only a query's own mined ones count")
    matryoshka: tuple[PositiveInt, ...] = Field(
        default=(), description="shorter dimensions that are trained as well (arXiv 2205.13147)"
    )

    @model_validator(mode="after")
    def _some_negatives(self) -> ContrastivePhase:
        if not self.in_batch_negatives and (self.two_way or not self.hard_negatives):
            raise ValueError("in_batch_negatives: false needs hard_negatives above 0 and two_way: false")
        return self


class RerankPhase(Phase):
    """Next-token loss on the answer word of (query, document) pairs."""

    kind: Literal["rerank"] = "rerank"


class DistillPhase(Phase):
    """KL divergence from the teacher's scores of each query's own candidates."""

    kind: Literal["distill"] = "distill"
    temperature: Temperature = Temperature(init="parent", learn=True)


TrainingPhase = ContrastivePhase | RerankPhase | DistillPhase


class Mining(Section):
    """Candidates for hard negatives (paper section on hard negatives; method section 3)."""

    depth: PositiveInt = Field(default=100, description="candidates kept per query before the filters")
    pool: Literal["local", "global"] = "global"
    max_similarity: Annotated[float, Field(gt=-1.0, le=1.0)] | Literal["calibrate"] = Field(
        default=0.7, description="drop candidates above this cosine; 1 keeps all"
    )
    margin: float | None = Field(default=None, description="drop candidates above positive × (1 − margin)")
    min_rank: int = Field(default=0, ge=0, description="skip this many best candidates that passed the filters")
    random_mix: Fraction = Field(default=0.0, description="share of negatives drawn at random from the pool")
    random_mix_of: dict[str, Fraction] | None = Field(default=None, description="tasks with another random_mix")
    max_queries: PositiveInt | None = Field(default=None, description="mine and train on a sample of this many queries")
    max_pool: PositiveInt | None = Field(
        default=None, description="mine in a sample of this many documents of a pool, positives aside; stage 3 too"
    )


class Stage1(Section):
    """Progressive transition: text pairs, image-caption pairs, instructions; null leaves one out (paper Table 3)."""

    text: ContrastivePhase | None
    image_text: ContrastivePhase | None
    instruction: ContrastivePhase


class Stage2(Section):
    """Continual InfoNCE with mined, filtered hard negatives (paper Table 5)."""

    mining: Mining = Mining()
    train: ContrastivePhase


class RerankerStage(Section):
    """Generative pointwise reranker, next-token loss on Yes/No (method section 4)."""

    init: Literal["base", "embedder"] = "base"
    negatives_top: PositiveInt = Field(default=50, description="mined ranks the negative is drawn from")
    max_text_tokens: PositiveInt = 256
    train: RerankPhase


class Stage3(Section):
    """Distill recall-then-rerank into the embedder: KL on the top-k of a query sample.

    `train.kind: contrastive` is the paper's control ("continue-hard"): InfoNCE with the same queries, and the same
    candidates as only negatives.
    """

    sample: Fraction = Field(default=0.1, description="share of the queries that the teacher scores")
    top_k: PositiveInt = Field(default=50, description="candidates of each query")
    alpha: Fraction = Field(default=0.5, description="teacher score = α·cosine + (1 − α)·P(yes)")
    train: Annotated[DistillPhase | ContrastivePhase, Field(discriminator="kind")]


class Embed(Section):
    """What `embed` embeds the documents with."""

    checkpoint: str | None = Field(default=None, description="another directory than the run's last embedder")
    preset: Literal["reference"] | None = Field(default=None, description="'reference': one the authors released")
    truncate_dim: PositiveInt | None = Field(default=None, description="coordinates kept of each vector; null: all")


class Evaluate(Section):
    """Recall@k per task; exact search in local and global pools (method section 6)."""

    split: str = "test"
    k: PositiveInt = 5
    k_of: dict[str, PositiveInt] = Field(default_factory=dict, description="tasks measured at another k")
    drop_query_image: bool = Field(default=True, description="take the query's own picture out of the pool")
    rerank_top: PositiveInt = 50
    rerank_weight: NonNegative | Literal["calibrate"] = "calibrate"
    calibrate_on: PositiveInt | None = Field(default=None, description="a sample of this many validation queries")


class Compute(Section):
    """DeepSpeed and memory: every default that matters, stated."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    token_budget: PositiveInt = Field(default=16384, description="tokens in one forward chunk, padding included")
    packed: bool | Literal["auto"] = Field(
        default="auto", description="items in one row without padding; auto: on GPUs"
    )
    gradient_cache: bool = True
    activation_checkpointing: bool = True
    cache_vision: bool = Field(default=True, description="keep the frozen tower's outputs by content hash")


class Cluster(Section):
    """What the Ray jobs ask for."""

    workers: PositiveInt = 8
    cpus_per_worker: Positive = 4
    gpus_per_worker: NonNegative = 1
    embedders: PositiveInt = 8
    cpus_per_embedder: Positive = 2
    gpus_per_embedder: NonNegative = 1
    preprocess_tasks: PositiveInt = 16
    max_failures: int = Field(default=3, ge=0)


class Recipe(Section):
    """A whole run. `base` is an HF directory, or 'builtin:demo'."""

    name: str
    seed: int = 42
    output: str = "runs/{name}"
    base: str
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

    @model_validator(mode="after")
    def _negatives_need_mining(self) -> Recipe:
        if self.stage2.train.hard_negatives > self.stage2.mining.depth:
            raise ValueError("stage2.train.hard_negatives exceeds stage2.mining.depth")
        if self.reranker.train.queries != self.stage2.train.queries:
            raise ValueError("reranker.train.queries must be stage2.train.queries, whose negatives it learns from")
        return self

    @model_validator(mode="after")
    def _phases_fit_the_rest(self) -> Recipe:
        for name, phase in self.phases().items():
            if phase.language_model == "qlora" and self.compute.zero_stage == 3:
                raise ValueError(
                    f"{KEYS[name]}: ZeRO-3 cannot shard 4-bit weights; set compute.zero_stage to 0, 1 or 2"
                )
            learned = not isinstance(phase, RerankPhase) and phase.temperature.learn
            if phase.learning_rates.temperature and not learned:
                raise ValueError(f"{KEYS[name]}.learning_rates.temperature needs a temperature with learn: true")
        return self

    def phases(self) -> dict[str, TrainingPhase]:
        """The phases of the recipe by name, in the order they run."""
        given = {
            TEXT: self.stage1.text,
            IMAGE_TEXT: self.stage1.image_text,
            INSTRUCTION: self.stage1.instruction,
            HARD_NEGATIVES: self.stage2.train,
            RERANKER: self.reranker.train,
            DISTILLATION: self.stage3.train,
        }
        return {name: phase for name, phase in given.items() if phase}

    @property
    def run_dir(self) -> Path:
        return Path(self.output.format(name=self.name)).absolute()


def count_steps(phase: Phase, queries: int) -> int:
    """Optimizer steps of a phase: `max_steps`, or what `epochs` over `queries` rows fill."""
    return phase.max_steps or max(1, int(phase.epochs * queries) // phase.batch_size)


def load_recipe(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe by shipped name or path and apply `a.b=c` overrides (values are YAML).

    Raises:
        UserError: no such recipe, invalid YAML, unknown key, wrong type, malformed override.
    """
    tree = _read_tree(source)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            raise UserError(f"recipe {source}: unknown key '{where}'; remove it or check its spelling") from None
        raise UserError(f"recipe {source}: {where}: {first['msg']} (got {first['input']!r})") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, keys in the order of the classes above."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _read_tree(source: str) -> dict[str, Any]:
    shipped = SHIPPED / f"{source}.yaml"
    path = shipped if shipped.is_file() else Path(source)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise UserError(f"no recipe '{source}'; give a YAML file or one of: {names}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe {path}{line}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected a mapping of keys to values")
    parent = tree.pop("extends", None)
    return _merge(_read_tree(parent), tree) if parent else tree


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': write it as key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': the value is not valid YAML") from None
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': '{part}' is a value, not a section")
    node[leaf] = value
