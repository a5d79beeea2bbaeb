"""The paper's ablations, Tables 1 to 6, as data: each row is a few recipe values beside the paper's numbers.

Batch sizes, learning rates and steps are relative to the recipe's own, which correspond to the paper's final ones. The
paper's numbers are M-BEIR averages in percent; None where we do not know them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from umarvel_ray.recipe import DISTILLATION, HARD_NEGATIVES, RERANKER, STAGE1, Recipe

Claim = Literal["higher", "lower"]


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        changes: `key=value` overrides of the recipe; None measures the shared checkpoint without training.
        paper: average recall in percent, local and global, or the paper's remark in place of a number.
        claim: how the paper's local recall compares with the table's reference row.
    """

    label: str
    changes: tuple[str, ...] | None
    paper: tuple[float | str | None, float | str | None] = (None, None)
    claim: Claim | None = None


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        stage: the stage that varies.
        phase: the phase whose checkpoint is measured.
        shared: phases whose checkpoints all rows take from one ordinary run of the recipe.
        reference: label of the row that the others are compared with.
    """

    number: int
    stage: Literal["stage1", "stage2", "stage3"]
    phase: str
    shared: tuple[str, ...]
    reference: str
    rows: tuple[Row, ...]

    @property
    def shared_phase(self) -> str:
        """The shared embedder that the ablated phase starts from, which a row without training measures."""
        return [phase for phase in self.shared if phase != RERANKER][-1]


def paper_table(number: int, recipe: Recipe) -> Table:
    """A table of the paper for a recipe."""
    return TABLES[number](recipe)


def _extraction(recipe: Recipe) -> Table:
    """Table 1: pooling, attention and compression prompt, without an instruction mask yet."""
    known: dict[tuple[str, str, bool], tuple[tuple[float, float], Claim | None]] = {
        ("last", "causal", True): ((56.6, 54.8), None),
        ("mean", "causal", True): ((33.7, 27.6), "lower"),
        ("mean", "bidirectional", False): ((57.2, 55.2), "higher"),
    }

    def row(pooling: str, attention: str, prompt: bool) -> Row:
        paper, claim = known.get((pooling, attention, prompt), ((None, None), None))
        label = f"{pooling} token{'s' if pooling == 'mean' else ''}, {attention}{', prompt' if prompt else ''}"
        values = (f"pooling={pooling}", f"attention={attention}", f"compression_prompt={str(prompt).lower()}")
        return Row(label, _from_base("instruction_mask=false", *values), paper, claim)

    kinds = [(p, a, c) for p in ("last", "mean") for a in ("causal", "bidirectional") for c in (True, False)]
    return Table(
        1,
        "stage1",
        STAGE1[-1],
        (),
        "last token, causal, prompt",
        tuple(row(*kind) for kind in kinds),
    )


def _instruction_mask(recipe: Recipe) -> Table:
    """Table 2: whether the instruction's tokens are pooled."""
    return Table(
        2,
        "stage1",
        STAGE1[-1],
        (),
        "instruction pooled",
        (
            Row("instruction pooled", _from_base("instruction_mask=false"), (57.2, 55.2)),
            Row("instruction masked", _from_base("instruction_mask=true"), (57.3, 55.5), "higher"),
        ),
    )


def _transition(recipe: Recipe) -> Table:
    """Table 3: the instruction phase from the base, after the text phase, or after the image-text phase too."""
    return Table(
        3,
        "stage1",
        STAGE1[-1],
        STAGE1[:-1],
        "instructions only",
        (
            Row("instructions only", ("stage1.text=null", "stage1.image_text=null"), (56.6, 53.9)),
            Row("text pairs first", ("stage1.image_text=null",), (57.3, 55.5), "higher"),
            Row("text pairs, then image-text pairs", (), (57.7, 55.8), "higher"),
        ),
    )


