"""The search page in a real browser: it shows what the HTTP API returns, for every kind of query."""

from __future__ import annotations

import base64
import io
import re
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from ray import serve

from tests.support.served import call, service_of
from tests.support.tiny_run import FIND_A_PICTURE as INSTRUCTION
from tests.support.tiny_run import FIND_A_TEXT, TEXTS, picture
from umarvel_ray.serving.app import build

pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it is in the extra `dev`")
from playwright.sync_api import Page, expect

from tests.support.browser import CHROMIUM, open_browser

expect.set_options(timeout=20_000)  # a busy machine is not a failure

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path; install it (Debian: chromium)")

KINDS = {"text": "text", "image": "picture", "image,text": "picture with text"}
PNG = {"name": "three.png", "mimeType": "image/png", "buffer": picture(3)}
FOCUSED = """() => {
  const { ariaLabel, labels, textContent } = document.activeElement;
  return ariaLabel ?? (labels?.[0]?.textContent ?? textContent).trim().split("\\n")[0];
}"""
RING = "getComputedStyle(document.activeElement.closest('.cover') ?? document.activeElement).outlineStyle"
TRANSFER = """([name, type, content]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""


@pytest.fixture(scope="module")
def url(address, run):
    serve.run(build(service_of(run)), name="umarvel", route_prefix="/")
    return address


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@contextmanager
def watched(browser, url: str, **options):
    """A page in a new context; fails on any browser complaint (policy, scripts) and any request to another host."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints, elsewhere = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert [one for one in complaints if not one.startswith("Failed to load resource")] == []  # an error's status
    assert [one for one in elsewhere if not one.startswith((url.split("#")[0], "data:", "blob:"))] == []


@pytest.fixture
def page(browser, url):
    with watched(browser, url) as page:
        expect(page.get_by_label("Instruction", exact=True)).to_have_value(INSTRUCTION)
        page.get_by_label("Instruction", exact=True).fill("")
        page.get_by_label("Text to search for").focus()
        yield page


def search_results(url: str, query: dict, **body) -> list[dict]:
    status, response, _ = call(f"{url}/v1/search", {"query": query, "top_k": 12, "return_documents": True} | body)
    assert status == 200, response
    return response["results"]


def expect_results(page: Page, results: list[dict]) -> None:
    """Wait until the page shows these results, in this order, with their scores."""
    lines = [f"{one['source']} · {KINDS[one['modality']]} · {one['id']}" for one in results]
    expect(page.locator(".meta")).to_have_text(lines)
    scores = [float(text) for text in page.locator(".score dd:first-of-type").all_inner_texts()]
    np.testing.assert_allclose(scores, [one["score"] for one in results], atol=6e-4)


def search_text(page: Page, text: str) -> None:
    page.get_by_label("Text to search for").fill(text)
    page.get_by_role("button", name="Search").click()


def add_picture(page: Page, method: str, name: str, kind: str, content: bytes) -> None:
    if method == "chosen":
        page.get_by_label("Add a picture").set_input_files({"name": name, "mimeType": kind, "buffer": content})
        return
    transfer = page.evaluate_handle(TRANSFER, [name, kind, base64.b64encode(content).decode()])
    if method == "dropped":
        page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
        expect(page.locator("form.over")).to_be_visible()
        page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    else:
        page.evaluate("data => dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }))", transfer)


def uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_a_text_query_shows_what_the_api_returns(page, url):
    expect(page.get_by_text("the results are texts and pictures alike")).to_be_visible()
    search_text(page, "a bird on a boat")
    results = search_results(url, {"text": "a bird on a boat"})
    expect_results(page, results)
    for card, result in zip(page.get_by_role("listitem").all(), results, strict=True):
        document = result["document"]
        if document["image"]:
            image = card.get_by_role("img")
            assert image.get_attribute("src") == document["image"]
            assert image.get_attribute("alt") == (document["text"] or result["id"])
        assert card.locator(".text").inner_text() == (document["text"] or "")
        expect(card.get_by_text("P(yes)")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"12 results \(.* × .*\) in .*\d ms.*encode .*retrieve"))
    assert page.title() == "a bird on a boat · search"


