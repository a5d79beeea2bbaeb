"""Items as clients send them, and their conversion to library items.

An item is a bare string (text) or `{"text"?, "image"?, "video"?, "instruction"?}`; chat messages and Cohere's content
parts are other notations for it. Pictures arrive as data URIs, bare base64, or URLs of allowed hosts. They become bytes
here, so no code past this module ever sees a path chosen by a client.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, Tag

from umarvel_ray.items.images import one_or_several
from umarvel_ray.serving.errors import BadItem
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.remote import BadRemote
from umarvel_ray.serving.settings import Limits

URL = ("http://", "https://")
FILE = ("data:image/", "data:video/")
URL_ALPHABET, WHITESPACE = bytes.maketrans(b"-_", b"+/"), b" \t\r\n"


# A union's branch is chosen by the JSON type, so that an invalid value gets a single error, about the intended branch.
# The tags contain spaces so that `validation_error` can tell them from keys.
_TAGS: dict[type, str] = {str: "a string", dict: "an item", list: "a list"}
String = Annotated[str, Tag("a string")]


def by_type(message: str) -> Discriminator:
    """Choose a string, an item or a list by the JSON type; `message` is the error for any other type."""

    def tag(value: Any) -> str | None:
        return _TAGS.get(dict if isinstance(value, BaseModel) else type(value))

    return Discriminator(tag, custom_error_type="item", custom_error_message=message)


Strings = Annotated[
    String | Annotated[list[str], Field(fail_fast=True), Tag("a list")], by_type("give a string or a list of strings")
]


class Item(Body):
    """Text, pictures, a video, or a combination. The instruction says what to look for (queries only).

    Unknown keys are errors here: a misspelled one would change what is embedded.
    """

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"text": "a red car", "instruction": "Find a picture."}]}
    )

    text: str | None = None
    image: Strings | None = Field(
        default=None,
        validation_alias=AliasChoices("image", "url", "bytes"),  # the latter two are Jina's
        description="data URI, base64, or a URL of an allowed host",
    )
    video: str | None = Field(default=None, description="data URI or base64")
    instruction: str | None = None

    @property
    def images(self) -> list[str]:
        return [self.image] if isinstance(self.image, str) else self.image or []


_Item = Annotated[Item, Tag("an item")]
OneItem = Annotated[String | _Item, by_type("give a string or an item {text, image, video, instruction}")]
Items = Annotated[list[OneItem], Field(min_length=1, fail_fast=True)]
OneOrMore = Annotated[
    String | _Item | Annotated[Items, Tag("a list")],
    by_type("give a string, an item {text, image, video, instruction}, or a list of them"),
]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Url(Body):
    url: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Url


class VideoPart(Body):
    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | ImagePart | VideoPart, Discriminator("type")]
Parts = Annotated[list[Part], Field(min_length=1, fail_fast=True)]


class Content(Body):
    """An item as content parts, as vLLM writes it."""

    content: Annotated[String | Annotated[Parts, Tag("a list")], by_type("give a string or a list of parts")]

    @property
    def item(self) -> Item:
        return Item(text=self.content) if isinstance(self.content, str) else item_of_parts(self.content)


def _form(value: Any) -> str | None:
    """How an item or a list of items is written."""
    if isinstance(value, dict):
        return "content" if "content" in value else "an item"
    if isinstance(value, BaseModel):
        return "content" if isinstance(value, Content) else "an item"
    return _TAGS.get(type(value))


_Content = Annotated[Content, Tag("content")]
OneOrParts = Annotated[
    String | _Item | _Content,
    Discriminator(_form, custom_error_type="item", custom_error_message="give a string, an item or {content}"),
]
ItemsOrParts = Annotated[list[OneOrParts], Field(min_length=1, fail_fast=True)]
OneOrMoreOrParts = Annotated[
    String | _Item | _Content | Annotated[ItemsOrParts, Tag("a list")],
    Discriminator(
        _form, custom_error_type="item", custom_error_message="give a string, an item, {content}, or a list of them"
    ),
]


def plain(given: Any) -> Any:
    """The same items, content parts among them as items."""
    if isinstance(given, list):
        return [plain(one) for one in given]
    return given.item if isinstance(given, Content) else given


def item_of_parts(parts: Sequence[Part]) -> Item:
    """The item described by content parts: texts joined by line breaks, all pictures, the last video."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    videos = [part.video_url.url for part in parts if isinstance(part, VideoPart)]
    return Item(text="\n".join(texts) or None, image=images or None, video=videos[-1] if videos else None)


