"""Items as clients send them, and what the library makes of them.

An item is a bare string (text) or `{"text"?, "image"?, "video"?, "instruction"?}`; chat messages and Cohere's content
parts say the same in other words. Pictures arrive as data URIs or bare base64, or as URLs where the service allows a
host; they become bytes here, so nothing behind this module ever sees a path chosen by a client.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from umarvel_ray.serving.errors import BadItem
from umarvel_ray.serving.remote import BadRemote
from umarvel_ray.serving.settings import Limits

URL = ("http://", "https://")


class Body(BaseModel):
    """A request: unknown keys are refused, so a misspelt option is an answer and not a surprise."""

    model_config = ConfigDict(extra="forbid")


# A union's branch is chosen by the JSON type, so a bad value gets one complaint, about the branch that was meant. The
# tags hold spaces because `validation_error` tells them from keys by that.
_TAGS = {str: "a string", dict: "an item", list: "a list"}
String = Annotated[str, Tag("a string")]


def by_type(message: str) -> Discriminator:
    """Choose a string, an item or a list by what was sent; `message` where it is none of those."""

    def tag(value: Any) -> str | None:
        return _TAGS.get(dict if isinstance(value, BaseModel) else type(value))

    return Discriminator(tag, custom_error_type="item", custom_error_message=message)


Strings = Annotated[String | Annotated[list[str], Tag("a list")], by_type("give a string or a list of strings")]


class Item(Body):
    """Text, pictures, a video or several of them; an instruction says what to look for (queries only)."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "a red car", "instruction": "Find a picture."}]})

    text: str | None = None
    image: Strings | None = Field(default=None, description="data URI, base64, or a URL of an allowed host")
    video: str | None = Field(default=None, description="data URI or base64")
    instruction: str | None = None

    @property
    def images(self) -> list[str]:
        return [self.image] if isinstance(self.image, str) else self.image or []


_Item = Annotated[Item, Tag("an item")]
OneItem = Annotated[String | _Item, by_type("give a string or an item {text, image, video, instruction}")]
Items = Annotated[list[OneItem], Field(min_length=1)]
OneOrMore = Annotated[
    String | _Item | Annotated[Items, Tag("a list")],
    by_type("give a string, an item {text, image, video, instruction}, or a list of them"),
]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Url(BaseModel):
    url: str
    detail: str | None = Field(default=None, description="accepted for OpenAI clients, ignored")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(Body):
    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Discriminator("type")]


def item_of_parts(parts: Sequence[Part]) -> Item:
    """The item that content parts describe: texts joined by line breaks, all pictures, the last video."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    videos = [part.video_url.url for part in parts if isinstance(part, VideoPart)]
    return Item(text="\n".join(texts) or None, image=images or None, video=videos[-1] if videos else None)


def place(name: str, index: int | None) -> str:
    """The place of an item in the body: `query`, or `documents[3]`."""
    return name if index is None else f"{name}[{index}]"


def remote_images(item: str | Item) -> list[str]:
    """The item's pictures that are URLs."""
    return [] if isinstance(item, str) else [image for image in item.images if image.startswith(URL)]


def library_item(
    item: str | Item, where: str, index: int | None, limits: Limits, fetched: Mapping[str, bytes | BadRemote]
) -> dict[str, Any]:
    """The library's item dict for a client's item; pictures and video are bytes, still undecoded.

    Args:
        fetched: what is behind its URLs.

    Raises:
        BadItem: nothing in it, over a limit, a URL, a path, or not base64.
    """
    item = Item(text=item) if isinstance(item, str) else item
    for name in ("text", "instruction"):
        _check_text(getattr(item, name) or "", f"{where}.{name}", index, limits.max_text)
    if len(item.images) > limits.max_images:
        raise BadItem(f"{where}.image: over {limits.max_images} pictures in an item", f"{where}.image", index)
    parts: dict[str, Any] = {"text": item.text, "instruction": item.instruction}
    parts["image"] = [
        _fetched(fetched[image], f"{where}.image", index)
        if image in fetched
        else _content(image, f"{where}.image", index, limits.max_image_bytes)
        for image in item.images
    ]
    if item.video:
        parts["video"] = _content(item.video, f"{where}.video", index, limits.max_video_bytes, "video")
    parts = {key: value for key, value in parts.items() if value}
    if not parts.keys() & {"text", "image", "video"}:
        raise BadItem(f"{where}: an item needs text, image or video", where, index)
    if len(item.images) == 1:
        [parts["image"]] = parts["image"]
    return parts


def _check_text(text: str, param: str, index: int | None, limit: int) -> None:
    if len(text) > limit:
        raise BadItem(f"{param}: over {limit} characters; send less, or several items", param, index)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say \ud800
        raise BadItem(f"{param}: holds half a surrogate pair, which is no character", param, index) from None


def _fetched(content: bytes | BadRemote, param: str, index: int | None) -> bytes:
    if isinstance(content, BadRemote):
        raise BadItem(f"{param}: {content}", param, index)
    return content


def _content(given: str, param: str, index: int | None, limit: int, kind: str = "image") -> bytes:
    header, comma, payload = given.partition(",")
    if comma and not (header.startswith(f"data:{kind}/") and header.endswith(";base64")):
        raise BadItem(f"{param}: a data URI must start with data:{kind}/…;base64,", param, index)
    payload = payload if comma else given
    if len(payload) * 3 // 4 > limit:
        raise BadItem(f"{param}: over {limit / 2**20:g} MiB; send a smaller one", param, index)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        message = f"{param}: send a data URI or base64; this service reads no paths, and URLs of allowed hosts alone"
        raise BadItem(message, param, index) from None