def _batch(recipe: Recipe) -> Table:
    """Table 4: batch size, learning rate and temperature of the instruction phase; every row sees as many queries.

    Batch × 1 is an eighth of the recipe's (the paper's 480), and its rate a quarter (the paper's 1e-4).
    """
    phase = recipe.stage1.instruction
    small, rate = max(1, phase.batch_size // 8), phase.learning_rate / 4

    def row(times: int, learn: bool, scaling: str, local: float, claim: Claim | None = "higher") -> Row:
        """A batch of `times` eighths of the recipe's; the 'own' rate is the recipe's, 4 times that of batch × 1."""
        size = small * times
        values = [f"batch_size={size}", f"temperature.learn={str(learn).lower()}"]
        if phase.max_steps:  # epochs see the same number of queries anyway
            values.append(f"max_steps={phase.max_steps * phase.batch_size // size}")
        own = scaling == "own"
        values.append(f"learning_rate={phase.learning_rate if own else rate}")
        values += [] if own else [f"lr_scaling={scaling}", f"reference_batch={small}"]
        rates = {"none": "same rate", "sqrt": "rate × √batch", "own": "rate × 4"}
        label = f"batch × {times}, {rates[scaling]}, {'learned' if learn else 'fixed'} τ"
        return Row(label, tuple(f"stage1.instruction.{value}" for value in values), (local, None), claim)

    return Table(
        4,
        "stage1",
        STAGE1[-1],
        _stage1(recipe)[:-1],
        "batch × 1, same rate, fixed τ",
        (
            row(1, False, "none", 57.2, None),
            row(4, False, "none", 57.4),
            row(8, False, "sqrt", 58.5),
            row(8, False, "own", 58.9),
            row(8, True, "own", 60.1),
            row(16, True, "own", 60.3),
        ),
    )


def _hard_negatives(recipe: Recipe) -> Table:
    """Table 5: the negatives of stage 2, which starts from stage 1's model."""
    unfiltered = ("stage2.mining.max_similarity=1.0", "stage2.mining.margin=null", "stage2.mining.min_rank=0")
    return Table(
        5,
        "stage2",
        HARD_NEGATIVES,
        _stage1(recipe),
        "in-batch + unfiltered",
        (
            Row("stage 1's model, no more training", None, (60.1, None), "higher"),
            Row("in-batch only", ("stage2.train.hard_negatives=0",)),
            Row(
                "only unfiltered",
                (*unfiltered, "stage2.train.in_batch_negatives=false"),
                ("failed", "failed"),
                "lower",
            ),
            Row("in-batch + unfiltered", unfiltered, (57.4, 55.4)),
            Row("in-batch + filtered", (), (61.7, 59.9), "higher"),
            Row("in-batch + filtered, one per query", ("stage2.train.hard_negatives=1",)),
            Row("in-batch + filtered, half drawn at random", ("stage2.mining.random_mix=0.5",)),
        ),
    )


def _distillation(recipe: Recipe) -> Table:
    """Table 6: stage 3 from stage 2's model, against InfoNCE on the same queries with the candidates as negatives."""
    return Table(
        6,
        "stage3",
        DISTILLATION,
        (*_stage1(recipe), HARD_NEGATIVES, RERANKER),
        "continue-hard",
        (
            Row("stage 2's model, no more training", None, (61.7, 59.9)),
            Row("continue-hard", ("stage3.train.kind=contrastive",)),
            Row("distillation", (), (63.2, 60.7), "higher"),
        ),
    )


def _stage1(recipe: Recipe) -> tuple[str, ...]:
    """The phases of stage 1 that the recipe has."""
    return tuple(name for name in recipe.phases() if name in STAGE1)


def _from_base(*settings: str) -> tuple[str, ...]:
    """A setting that changes every embedding must be the same in all phases, so these rows start from the base.

    The image-text phase is left out, as in the paper's tables.
    """
    return ("stage1.image_text=null", *(f"model.{setting}" for setting in settings))


TABLES = {
    1: _extraction,
    2: _instruction_mask,
    3: _transition,
    4: _batch,
    5: _hard_negatives,
    6: _distillation,
}
NUMBERS = tuple(TABLES)
