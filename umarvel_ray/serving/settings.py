"""What to serve, and the limits on requests: the `args` in config.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, SecretStr, StringConstraints

from umarvel_ray.errors import UserError
from umarvel_ray.items.limits import WEB_FORMATS, MediaLimits
from umarvel_ray.yaml_text import read_yaml


class Runtime(NamedTuple):
    """Where and how a model runs."""

    device: str
    dtype: str
    threads: int | None

    def prepare(self, replicas: int = 1) -> None:
        """Prepare a process for a model; by default a deployment's replicas share the cores.

        Ray's own default is the number of logical CPUs the actor requested, which need not reflect its share.
        """
        from umarvel_ray.model.cpu import prepare_cpu  # only where a model runs: it imports PyTorch

        prepare_cpu(self.threads or max(1, (os.cpu_count() or 1) // replicas))


class Limits(BaseModel):
    """Limits on a request. Sizes are in bytes unless noted otherwise; None means no limit.

    max_pixels: of a picture or a video frame. Decoding takes up to 16 bytes per pixel: 0.25 GB at the default.
    requests_per_minute: per key and ingress replica; n replicas let up to n times as many through.
    allowed_media_hosts: hosts that pictures may be fetched from: `images.example.org`, or `*.example.org` for every
    host below it but not itself; prefix `http://` for plain HTTP, append `:8080` for another port. Empty: nothing is
    fetched.
    """

    model_config = ConfigDict(extra="forbid")

    max_items: PositiveInt = 2048  # as in OpenAI's API
    max_text: PositiveInt = 32_768  # characters
    max_request_text: PositiveInt = 4_194_304  # characters, of all items together
    max_images: PositiveInt = 8  # per item
    max_image_bytes: PositiveInt = 10_485_760
    max_pixels: PositiveInt = 16_777_216  # 4096²
    max_video_bytes: PositiveInt = 33_554_432
    max_video_seconds: PositiveFloat = 120.0
    max_video_pixels: PositiveInt = 2_000_000_000  # over all frames: a minute of 720p at 30 frames per second
    max_decode_s: PositiveFloat = 30.0  # to decode a request's pictures and videos
    decoder_bytes: PositiveInt = 1_610_612_736  # memory of a decoding process; a replica has one for every two cores
    max_answer_bytes: PositiveInt = 33_554_432  # of pictures within a search's answer; the others have their URLs
    max_body_bytes: PositiveInt = 67_108_864
    max_body_values: PositiveInt = 262_144  # strings, commas and opening brackets of the JSON
    body_timeout_s: PositiveFloat = 60.0  # for the body to arrive
    max_held_bytes: PositiveInt = 536_870_912  # bodies that an ingress replica holds at a time
    max_requests: PositiveInt = 512  # that an ingress replica answers at a time
    requests_per_minute: PositiveFloat | None = None
    allowed_media_hosts: tuple[str, ...] = ()
    remote_timeout_s: PositiveFloat = 10.0  # for all pictures of a request together, redirects included
    max_remote_bytes: PositiveInt = 67_108_864  # likewise; each picture is also limited by max_image_bytes
    unknown_fields: Literal["ignore", "forbid"] = "ignore"  # of request bodies; ignored ones are named in a header
    max_remote: PositiveInt = 256  # pictures that are fetched for a request

    def media(self) -> MediaLimits:
        """The limits for decoding pictures and videos: bytes only, no paths, and only web formats."""
        return MediaLimits(
            formats=WEB_FORMATS,
            pixels=self.max_pixels,
            video_seconds=self.max_video_seconds,
            video_pixels=self.max_video_pixels,
            only_bytes=True,
        )


class Pgvector(BaseModel):
    """Documents in a table of PostgreSQL with the pgvector extension, 0.6 or newer.

    url: postgresql://USER@HOST/DATABASE, or empty; what it lacks, such as the password, comes from the PG* variables.
    table: NAME or SCHEMA.NAME; it and NAME_state are created if they do not exist.
    exact: whether every vector is compared; otherwise an index that the table has on its vectors is used.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    kind: Literal["pgvector"]
    url: SecretStr = SecretStr("")
    table: Annotated[str, StringConstraints(pattern=r"^([A-Za-z_]\w{0,49}\.)?[A-Za-z_]\w{0,49}$")] = "documents"
    exact: bool = True

    @property
    def place(self) -> str:
        return f"table {self.table} of PostgreSQL"


class Qdrant(BaseModel):
    """Documents in a collection of Qdrant, 1.16 or newer. The environment's UMARVEL_STORE_API_KEY is the key, if any.

    url: https://HOST:6333.
    collection: it is created if it does not exist.
    exact: whether every vector is compared; otherwise Qdrant's HNSW index is used.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    kind: Literal["qdrant"]
    url: SecretStr = SecretStr("http://127.0.0.1:6333")
    collection: Annotated[str, StringConstraints(pattern=r"^\w[\w-]{0,99}$")] = "documents"
    exact: bool = True

    @property
    def place(self) -> str:
        return f"collection {self.collection} of Qdrant"


class Service(BaseModel):
    """What to serve. Without a reranker or an index, the routes that need them respond with 404.

    store: an engine that holds the documents. It takes the place of `index`, `data` and `live`, from which
    `umarvel index --config` copies them into it.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # a URL may hold a password

    embedder: str
    preset: str | None = None  # the system that released the embedder, if it is none of umarvel-ray's (docs/guide.md)
    reranker: str | None = None
    reranker_preset: str | None = None
    index: str | None = None
    data: str = "builtin:demo"
    live: str | None = None  # folder for documents that clients add; without it the index is read-only
    store: Annotated[Pgvector | Qdrant, Field(discriminator="kind")] | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    threads: int | None = Field(None, ge=1)  # per model replica on a CPU; by default the embedders share the cores
    rerank_weight: float = 1.0  # search score = cosine + weight · P(yes); evaluation prints the weight it chose
    cache_mb: int = Field(256, ge=0)  # embedding cache of each ingress replica
    keys: str | None = None  # file of API keys, in addition to UMARVEL_API_KEYS; without keys the service is open
    limits: Limits = Limits()

    @property
    def runtime(self) -> Runtime:
        return Runtime(self.device, self.dtype, self.threads)


def from_environment(service: Service) -> Service:
    """Override fields by UMARVEL_<FIELD> in the environment; an empty value removes that component.

    Raises:
        UserError: a path does not exist.
    """
    overrides = {
        name: os.environ[f"UMARVEL_{name.upper()}"] or None
        for name in Service.model_fields
        if f"UMARVEL_{name.upper()}" in os.environ
    }
    service = Service.model_validate({**service.model_dump(), **overrides})
    for name in ("embedder", "reranker", *(() if service.store else ("index",))):
        path = getattr(service, name)
        if path and not Path(path).is_dir():
            raise UserError(f"serve: {name}: no folder {path}; run `make demo` first or set UMARVEL_{name.upper()}")
    return service


def read_config(config: Path) -> tuple[Service, str, int]:
    """The service of a Serve config file, changed by the environment, and the host and the port of its HTTP.

    Raises:
        UserError: an invalid config, or a path that does not exist.
    """
    try:
        found = read_yaml(config, str(config))
        [application] = found["applications"]
        http = found["http_options"]
        service = from_environment(Service.model_validate(application.get("args") or {}))
        return service, http["host"], int(http["port"])
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{config}: not a config of one application ({reason}); start from serve/config.yaml") from None