def test_all_pictures_of_a_document_are_shown_and_looked_for(page, url):
    pictures = [uri(picture(1)), uri(picture(2))]
    _, added, _ = call(f"{url}/v1/index", {"documents": [{"id": "two", "image": pictures}]})
    query = {"image": pictures[0]}
    search_results(url, query, after=added["sequence"])
    try:
        add_picture(page, "chosen", "one.png", "image/png", picture(1))
        expect_results(page, search_results(url, query))
        card = page.get_by_role("listitem").filter(has=page.locator(".meta", has_text="· two"))
        expect(card.get_by_role("img")).to_have_count(2)
        assert [image.get_attribute("src") for image in card.get_by_role("img").all()] == pictures
        card.get_by_role("button", name="More like this").click()
        expect_results(page, search_results(url, {"image": pictures}))
        expect(page.locator(".meta").first).to_contain_text("two")
    finally:
        call(f"{url}/v1/index/delete", {"ids": ["two"]})


def test_a_first_search_has_an_instruction_and_others_are_a_click_away(browser, url):
    with watched(browser, url) as page:
        expect(page.get_by_label("Instruction", exact=True)).to_have_value(INSTRUCTION)
        search_text(page, "a boat")
        expect_results(page, search_results(url, {"text": "a boat", "instruction": INSTRUCTION}))
        page.get_by_label("Ready instructions").select_option(FIND_A_TEXT)
        expect_results(page, search_results(url, {"text": "a boat", "instruction": FIND_A_TEXT}))
        page.get_by_label("Ready instructions").select_option("")
        expect_results(page, search_results(url, {"text": "a boat"}))
    with watched(browser, url) as page:
        add_picture(page, "chosen", "three.png", "image/png", picture(3))  # the first instruction is not for pictures
        expect_results(page, search_results(url, {"image": uri(picture(3))}))


@pytest.mark.parametrize("method", ["chosen", "dropped", "pasted"])
def test_a_picture_finds_itself(page, method):
    add_picture(page, method, "three.png", "image/png", picture(3))
    first = page.get_by_role("listitem").first
    expect(first).to_contain_text("tiny · picture · i3")
    expect(first).to_contain_text("1.000")
    expect(page.get_by_role("img", name="The query's picture: three.png")).to_be_visible()


def test_picture_text_and_instruction_together(page, url):
    page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)
    page.get_by_label("Text to search for").fill("at dusk")
    add_picture(page, "chosen", "three.png", "image/png", picture(3))
    query = {"text": "at dusk", "image": uri(picture(3)), "instruction": INSTRUCTION}
    expect_results(page, search_results(url, query))
    page.keyboard.press("Escape")
    expect_results(page, search_results(url, {"text": "at dusk", "instruction": INSTRUCTION}))
    assert page.get_by_label("Text to search for").evaluate("field => field === document.activeElement")


def test_a_link_repeats_the_query_and_back_restores_the_picture(page, browser, url):
    page.get_by_label("Instruction", exact=True).fill(INSTRUCTION)
    search_text(page, "a red & blue boat")
    page.get_by_role("switch", name="Rerank").check()
    text = {"text": "a red & blue boat", "instruction": INSTRUCTION}
    expect_results(page, search_results(url, text, rerank=True))
    link = page.url
    add_picture(page, "chosen", "three.png", "image/png", picture(3))
    both = search_results(url, text | {"image": uri(picture(3))}, rerank=True)
    expect_results(page, both)
    assert page.url == link
    search_text(page, "")
    expect_results(page, search_results(url, {"image": uri(picture(3)), "instruction": INSTRUCTION}, rerank=True))
    page.go_back()
    expect_results(page, both)
    page.go_back()
    expect_results(page, search_results(url, text, rerank=True))
    expect(page.locator("#preview")).to_be_hidden()
    with watched(browser, link) as friend:
        expect_results(friend, search_results(url, text, rerank=True))
        expect(friend.get_by_label("Instruction", exact=True)).to_have_value(INSTRUCTION)


