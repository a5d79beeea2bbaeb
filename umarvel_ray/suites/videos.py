"""A text to a video: MSR-VTT and MSVD."""

from __future__ import annotations

from pathlib import Path

from umarvel_ray.suites.captions import RECALLS
from umarvel_ray.suites.files import read_csv, read_lines, read_pickle
from umarvel_ray.suites.suite import EVERY_TASK, Content, Document, Query, Rerank, Suite

MATCHES = {EVERY_TASK: "Find an everyday video match with caption."}


def _msr_vtt(root: Path) -> Content:
    rows = read_csv(root / "MSRVTT_JSFUSION_test.csv")
    videos = [row["video_id"] for row in rows]
    documents = [Document(id_, video=f"MSRVTT_Videos/{id_}.mp4") for id_ in dict.fromkeys(videos)]
    queries = [Query(f"q{n}", "msr-vtt", [row["video_id"]], text=row["sentence"]) for n, row in enumerate(rows)]
    return Content(documents, queries, {"msr-vtt": list(dict.fromkeys(videos))})


MSR_VTT = Suite(
    name="msr-vtt",
    title="MSR-VTT",
    files=("MSRVTT_JSFUSION_test.csv", "MSRVTT_Videos/"),
    source="https://github.com/ArrowLuo/CLIP4Clip (links to the 1k-A split and the videos)",
    read=_msr_vtt,
    metrics=RECALLS,
    instructions=MATCHES,
    settings={"video_fps": 2.0, "video_frames": 768, "max_pixels": 768 * 28 * 28, "max_video_pixels": 24_576 * 28 * 28},
    rerank=Rerank(weights={EVERY_TASK: 0.2}),  # 5 · cosine + P(yes)
)


def _msvd(root: Path) -> Content:
    captions = read_pickle(root / "raw-captions.pkl")
    videos = read_lines(root / "test_list.txt")
    documents = [Document(id_, video=f"YouTubeClips/{id_}.avi") for id_ in videos]
    queries = [
        Query(f"{id_} {number}", "msvd", [id_], text=" ".join(words))
        for id_ in videos
        for number, words in enumerate(captions[id_])
    ]
    return Content(documents, queries, {"msvd": videos})


MSVD = Suite(
    name="msvd",
    title="MSVD",
    files=("test_list.txt", "raw-captions.pkl", "YouTubeClips/"),
    source="https://github.com/ArrowLuo/CLIP4Clip (links to the split and the videos)",
    read=_msvd,
    metrics=RECALLS,
    instructions=MATCHES,
    settings={"video_frames": 12},
)