def place(name: str, index: int | None) -> str:
    """The place of an item in the request body: `query`, or `documents[3]`."""
    return name if index is None else f"{name}[{index}]"


def characters(item: str | Item) -> int:
    """How long the item's text and instruction are together."""
    return len(item) if isinstance(item, str) else len(item.text or "") + len(item.instruction or "")


def remote_images(item: str | Item, limit: int) -> list[str]:
    """The item's pictures that are URLs; none if it has more pictures than `limit`, for then it is refused anyway."""
    if isinstance(item, str) or len(item.images) > limit:
        return []
    return [image for image in item.images if image.startswith(URL)]


def library_item(
    item: str | Item, where: str, index: int | None, limits: Limits, fetched: Mapping[str, bytes | BadRemote]
) -> dict[str, Any]:
    """Convert a client's item to a library item; pictures and video are bytes, not yet decoded.

    Args:
        fetched: the content of its URLs.

    Raises:
        BadItem: the item is empty, exceeds a limit, or holds a path, a URL that is not fetched, or invalid base64.
    """
    if isinstance(item, str) and item.startswith(FILE):
        raise BadItem(f'{where}: a string is a text, and this is a file; send {{"image": …}}', where, index)
    item = Item(text=item) if isinstance(item, str) else item
    for name in ("text", "instruction"):
        _check_text(getattr(item, name) or "", f"{where}.{name}", index, limits.max_text)
    if len(item.images) > limits.max_images:
        raise BadItem(f"{where}.image: over {limits.max_images} pictures in one item", f"{where}.image", index)
    parts: dict[str, Any] = {"text": item.text, "instruction": item.instruction}
    pictures = [
        _fetched(fetched[image], f"{where}.image", index)
        if image in fetched
        else _content(image, f"{where}.image", index, limits.max_image_bytes)
        for image in item.images
    ]
    parts["image"] = one_or_several(pictures)
    if item.video:
        parts["video"] = _content(item.video, f"{where}.video", index, limits.max_video_bytes, "video")
    parts = {key: value for key, value in parts.items() if value}
    if not parts.keys() & {"text", "image", "video"}:
        raise BadItem(f"{where}: an item needs text, image or video", where, index)
    return parts


def _check_text(text: str, param: str, index: int | None, limit: int) -> None:
    if len(text) > limit:
        raise BadItem(f"{param}: over {limit} characters; shorten it or split it into several items", param, index)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON allows \ud800
        raise BadItem(f"{param}: contains an unpaired surrogate, which is not a character", param, index) from None


def _fetched(content: bytes | BadRemote, param: str, index: int | None) -> bytes:
    if isinstance(content, BadRemote):
        raise BadItem(f"{param}: {content}", param, index)
    return content


def _content(value: str, param: str, index: int | None, limit: int, kind: str = "image") -> bytes:
    header, comma, payload = value.partition(",")
    if comma and not re.fullmatch(rf"data:({kind}/[^,;]*|application/octet-stream)?(;[^,;]+)*;base64", header, re.I):
        raise BadItem(f"{param}: a data URI must start with data:{kind}/…;base64,", param, index)
    payload = payload if comma else value
    if len(payload) * 3 // 4 > limit + limit // 32:  # line breaks may be among it
        raise BadItem(f"{param}: over {limit / 2**20:g} MiB; send a smaller file", param, index)
    try:
        # As mail and browsers write base64: with line breaks, with the alphabet of URLs, without padding.
        digits = payload.encode("ascii").translate(URL_ALPHABET, WHITESPACE)
        content = base64.b64decode(digits.rstrip(b"=") + b"=" * (-len(digits.rstrip(b"=")) % 4), validate=True)
        if len(content) > limit:
            raise BadItem(f"{param}: over {limit / 2**20:g} MiB; send a smaller file", param, index)
        return content
    except (binascii.Error, ValueError):
        message = (
            f"{param}: send a data URI or base64; paths are not read, and URLs are fetched only from allowed hosts"
        )
        raise BadItem(message, param, index) from None