def test_rerank_shows_p_yes(page, url):
    search_text(page, "two boats")
    page.get_by_text("Rerank", exact=False).first.click()
    results = search_results(url, {"text": "two boats"}, rerank=True)
    expect_results(page, results)
    shown = [float(text) for text in page.locator(".yes dd:first-of-type").all_inner_texts()]
    np.testing.assert_allclose(shown, [one["rerank_score"] for one in results], atol=6e-4)
    page.get_by_role("switch", name="Rerank").uncheck()
    expect_results(page, search_results(url, {"text": "two boats"}))
    expect(page.get_by_text("P(yes)").first).to_be_hidden()


def test_more_like_this(page, url):
    search_text(page, "a boat")
    before = search_results(url, {"text": "a boat"})
    expect_results(page, before)
    wanted = next(one for one in reversed(before) if one["modality"] == "image,text")
    card = page.get_by_role("listitem").filter(has_text=f"· {wanted['id']}")
    card.get_by_role("button", name="More like this").click()
    query = {key: value for key, value in wanted["document"].items() if value}
    expect_results(page, search_results(url, query))
    expect(page.locator(".meta").first).to_contain_text(wanted["id"])
    expect(page.get_by_label("Text to search for")).to_have_value(wanted["document"]["text"])
    expect(page.get_by_role("heading", name="Results")).to_be_focused()
    page.go_back()
    expect_results(page, before)


def test_filters(page, url):
    search_text(page, "a boat")
    page.get_by_label("Pictures", exact=True).check()
    pictures = search_results(url, {"text": "a boat"}, filter={"modality": ["image"]})
    assert {one["id"] for one in pictures} == {f"i{number}" for number in range(len(TEXTS))}
    expect_results(page, pictures)
    page.get_by_label("tiny").check()  # a source learned from the results
    with page.expect_request("**/v1/search") as sent:
        page.get_by_label("Texts", exact=True).check()
    assert sent.value.post_data_json["filter"] == {"modality": ["image", "text"], "source": ["tiny"]}
    page.get_by_role("combobox", name="Results").select_option("24")
    expect_results(page, search_results(url, {"text": "a boat"}, filter={"modality": ["image", "text"]}, top_k=24))


