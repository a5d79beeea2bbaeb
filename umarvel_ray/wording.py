"""Settings that reproduce other systems (docs/guide.md#presets): messages written out, and what pictures undergo."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from umarvel_ray.section import Section

SLOT = re.compile(r"(\{\w+\})")
SLOTS = ("instruction", "pictures", "text", "instructed", "kinds")


def _with_slots(text: str) -> str:
    """A template: in braces the words of `SLOTS`, and nothing else."""
    unknown = [slot for slot in SLOT.findall(text) if slot[1:-1] not in SLOTS]
    if unknown or ("{text}" not in text and "{instructed}" not in text):
        known = ", ".join(f"{{{name}}}" for name in SLOTS)
        raise ValueError(f"{unknown[0]} is no slot" if unknown else f"has no slot for the text; slots are {known}")
    return text


Template = Annotated[str, AfterValidator(_with_slots)]


class Wording(Section):
    """How a template is filled: what another system's code makes of an item's parts."""

    picture: str = Field(
        default="<|vision_start|><|image_pad|><|vision_end|>", description="what stands for each picture"
    )
    instruction: str = Field(default="", description="of items without one of their own")
    cleaning: Literal["all", "instructed", "none"] = Field(
        default="none",
        description="clean texts as UniIR does (docs/method.md#text-cleaning): all of them, all but "
        "queries without an instruction, or none",
    )
    finish_instruction: bool = Field(
        default=False,
        description="strip an item's own instruction and end it with a period unless it ends in punctuation",
    )


class Message(Wording):
    """An embedder's message written out, in place of the chat template's conversation.

    The settings of that conversation have no effect: the mask and the limit of the instruction, both prompts.
    """

    text: Template = Field(description="the template; {instructed} is {instruction} and {text} with a space between")
    picture_document: str = Field(default="", description="instruction of a document that is a picture")
    described_document: str = Field(default="", description="instruction of a document that is a picture and a text")
    document_instructions: bool = Field(default=False, description="whether documents may have instructions")
    max_query_tokens: PositiveInt | None = Field(default=None, description="all tokens of a query; its end is cut off")
    max_document_tokens: PositiveInt | None = Field(default=None, description="the same for a document")
    suffix: str = Field(default="", description="follows what is left after cutting, and counts")


class PairMessage(Wording):
    """A reranker's message written out.

    `query` must end where no token can reach into `document`, since a query is read once for all its documents.
    """

    query: Template = Field(description="the template up to the candidate")
    document: Template = Field(description="the candidate, and the rest")
    answers: tuple[str, str] = Field(
        default=("Yes", "No"), description="the first token of each is compared; the score is the first one's share"
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="all tokens before the template's end; plain ones are dropped from the back"
    )


class Preparation(Section):
    """What happens to a picture before it is resized within the pixel budget."""

    upright: bool = Field(default=True, description="turn it as its EXIF block says")
    transparency: Literal["white", "dropped"] = Field(
        default="white", description="white: put on white; dropped: the colors as they are stored"
    )
    tiny: PositiveInt | None = Field(
        default=None, description="one with a side below a merged patch becomes a square with this side"
    )
    square: PositiveInt | None = Field(default=None, description="becomes a square with this side")
    first_budget: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="is resized to multiples of 28 within these areas"
    )
    own_budget: bool = Field(
        default=False, description="the model directory's areas apply then, instead of min_pixels and max_pixels"
    )
