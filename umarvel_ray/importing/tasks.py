"""Tasks by what is asked and what is found, numbered as M-BEIR does, and the instruction of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from umarvel_ray.errors import UserError

TEXT, IMAGE, BOTH = MODALITIES = ("text", "image", "image,text")
SHAPES = {
    (TEXT, IMAGE): 0,
    (TEXT, TEXT): 1,
    (TEXT, BOTH): 2,
    (IMAGE, TEXT): 3,
    (IMAGE, IMAGE): 4,
    (IMAGE, BOTH): 5,
    (BOTH, TEXT): 6,
    (BOTH, IMAGE): 7,
    (BOTH, BOTH): 8,
}
DEFAULTS = (
    "Find a picture that matches the description.",
    "Find a text that answers the query.",
    "Find a picture with a text that answers the query.",
    "Find a text that describes the picture.",
    "Find a picture that shows the same.",
    "Find a picture with a text that matches the picture.",
    "Find a text that answers the question about the picture.",
    "Find a picture that matches the picture and the text.",
    "Find a picture with a text that matches the picture and the text.",
)


def shape_of(query: str, document: str) -> int:
    """The number of the task that finds documents of one modality for queries of another."""
    return SHAPES[query, document]


def words_of(shape: int) -> str:
    """A task's number in words, such as `text → image`."""
    [(query, document)] = [sides for sides, number in SHAPES.items() if number == shape]
    return f"{query} → {document}".replace(",", " + ")


def instructions_of(given: Sequence[str]) -> Mapping[int, str]:
    """What the user asks for, by task: each is `TEXT`, for all tasks, or `taskN=TEXT` for one.

    Raises:
        UserError: no such task.
    """
    found: dict[int, str] = {}
    for text in sorted(
        given, key=lambda text: text.startswith("task")
    ):  # what is for one task replaces what is for all
        name, equals, own = text.partition("=")
        if not (equals and name.startswith("task")):
            found |= dict.fromkeys(SHAPES.values(), text)
        elif name[4:].isdigit() and int(name[4:]) in SHAPES.values():
            found[int(name[4:])] = own
        else:
            tasks = ", ".join(f"task{number} ({words_of(number)})" for number in sorted(SHAPES.values()))
            raise UserError(f"--instruction {text}: no task '{name}'; write TEXT, or one of {tasks} before the '='")
    return found
