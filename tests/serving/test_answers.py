"""What a search's answer carries, and how the errors of the index reach a client."""

import asyncio
import base64
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.support.tiny_run import picture
from umarvel_ray.errors import UserError
from umarvel_ray.index.hits import Hit, media_bytes
from umarvel_ray.index.log import NoSpace
from umarvel_ray.serving.backend import Backend
from umarvel_ray.serving.errors import NotServed, add_handlers
from umarvel_ray.serving.routes.search import _fill, _result, image

PICTURES = [picture(n) for n in range(4)]
LABELS = {"modality": "image,text", "source": "s"}
HITS = [
    Hit({"id": f"d/{n}", "text": f"text {n}", "image": image, "video": None, **LABELS}, 0.5)
    for n, image in enumerate(PICTURES)
]
TWO = len(PICTURES[0]) + len(PICTURES[1])


class Replica:
    """A search deployment that has all documents but the last and gives two at a time."""

    def __init__(self) -> None:
        self.asked = []
        self.documents = SimpleNamespace(remote=self._documents)

    async def _documents(self, ids, max_bytes):
        self.asked.append(ids)
        known = {hit.document["id"]: hit.document for hit in HITS[:-1]}
        return [known.get(id_) for id_ in ids[:2]]


def backend_of(replica: Replica, answer_bytes: int) -> Backend:
    backend = Backend.__new__(Backend)
    backend._search, backend._index_budget = replica, SimpleNamespace(earn=lambda: None)
    backend.limits = SimpleNamespace(max_answer_bytes=answer_bytes)
    return backend


def test_hits_travel_without_pictures_and_get_them_in_parts():
    replica = Replica()
    light = [hit.light for hit in HITS]
    assert all("image" not in hit.document and hit.has_media for hit in light)
    assert [media_bytes(hit.document) for hit in HITS] == [len(one) for one in PICTURES]

    async def collect():
        return [hit async for part in backend_of(replica, 0).with_media(light) for hit in part]

    whole = asyncio.run(collect())
    assert [hit.document for hit in whole] == [*(hit.document for hit in HITS[:-1]), light[-1].document]
    assert replica.asked == [["d/0", "d/1", "d/2", "d/3"], ["d/2", "d/3"]]


@pytest.mark.parametrize(("room", "inlined", "asked"), [(2**30, 3, 2), (TWO, 2, 2), (9, 0, 1)])
def test_an_answer_is_bounded_and_the_other_pictures_have_urls(room, inlined, asked):
    replica, light = Replica(), [hit.light for hit in HITS]
    results = [_result(hit, "/root") for hit in light]
    asyncio.run(_fill(results, light, backend_of(replica, room)))
    assert [bool(one.document.image) for one in results] == [True] * inlined + [False] * (4 - inlined)
    assert [one.document.text for one in results] == [f"text {n}" for n in range(4)]
    assert results[3].image_url == "/root/v1/documents/d%2F3/image"
    assert len(replica.asked) == asked  # nothing is fetched that does not fit


def test_all_pictures_of_a_document_are_in_the_answer_and_at_addresses_of_their_own():
    document = {"id": "d", "text": None, "image": PICTURES[:3], "modality": "image", "source": "s"}
    light = Hit(document, 0.5).light
    [result] = results = [_result(light, "")]
    assert result.image_url == "/v1/documents/d/image"
    assert result.image_urls == ["/v1/documents/d/image", "/v1/documents/d/image?n=1", "/v1/documents/d/image?n=2"]

    class Lists(Replica):
        async def _documents(self, ids, max_bytes):
            return [document for _ in ids]

    backend = backend_of(Lists(), 2**30)
    asyncio.run(_fill(results, [light], backend))
    assert [base64.b64decode(uri.partition(",")[2]) for uri in result.document.image] == PICTURES[:3]
    for n in range(3):
        assert asyncio.run(image("d", backend, n)).body == PICTURES[n]
    with pytest.raises(NotServed, match="no such picture"):
        asyncio.run(image("d", backend, 3))


def test_a_text_has_no_picture_to_fetch():
    text = Hit({"id": "a", "text": "b", "modality": "text", "source": "s"}, 0.5)
    replica = Replica()
    results = [_result(text, "")]
    asyncio.run(_fill(results, [text], backend_of(replica, 9)))
    assert (results[0].image_url, results[0].document.text, replica.asked) == (None, "b", [])


def test_a_full_disk_is_507():
    app = FastAPI()
    add_handlers(app)

    @app.get("/")
    async def full() -> None:
        raise NoSpace("cannot write /srv/live/log-1: No space left on device")

    response = TestClient(app).get("/")
    assert response.status_code == 507
    assert response.json()["error"]["type"] == "insufficient_storage"
    assert "/srv" not in response.text
    assert issubclass(NoSpace, UserError)
