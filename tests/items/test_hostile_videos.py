"""Malicious videos: no container opens a file or an address, and none exceeds the limits."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.items.test_hostile_images import SCRAMBLE, outcome, scrambled
from tests.items.test_videos import film
from umarvel_ray.items.limits import MediaLimits
from umarvel_ray.items.videos import BadVideo, Video, open_video
from umarvel_ray.serving.settings import Limits

CLIENT = Limits().media()


def coded(codec: str, container: str, side: int = 64) -> bytes:
    """Five black square frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as made:
        stream = made.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(5):
            made.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")))
        made.mux(stream.encode())
    return out.getvalue()


FILMS = {"mp4": film(4), "ts": coded("mpeg2video", "mpegts"), "mkv": coded("libx264", "matroska")}


@pytest.fixture(scope="module")
def requests():
    """A server on loopback: its address, and the list of paths requested from it."""
    paths: list[str] = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "dash": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"'
        ' profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
        '<Representation id="1" bandwidth="1" width="64" height="48"><BaseURL>{}</BaseURL><SegmentBase/>'
        "</Representation></AdaptationSet></Period></MPD>"
    ),
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na={}\n",
    "smil": "<smil><body><video src='{}'/></body></smil>",
}


@pytest.mark.parametrize("limits", [CLIENT, MediaLimits()], ids=["client", "own"])
def test_a_playlist_opens_nothing(tmp_path, requests, limits, monkeypatch):
    path = tmp_path / "film.mkv"
    path.write_bytes(FILMS["mkv"])
    address, paths = requests
    monkeypatch.chdir(tmp_path)
    with av.open(io.BytesIO(PLAYLISTS["concat"].format(path.name).encode())) as read:  # PyAV alone would read the file
        assert sum(1 for _ in read.decode(video=0)) == 5
    for playlist in PLAYLISTS.values():
        for target in (str(path), f"file://{path}", path.name, f"{address}/film.mkv", f"tcp://{address[7:]}"):
            with pytest.raises(BadVideo, match="cannot be read"):
                open_video(playlist.format(target).encode(), 2, "x", limits)
    assert paths == []


def test_every_limit_is_enforced():
    data = film(10)  # 64 × 48, 5 frames a second
    assert len(open_video(data, 4, "x", CLIENT).frames) == 4
    for limits, message in (
        (MediaLimits(pixels=64 * 48 - 1), "64×48 is over 3071 pixels"),
        (MediaLimits(video_seconds=1.7), r"longer than 1\.7 seconds"),
        (MediaLimits(video_pixels=10 * 16_384 - 1), "over 163839 pixels in total"),
    ):
        with pytest.raises(BadVideo, match=message):
            open_video(data, 4, "x", limits)
    enough = MediaLimits(pixels=64 * 48, video_seconds=1.8, video_pixels=10 * 16_384)
    assert len(open_video(data, 4, "x", enough).frames) == 4


def test_later_frames_may_not_exceed_the_limit():
    growing = FILMS["ts"] + coded("mpeg2video", "mpegts", side=1024)
    assert {frame.size for frame in open_video(growing, 9, "x").frames} == {(64, 64)}
    with pytest.raises(BadVideo, match="cannot be read"):
        open_video(growing, 9, "x", MediaLimits(pixels=100_000))


def test_stills_count_as_seconds():
    still = film_still()
    assert len(open_video([still] * 3, 2, "x", MediaLimits(video_seconds=3)).frames) == 2
    with pytest.raises(BadVideo, match="longer than 3 seconds"):
        open_video([still] * 4, 2, "x", MediaLimits(video_seconds=3))


def film_still() -> bytes:
    stream = io.BytesIO()
    open_video(film(1), 1, "x").frames[0].save(stream, "PNG")
    return stream.getvalue()


@settings(max_examples=100)
@given(st.sampled_from(sorted(FILMS)), SCRAMBLE)
def test_scrambled_videos_are_videos_or_one_line(name, edits):
    data = scrambled(FILMS[name], edits)
    assert isinstance(outcome(lambda: open_video(data, 2, "input[0]", CLIENT)), Video | str)
