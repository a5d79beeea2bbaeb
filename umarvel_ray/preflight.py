"""What can be known about a run's data before its first step, so that a fault is not said after hours of training."""

from __future__ import annotations

from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.reranked import VALIDATION
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.recipe import Recipe
from umarvel_ray.runs import Run

INSTRUCTIONS = 1000  # distinct ones of a table that are looked at
SHOWN = 60  # characters of an instruction in an error


def tables_of(recipe: Recipe) -> list[str]:
    """The query tables that any stage reads."""
    names = [phase.queries for phase in recipe.phases().values()]
    if "calibrate" in (recipe.stage2.mining.max_similarity, recipe.evaluate.rerank_weight):
        names.append(VALIDATION)
    return list(dict.fromkeys([*names, recipe.evaluate.split]))


def check_tables(run: Run) -> None:
    """Open every table that any stage reads.

    Raises:
        UserError: see `Dataset.validate`; an instruction so long that its queries' texts would not be read.
    """
    recipe, data = run.recipe, run.open_dataset()
    encoder = ItemEncoder.from_pretrained(run.base, recipe.model)
    for name in tables_of(recipe):
        data.validate(name)
        for instruction in data.queries(name).table.codes("instruction")[1][:INSTRUCTIONS]:
            if not encoder.leaves_room(instruction):
                raise UserError(
                    f"{data.root}: {name}: model.max_text_tokens {recipe.model.max_text_tokens} leaves no room for a "
                    f"text after the instruction '{instruction[:SHOWN]}'; raise it"
                )
