"""Open videos from anywhere as a few frames spread evenly; a bad one ends as one `BadVideo` line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from umarvel_ray.data.images import open_image, open_stream
from umarvel_ray.errors import UserError


class BadVideo(UserError):
    """A video that cannot be used."""


class Video(NamedTuple):
    """Upright RGB frames of one size, and the second each is shown at."""

    frames: list[Image.Image]
    seconds: list[float]


def open_video(video: str | Path | bytes | Sequence[Any], most: int, where: str) -> Video:
    """At most `most` frames, the first and the last among them.

    Args:
        video: a path, a `data:` URI, encoded bytes, or a list of pictures, taken as one frame a second.
        where: names the video in errors (file and row, or id).

    Raises:
        BadVideo: missing, unreadable, without a frame, or a URL.
        BadImage: a picture of a list that cannot be used.
    """
    if isinstance(video, list | tuple):
        if not video:
            raise BadVideo(f"{where}: the video has no frame")
        chosen = spread(len(video), most)
        frames = [open_image(video[n], f"{where}, frame {n}") for n in chosen]
        return Video([frame.resize(frames[0].size) for frame in frames], [float(n) for n in chosen])
    try:
        with open_stream(video, where, "video") as stream:
            return _decode(stream, most, where)
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


def _decode(stream: Any, most: int, where: str) -> Video:
    count = _count(stream)
    if not count:
        raise BadVideo(f"{where}: the video has no frame")
    wanted = set(spread(count, most))
    frames, seconds = [], []
    with _container(stream) as container:
        for number, frame in enumerate(islice(container.decode(video=0), max(wanted) + 1)):
            if number in wanted:
                frames.append(frame.to_image().rotate(frame.rotation, expand=True))
                seconds.append(float(frame.time) if frame.time is not None else float(number))
    return Video(frames, [second - seconds[0] for second in seconds])


def _count(stream: Any) -> int:
    # Counted, not asked: containers say a wrong number, or none.
    with _container(stream) as container:
        if not container.streams.video:
            return 0
        count = sum(1 for _ in container.decode(video=0))
    stream.seek(0)
    return count


def _container(stream: Any) -> Any:
    import av  # here, because only video files need it: not every machine has it

    return av.open(stream)
