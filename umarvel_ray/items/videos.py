"""Open videos from anywhere as a few frames spread evenly; a bad one ends as one `BadVideo` line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from umarvel_ray.errors import UserError
from umarvel_ray.items.images import open_image, open_stream
from umarvel_ray.items.limits import OWN_FILES, MediaLimits

# Containers that hold their streams themselves: a playlist (HLS, DASH, concat) would name files and addresses to open.
CONTAINERS = ("asf", "avi", "flv", "gif", "matroska", "mov", "mpeg", "mpegts", "ogg", "webm")

MAX_STREAMS = 32  # of a container: a frame of each is decoded to learn what it is
LEAST_FRAME = 16_384  # pixels: what a frame is counted as at least, so that a million tiny ones are over a limit too


class BadVideo(UserError):
    """A video that cannot be used."""


class Video(NamedTuple):
    """Upright RGB frames of one size, and the second each is shown at."""

    frames: list[Image.Image]
    seconds: list[float]


def open_video(
    video: str | Path | bytes | Sequence[Any], most: int, where: str, limits: MediaLimits = OWN_FILES
) -> Video:
    """At most `most` frames, the first and the last among them.

    Args:
        video: a path, a `data:` URI, encoded bytes, or a list of pictures, taken as one frame a second.
        where: names the video in errors (file and row, or id).

    Raises:
        BadVideo: missing, unreadable, without a frame, over a limit, a playlist, or a URL.
        BadImage: a picture of a list that cannot be used.
    """
    if isinstance(video, list | tuple):
        if not video:
            raise BadVideo(f"{where}: the video has no frame")
        if len(video) > limits.video_seconds:
            raise _too_long(where, limits)
        chosen = spread(len(video), most)
        frames = [open_image(video[n], f"{where}, frame {n}", limits) for n in chosen]
        return Video([frame.resize(frames[0].size) for frame in frames], [float(n) for n in chosen])
    try:
        with open_stream(video, where, "video", limits) as stream:
            return _decode(stream, most, where, limits)
    except UserError as error:
        raise BadVideo(str(error)) from None
    except FileNotFoundError:
        raise BadVideo(f"{where}: video {video} not found") from None
    # Decoders raise what they like on hostile bytes.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadVideo(f"{where}: video cannot be read ({type(error).__name__}: {reason})") from None


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 … count − 1, evenly apart, the ends among them."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def _decode(stream: Any, most: int, where: str, limits: MediaLimits) -> Video:
    with _container(stream, limits) as container:  # counted, not asked: containers say a wrong number, or none
        count = sum(1 for _ in _frames(container, where, limits))
    if not count:
        raise BadVideo(f"{where}: the video has no frame")
    stream.seek(0)
    wanted = set(spread(count, most))
    frames, seconds = [], []
    with _container(stream, limits) as container:
        for number, frame in enumerate(islice(_frames(container, where, limits), max(wanted) + 1)):
            if number in wanted:
                frames.append(frame.to_image().rotate(frame.rotation, expand=True))
                seconds.append(float(frame.time) if frame.time is not None else float(number))
    return Video(frames, [second - seconds[0] for second in seconds])


def _frames(container: Any, where: str, limits: MediaLimits) -> Iterator[Any]:
    """The frames of the first video stream, as long as they keep the limits."""
    if not container.streams.video:
        return
    stream = container.streams.video[0]
    if stream.width * stream.height > limits.pixels:
        raise BadVideo(f"{where}: video of {stream.width}×{stream.height} is over {limits.pixels} pixels")
    stream.codec_context.options = _options(limits)  # its later frames may be larger than it says
    started, pixels = None, 0
    for frame in container.decode(stream):
        pixels += max(frame.width * frame.height, LEAST_FRAME)
        if pixels > limits.video_pixels:
            raise BadVideo(f"{where}: the video's frames are over {limits.video_pixels} pixels together")
        if frame.time is not None:
            started = frame.time if started is None else started
            if frame.time - started > limits.video_seconds:
                raise _too_long(where, limits)
        yield frame


def _container(stream: Any, limits: MediaLimits) -> Any:
    import av  # here, because only video files need it: not every machine has it

    return av.open(
        stream,
        options=_options(limits),
        container_options={
            "format_whitelist": ",".join(CONTAINERS),
            "protocol_whitelist": "",
            "max_streams": str(MAX_STREAMS),
        },
        io_open=_refuse,
    )


def _options(limits: MediaLimits) -> dict[str, str]:
    return {"max_pixels": str(2 * limits.pixels + 2**16)}  # decoders count their padding too


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a video opens no other file")


def _too_long(where: str, limits: MediaLimits) -> BadVideo:
    return BadVideo(f"{where}: the video is longer than {limits.video_seconds:g} seconds")