@pytest.mark.parametrize(
    ("kind", "size", "sent_size"), [("PNG", (3000, 1500), (1024, 512)), ("BMP", (300, 150), (300, 150))]
)
def test_large_and_unusual_pictures_are_reencoded(page, kind, size, sent_size):
    content = io.BytesIO()
    colors = np.array([[(200, 30, 30), (30, 30, 200)]], np.uint8)
    Image.fromarray(colors).resize(size, Image.NEAREST).save(content, kind)
    with page.expect_response("**/v1/search") as received:
        add_picture(page, "chosen", f"picture.{kind}", f"image/{kind.lower()}", content.getvalue())
    assert received.value.status == 200
    sent = received.value.request.post_data_json["query"]["image"]
    with Image.open(io.BytesIO(base64.b64decode(sent.split(",")[1]))) as image:
        assert (image.format, image.size) == ("WEBP", sent_size)
        left, right = (image.convert("RGB").getpixel((sent_size[0] * part // 4, 50)) for part in (1, 3))
    np.testing.assert_allclose([left, right], colors[0], atol=6)


def test_errors_are_shown(page, url):
    alert = page.get_by_role("alert")
    add_picture(page, "dropped", "notes.txt", "text/plain", b"no picture")
    expect(alert).to_contain_text("notes.txt: the browser cannot open this as a picture")
    cut = picture(1)[:60]  # browsers still show the part that is there
    add_picture(page, "chosen", "cut.png", "image/png", cut)
    _, response, _ = call(f"{url}/v1/search", {"query": {"image": uri(cut)}})
    expect(alert).to_have_text(response["error"]["message"])
    page.get_by_role("button", name="Remove the picture").click()
    expect(alert).to_be_hidden()
    page.route("**/v1/search", lambda route: route.abort())
    search_text(page, "a boat")
    expect(alert).to_have_text("The service is not responding. Is it running?")
    page.unroute("**/v1/search")
    search_text(page, "a boat")
    expect(alert).to_be_hidden()
    expect(page.locator(".meta")).to_have_count(12)


def test_a_service_with_a_key_but_no_reranker_and_no_index(address, run, browser, tmp_path):
    (tmp_path / "keys").write_text("open-sesame-open-sesame\n")
    bare = service_of(run, reranker=None, index=None, live=None, keys=str(tmp_path / "keys"))
    serve.run(build(bare), name="bare", route_prefix="/bare")
    with watched(browser, f"{address}/bare/#text=a+boat") as page:
        alert, field = page.get_by_role("alert"), page.get_by_label("This service requires an API key")
        expect(field).to_be_focused()
        _, response, _ = call(f"{address}/bare/v1/models")
        for key in ("wrong", "open-sesame-open-sesame"):
            expect(alert).to_have_text(response["error"]["message"])
            field.fill(key)
            page.get_by_role("button", name="Use it").click()
        expect(alert).not_to_have_text(response["error"]["message"])
        expect(field).to_be_hidden()
        kept = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
        assert kept == [{"apiKey": "open-sesame-open-sesame"}, {}, ""]
        bearer = {"Authorization": "Bearer open-sesame-open-sesame"}
        _, response, _ = call(f"{address}/bare/v1/search", {"query": "a boat"}, **bearer)
        expect(alert).to_have_text(f"Search is not available: {response['error']['message']}")
        expect(page.get_by_role("switch", name="Rerank")).to_be_disabled()
        expect(page.get_by_text("this service has no reranker")).to_be_visible()
    serve.delete("bare")


def test_a_new_search_cancels_the_previous_one(page, url):
    held = []
    page.route("**/v1/search", lambda route: route.continue_() if held else held.append(route))
    search_text(page, "a red fox")
    expect(page.get_by_role("status")).to_have_text("Searching…")
    expect(page.locator(".waiting")).to_have_count(12)
    search_text(page, "a boat")
    results = search_results(url, {"text": "a boat"})
    expect_results(page, results)
    [late] = held
    late.fulfill(json={"results": [], "timings": {"encode_ms": 1, "retrieve_ms": 1, "rerank_ms": 0}})
    page.wait_for_timeout(100)
    expect_results(page, results)


def test_everything_works_by_keyboard(page, url):
    expect(page.get_by_label("Text to search for")).to_be_focused()
    page.keyboard.type("a boat")
    page.keyboard.press("Enter")
    results = search_results(url, {"text": "a boat"})
    expect_results(page, results)

    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        assert page.evaluate(RING) == "solid", seen[-1]
    assert seen == [
        *("Add a picture", "Search", "Instruction", "Ready instructions", "Pictures", "Texts", "Pictures with text"),
        *("Rerank", "Results", "tiny", "More like this (result 1)", "More like this (result 2)"),
    ]

    page.keyboard.press("/")
    expect(page.get_by_label("Text to search for")).to_be_focused()
    like = page.get_by_role("button", name="More like this")
    page.keyboard.press("ArrowDown")
    expect(like.nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(like.nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    below = page.evaluate("document.activeElement.getBoundingClientRect().left")
    assert below == pytest.approx(like.nth(1).bounding_box()["x"])
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Text to search for")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    query = {key: value for key, value in results[0]["document"].items() if value}
    expect_results(page, search_results(url, query))
    page.keyboard.press("/")
    page.keyboard.type("a/b")
    expect(page.get_by_label("Text to search for")).to_have_value("a/b")


def test_the_accessibility_tree(page):
    search_text(page, TEXTS[0])
    expect(page.locator(".meta")).to_have_count(12)
    expect(page.locator("body")).to_match_aria_snapshot("""
      - banner:
        - heading "umarvel search" [level=1]
        - navigation "Service":
          - link "API"
      - main:
        - search "Documents":
          - textbox "Text to search for": a red fox in the snow
          - button "Add a picture"
          - button "Search"
          - textbox "Instruction"
          - combobox "Ready instructions"
          - group "Kind":
            - checkbox "Pictures"
            - checkbox "Texts"
            - checkbox "Pictures with text"
          - switch "Rerank"
          - combobox "Results"
          - group "Source":
            - checkbox "tiny"
        - region "Results":
          - heading "Results" [level=2]
          - status: /12 results .* in/
          - list "Results":
            - listitem:
              - 'heading "Result 1 (text from tiny)" [level=3]'
              - paragraph: a red fox in the snow
              - term: Score
              - definition: "1.000"
              - paragraph: tiny · text · t0
              - 'button "More like this (result 1)"'
    """)


def test_the_instructions_of_the_data_are_offered(page, url):
    _, response, _ = call(f"{url}/v1/instructions")
    kinds = [("tiny_task0", "text", "image", INSTRUCTION), ("tiny_task0", "text", "text", FIND_A_TEXT)]
    assert sorted((one["task"], one["query"], one["finds"], one["instruction"]) for one in response["data"]) == kinds
    expect(page.locator("#instructions option")).to_have_text(["no instruction", FIND_A_TEXT, INSTRUCTION])


# Every visible text, its color, and the backgrounds behind it from the inside out. Disabled controls are exempt.
COLORS = """() => {
  const found = [];
  const behind = (one) => one ? [getComputedStyle(one).backgroundColor, ...behind(one.parentElement)] : [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (node.data.trim() && parent.checkVisibility() && !parent.closest(".hidden"))
      found.push([node.data.trim(), getComputedStyle(parent).color, behind(parent)]);
  }
  for (const field of document.querySelectorAll("[placeholder]"))
    found.push([field.placeholder, getComputedStyle(field, "::placeholder").color, behind(field)]);
  return found;
}"""


def parse(color: str) -> tuple[float, ...]:
    red, green, blue, *alpha = (float(number) for number in re.findall(r"[\d.]+", color))
    return red, green, blue, *(alpha or [1.0])


def luminance(color: tuple[float, ...]) -> float:
    """WCAG 2's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in color[:3])]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser, url, scheme):
    with watched(
        browser, f"{url}/#text=a+boat&rerank=1&modality=text&modality=image,text", color_scheme=scheme
    ) as page:
        expect(page.get_by_text("P(yes)").first).to_be_visible()
        add_picture(page, "dropped", "notes.txt", "text/plain", b"no picture")
        expect(page.get_by_role("alert")).to_be_visible()
        page.evaluate("document.getElementById('key').hidden = document.getElementById('welcome').hidden = false")
        found = page.evaluate(COLORS)
        assert len(found) > 80
        pages = [parse(page.evaluate("getComputedStyle(document.body).backgroundColor"))]
        assert (luminance(pages[0]) > 0.5) == (scheme == "light")
        for text, color, behind in found:
            ground = next(back for back in map(parse, behind) if back[3] == 1)
            low, high = sorted(map(luminance, (parse(color), ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, color, ground)


@pytest.mark.parametrize("width", [320, 390])
def test_phones_need_no_sideways_scrolling(browser, url, width):
    link = f"{url}/#rerank=1&text={'unbrokenword' * 12}"
    options = {"viewport": {"width": width, "height": 640}, "has_touch": True, "is_mobile": True}
    with watched(browser, link, **options) as page:
        expect(page.locator(".meta")).to_have_count(12)
        add_picture(page, "dropped", f"{'long' * 40}.txt", "text/plain", b"no picture")
        expect(page.get_by_role("alert")).to_be_visible()
        page.evaluate("document.getElementById('key').hidden = document.getElementById('welcome').hidden = false")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        targets = page.locator("button:visible, select, .chip").all()
        assert min(one.bounding_box()["height"] for one in targets) >= 24  # WCAG 2.2


def test_files_are_sent_with_a_strict_policy(url):
    for path, kind in (("/", "text/html"), ("/static/page.css", "text/css"), ("/static/page.js", "text/javascript")):
        with urllib.request.urlopen(url + path) as response:
            headers, content = response.headers, response.read()
        assert content
        assert headers["Content-Type"] == f"{kind}; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
        again = urllib.request.Request(url + path, headers={"If-None-Match": headers["ETag"]})
        with pytest.raises(urllib.error.HTTPError, match="304"):
            urllib.request.urlopen(again)
    assert call(f"{url}/static/ingress.py")[0] == 404
