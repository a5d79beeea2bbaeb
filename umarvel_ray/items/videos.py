"""Open untrusted videos as a few evenly spaced frames; any bad one raises a one-line `BadVideo`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from umarvel_ray.errors import UserError
from umarvel_ray.items.images import check_aspect, open_image, open_stream
from umarvel_ray.items.limits import OWN_FILES, MediaLimits

# Self-contained formats only: a playlist (HLS, DASH, concat) names files and addresses that FFmpeg would open.
CONTAINERS = ("asf", "avi", "flv", "gif", "matroska", "mov", "mpeg", "mpegts", "ogg", "webm")

MAX_STREAMS = 32  # per container: FFmpeg decodes a frame of each to identify it
MIN_FRAMES = 4  # of a video whose frames are taken at a rate
MIN_FRAME_PIXELS = 16_384  # counted per frame at least, so that a million tiny frames exceed the limit too


class BadVideo(UserError):
    """An unusable video."""


class Video(NamedTuple):
    """Upright RGB frames of one size, and the time of each in seconds, the first at 0."""

    frames: list[Image.Image]
    seconds: list[float]


def open_video(
    video: str | Path | bytes | list[Any] | tuple[Any, ...],
    max_frames: int,
    where: str,
    limits: MediaLimits = OWN_FILES,
    fps: float | None = None,
) -> Video:
    """Decode at most `max_frames` evenly spaced frames, including the first and the last.

    Args:
        video: a path, a `data:` URI, encoded bytes, or a list of pictures, taken as one frame per second.
        where: names the video in errors (file and row, or id).
        limits: lengths and sizes that are accepted.
        fps: take about so many frames of each second; see `frame_count`.

    Raises:
        BadVideo: missing, unreadable, without frames, over a limit, a playlist, or given by URL.
        BadImage: an unusable picture of a list.
    """
    if isinstance(video, list | tuple):
        if not video:
            raise BadVideo(f"{where}: the video has no frames")
        if len(video) > limits.video_seconds:
            raise _too_long(where, limits)
        chosen = spread(len(video), frame_count(len(video), len(video), max_frames, fps))
        frames = [open_image(video[n], f"{where}, frame {n}", limits) for n in chosen]
        return Video(_of_one_size(frames), [float(n) for n in chosen])
    try:
        with open_stream(video, where, "video", limits) as stream:
            return _decode(stream, max_frames, where, limits, fps)
    except UserError as error:
        raise BadVideo(str(error)) from None
    except FileNotFoundError as error:
        raise BadVideo(f"{where}: video {error.filename} not found") from None
    # Decoders raise anything on malformed bytes.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadVideo(f"{where}: video cannot be read ({type(error).__name__}: {reason})") from None


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 … count − 1, evenly spaced, including both ends."""
    return [int(n) for n in np.linspace(0, count - 1, min(limit, count)).round()]


def frame_count(count: int, seconds: float, limit: int, fps: float | None) -> int:
    """How many of `count` frames to take: at most `limit`; at a rate an even number of at least 4, if there are."""
    if fps is None:
        return min(count, limit)
    wanted = min(max(int(seconds * fps), MIN_FRAMES), limit, count)
    return max(1, wanted - wanted % 2)


def _decode(stream: Any, max_frames: int, where: str, limits: MediaLimits, fps: float | None) -> Video:
    with _container(stream, limits) as container:  # counted, since containers may state no count or a wrong one
        times = [frame.time for frame in _frames(container, where, limits)]
    count = len(times)
    if not count:
        raise BadVideo(f"{where}: the video has no frames")
    stream.seek(0)
    wanted = set(spread(count, frame_count(count, _duration(times), max_frames, fps)))
    frames, seconds = [], []
    with _container(stream, limits) as container:
        for number, frame in enumerate(islice(_frames(container, where, limits), max(wanted) + 1)):
            if number in wanted:
                frames.append(frame.to_image().rotate(frame.rotation, expand=True))
                seconds.append(float(frame.time) if frame.time is not None else float(number))
    check_aspect(frames[0].size, where)
    return Video(_of_one_size(frames), [second - seconds[0] for second in seconds])


def _duration(times: list[float | None]) -> float:
    """Seconds that frames are shown for, the last as long as the others on average; without times, one second each."""
    if times[0] is None or times[-1] is None or len(times) == 1:
        return float(len(times))
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)


def _of_one_size(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames as large as the first: a stream may change its resolution or orientation."""
    return [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames]


def _frames(container: Any, where: str, limits: MediaLimits) -> Iterator[Any]:
    """The frames of the first video stream.

    Raises:
        BadVideo: a limit is exceeded.
    """
    if not container.streams.video:
        return
    stream = container.streams.video[0]
    if stream.width * stream.height > limits.pixels:
        raise BadVideo(f"{where}: video of {stream.width}×{stream.height} is over {limits.pixels} pixels")
    stream.codec_context.options = _options(limits)  # later frames may be larger than the header says
    started, pixels = None, 0
    for frame in container.decode(stream):
        pixels += max(frame.width * frame.height, MIN_FRAME_PIXELS)
        if pixels > limits.video_pixels:
            raise BadVideo(f"{where}: the video's frames are over {limits.video_pixels} pixels in total")
        if frame.time is not None:
            started = frame.time if started is None else started
            if frame.time - started > limits.video_seconds:
                raise _too_long(where, limits)
        yield frame


def _container(stream: Any, limits: MediaLimits) -> Any:
    import av  # optional; only video files need it

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
    return {"max_pixels": str(2 * limits.pixels + 2**16)}  # decoders count padding too


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a video may not open other files")


def _too_long(where: str, limits: MediaLimits) -> BadVideo:
    return BadVideo(f"{where}: the video is longer than {limits.video_seconds:g} seconds")
