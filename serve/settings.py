"""What the service takes from clients: one typed place for every limit."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from umarvel_ray.data.limits import WEB_FORMATS, MediaLimits


class Limits(BaseModel):
    """Limits on a request. Sizes are bytes unless named otherwise; None is no limit.

    max_pixels: of a picture or a video's frame. A picture takes up to 16 bytes a pixel while it is opened, and as many
    pictures are opened at once as there are threads (cores + 4): 0.25 GB each at the default.
    requests_per_minute: of one key, at one replica of the ingress: n replicas let up to n times as many pass.
    allowed_media_hosts: where pictures may be fetched from: `images.example.org`, `*.example.org` (every host below it,
    not itself), with `http://` in front for plain HTTP and `:8080` behind for another port. Empty: nothing is fetched.
    """

    model_config = ConfigDict(extra="forbid")

    max_items: PositiveInt = 96  # as Cohere
    max_text: PositiveInt = 32_768  # characters
    max_image_bytes: PositiveInt = 10_485_760
    max_pixels: PositiveInt = 16_777_216  # 4096²
    max_video_bytes: PositiveInt = 33_554_432
    max_video_seconds: PositiveFloat = 120.0
    max_video_pixels: PositiveInt = 2_000_000_000  # of all frames together: a minute of 720p at 30 frames a second
    max_body_bytes: PositiveInt = 67_108_864
    requests_per_minute: PositiveFloat | None = None
    allowed_media_hosts: tuple[str, ...] = ()
    remote_timeout_s: PositiveFloat = 10.0  # for all of a request's pictures together, redirects included
    max_remote_bytes: PositiveInt = 67_108_864  # the same; each picture has max_image_bytes

    def media(self) -> MediaLimits:
        """The same for what opens pictures and videos: bytes only, in the web's formats."""
        return MediaLimits(
            formats=WEB_FORMATS,
            pixels=self.max_pixels,
            video_seconds=self.max_video_seconds,
            video_pixels=self.max_video_pixels,
            only_bytes=True,
        )
