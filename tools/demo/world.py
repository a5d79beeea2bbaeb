"""All records, joined into concepts with one split each; training texts that name a held-out concept are dropped."""

import hashlib
import random
from collections import defaultdict
from pathlib import Path

from tools.demo import sources as src
from tools.demo.concepts import Phrases, group, mentions, normalize
from tools.demo.tasks import template_texts

SHARES = {
    "pictured article": (0.08, 0.17),
    "flag": (0.08, 0.17),
    "emoji": (0.06, 0.11),
    "clipart": (0.06, 0.12),
    "article": (0.03, 0.04),
}  # (validation, test), kinds in order of precedence
MAX_MENTIONS = 4  # a concept named by more texts of others is not held out: too many would have to be dropped
MAX_MEMBERS = 12


def rng(*parts) -> random.Random:
    return random.Random(":".join(map(str, parts)))


def keep_tone(code: str, tone: int, style: str) -> bool:
    choice = rng("tone", code)
    return tone in choice.sample(range(1, 6), 2) and style in choice.sample(src.STYLES, 2)


class World:
    """All records, the concept each belongs to, and each concept's split and names."""

    def __init__(self, sources: Path):
        self.emoji = src.read_emoji(sources, keep_tone)
        self.articles = src.read_articles(sources)
        self.clipart = src.read_clipart(sources)
        self.flags = src.read_flags(sources)
        self.code = {e.code: e for e in self.emoji}
        self.flags = {code: picture for code, picture in self.flags.items() if code in self.code}
        self._join()
        self._split()
        self._filter()

    def _join(self) -> None:
        links, aliases = [], defaultdict(set)  # node -> names that must not leak

        def link(node: str, names: list[str], pictures: list[src.Picture]) -> None:
            links.append((node, node))
            links.extend((node, f"name:{name}") for name in names)
            links.extend((node, f"pixels:{p.pixels}") for p in pictures)
            aliases[node].update(names)

        for e in self.emoji:
            pictures = [*e.pictures.values(), *e.toned.values()]
            link(f"emoji:{e.code}", emoji_names(e), pictures)
            links.append((f"emoji:{e.code}", f"key:{e.key}"))
        for code, picture in self.flags.items():
            link(f"flag:{code}", [], [picture])
            links.append((f"flag:{code}", f"emoji:{code}"))
        for i, a in enumerate(self.articles):
            link(f"article:{i}", [normalize(a.title)], [])
            aliases[f"article:{i}"].add(normalize(a.title.split(" (")[0]))
        for i, c in enumerate(self.clipart):
            link(f"clipart:{i}", [normalize(c.title)], [c.picture])
        component = group(links)
        self.concept_of = {node: component[node] for node in aliases}
        self.members = defaultdict(list)
        for node, concept in self.concept_of.items():
            self.members[concept].append(node)
        self.names = {c: set().union(*(aliases[n] for n in nodes)) for c, nodes in self.members.items()}

    def texts(self):
        """(concept, text) of every human text that a row may contain."""
        for e in self.emoji:
            concept = self.concept_of[f"emoji:{e.code}"]
            yield concept, e.label
            yield from ((concept, word) for word in [*e.tags, *e.keywords])
        for i, a in enumerate(self.articles):
            yield self.concept_of[f"article:{i}"], a.extract
            yield self.concept_of[f"article:{i}"], f"{a.description} ({a.topic})"
        for i, c in enumerate(self.clipart):
            yield self.concept_of[f"clipart:{i}"], c.title
            yield from ((self.concept_of[f"clipart:{i}"], word) for word in c.keywords)

    def kind(self, concept: str) -> str:
        nodes = {node.split(":")[0] for node in self.members[concept]}
        if "article" in nodes and len(nodes) > 1:
            return "pictured article"
        return next(kind for kind in ("flag", "emoji", "clipart", "article") if kind in nodes)

    def _split(self) -> None:
        count = mentions(self.texts(), self.names)
        ours = mentions((("", text) for text in [*template_texts(), *(a.topic for a in self.articles)]), self.names)
        kinds = defaultdict(list)
        for concept in self.members:
            kinds[self.kind(concept)].append(concept)
        self.split = dict.fromkeys(self.members, "train")
        for kind, (validation, test) in SHARES.items():
            eligible = [
                c
                for c in kinds[kind]
                if count[c] <= MAX_MENTIONS
                and not ours[c]
                and all(self.names[c])
                and self.names[c]
                and len(self.members[c]) <= MAX_MEMBERS
            ]
            eligible.sort(key=lambda c: hashlib.sha256(c.encode()).hexdigest())
            tests, validations = round(test * len(kinds[kind])), round(validation * len(kinds[kind]))
            print(
                f"{kind}: {len(kinds[kind])} concepts, {len(eligible)} may be held out, "
                f"test {tests}, validation {validations}"
            )
            for concept in eligible[:tests]:
                self.split[concept] = "test"
            for concept in eligible[tests : tests + validations]:
                self.split[concept] = "validation"
        held_out = [c for c, split in self.split.items() if split != "train"]
        self.held_out_pixels = {p.pixels for c in held_out for node in self.members[c] for p in self.pictures_of(node)}
        self.held_out = Phrases(set().union(*(self.names[c] for c in held_out)))

    def _filter(self) -> None:
        """Drop the words of training records that name a held-out concept; '' replaces a text dropped as a whole."""

        def clean(text: str) -> str:
            return "" if self.held_out.found_in(text) else text

        def keep(words: list[str]) -> list[str]:
            return [word for word in words if clean(word)]

        for e in self.emoji:
            if self.split_of(f"emoji:{e.code}") == "train":
                e.label, e.tags, e.keywords = clean(e.label), keep(e.tags), keep(e.keywords)
        for i, a in enumerate(self.articles):
            if self.split_of(f"article:{i}") == "train":
                a.description, a.extract, a.title = clean(a.description), clean(a.extract), clean(a.title)
        for i, c in enumerate(self.clipart):
            if self.split_of(f"clipart:{i}") == "train":
                c.title, c.keywords = clean(c.title), keep(c.keywords)

    def pictures_of(self, node: str) -> list[src.Picture]:
        kind, _, key = node.partition(":")
        if kind == "emoji":
            return [*self.code[key].pictures.values(), *self.code[key].toned.values()]
        if kind == "flag":
            return [self.flags[key]]
        return [self.clipart[int(key)].picture] if kind == "clipart" else []

    def split_of(self, node: str) -> str:
        return self.split[self.concept_of[node]]

    def title(self, concept: str) -> str:
        """The concept's shortest name; for a training concept, one that names nothing held out."""
        names = sorted(self.names[concept], key=lambda name: (len(name), name))
        if self.split[concept] == "train":
            names = [name for name in names if name and not self.held_out.found_in(name)]
        return names[0] if names else "unnamed " + hashlib.sha256(concept.encode()).hexdigest()[:8]


def emoji_names(e: src.Emoji) -> list[str]:
    """Normalized names: the label; for flags also the country; for animals also without 'face'; for families, kisses
    and couples also the word before the colon, which joins all of them."""
    names = [normalize(e.label)]
    if e.is_flag:
        country = normalize(e.label.removeprefix("flag: "))
        names += [country, country.replace("st ", "saint ", 1) if country.startswith("st ") else country]
    if e.subgroup.startswith("animal") or e.subgroup in ("monkey-face", "cat-face"):
        names.append(names[0].removesuffix(" face"))
    before, colon, _ = e.label.partition(":")
    if colon and before in ("family", "kiss", "couple with heart"):
        names.append(normalize(before))
    return list(dict.fromkeys(names))
