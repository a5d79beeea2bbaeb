"""Takes the screenshots of the search page in docs/images: `python -m tools.make_screenshots [URL]`.

Run it in the repository's root while `make serve` is running, with playwright (the extra `dev`) and chromium installed.
The queries are test queries of the shipped data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from playwright.sync_api import Browser

from tests.support.browser import open_browser
from umarvel_ray import demo

OUT = Path(__file__).parents[1] / "docs" / "images"
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
# Name: (id of the query, whether to rerank, browser options).
SHOTS = {
    "desktop": ("20:12848", False, DESKTOP),
    "dark": ("22:18087", True, DESKTOP | {"color_scheme": "dark"}),
    "phone": ("24:415", False, PHONE),
}


def main(url: str) -> None:
    """Take all screenshots."""
    OUT.mkdir(exist_ok=True)
    queries = pq.read_table(demo.DATA / "test.parquet")
    with open_browser() as browser:
        for name, (query_id, rerank, options) in SHOTS.items():
            [query] = queries.filter(pc.field("id") == query_id).to_pylist()
            shoot(browser, url, query, rerank, options, OUT / f"search-{name}.png")


def shoot(browser: Browser, url: str, query: dict, rerank: bool, options: dict, out: Path) -> None:
    """Search as a user would, and save what is visible without scrolling."""
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.get_by_role("switch", name="Rerank").set_checked(rerank)
    page.get_by_label("Instruction", exact=True).fill(query["instruction"])
    page.get_by_label("Text to search for").fill(query["text"] or "")
    picture = {"name": "picture.webp", "mimeType": "image/webp", "buffer": query["image"]}
    page.get_by_label("Add a picture").set_input_files(picture)
    page.locator(".meta").first.wait_for()
    page.evaluate("document.activeElement.blur()")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=out)
    page.context.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
