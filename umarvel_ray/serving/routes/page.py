"""The search page: three static files, read once, with a policy that lets the browser load nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[1] / "page"
TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
FILES = {name: (FOLDER / name).read_bytes() for name in TYPES}
POLICY = {  # data: pictures of documents; blob: a dropped picture before it is sent
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # cached, but revalidated by ETag: an updated service shows its own page at once
}


@router.get("/")
async def index(request: Request) -> Response:
    return _file("index.html", request)


@router.get("/static/{name}")
async def file(name: str, request: Request) -> Response:
    if name not in FILES:
        raise HTTPException(404, f"the page has no file {name}")
    return _file(name, request)


def _file(name: str, request: Request) -> Response:
    tag = f'"{hashlib.sha256(FILES[name]).hexdigest()[:16]}"'
    headers = HEADERS | {"ETag": tag}
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(FILES[name], media_type=TYPES[name], headers=headers)
