"""From concepts to rows: the documents, queries and local pools of the demo's tasks."""

import hashlib
from collections import defaultdict

from tools.demo import sources as src
from tools.demo.concepts import find_leaks, normalize
from tools.demo.tasks import (
    DATASET_IDS,
    DESCRIPTION_QUESTIONS,
    GENDER_EDITS,
    MODALITIES,
    NEUTRAL_EDITS,
    PICTURE_QUESTIONS,
    PROMPTS,
    STYLE_EDITS,
    TONE_EDITS,
    dataset_and_task,
    noun_for,
)
from tools.demo.world import World, rng

SPLITS = ("train", "validation", "test")
POOL_SIZE = 500
MAX_QUERIES = {"test": 150, "validation": 60}
TEXT_PAIRS = 11_000
# Articles that share their name with the picture of something else.
OTHER_SENSE = {
    "Cricket",
    "Peanuts",
    "Turkey",
    "Cancer",
    "Construction",
    "Cultivator",
    "Glass",
    "Heart",
    "Information",
    "Liberty",
    "Magnetic field",
    "Mascot",
    "Mouse",
    "Performing arts",
    "Réunion",
    "Sponge",
    "Triangle",
    "Valencia",
    "Video",
}


class Tables:
    """Collects documents, queries and pool membership, and refuses training rows that would leak."""

    def __init__(self, world: World):
        self.world = world
        self.documents: dict[tuple, dict] = {}
        self.queries = {name: [] for name in ("text_pairs", "image_pairs", *SPLITS)}
        self.members = defaultdict(list)  # (task, split) -> document ids
        self.next_id = defaultdict(int)

    def _row(self, source: str, text: str | None, picture: src.Picture | None, concept: str) -> dict | None:
        modality = ",".join(m for m, there in (("image", picture), ("text", text)) if there)
        row = {
            "id": "",
            "text": text or None,
            "image": picture and picture.webp,
            "modality": modality,
            "source": source,
            "concept": self.world.title(concept),
        }
        if self.world.split[concept] == "train" and self.leaks(row):
            return None
        return row

    def leaks(self, row: dict) -> list[tuple[str, str]]:
        return list(find_leaks([row], self.world.held_out, self.world.held_out_pixels, src.pixel_hash))

    def _number(self, side: str, source: str) -> str:
        self.next_id[side, source] += 1
        return f"{DATASET_IDS[source]}:{self.next_id[side, source]}"

    def document(
        self,
        source: str,
        concept: str,
        text: str | None = None,
        picture: src.Picture | None = None,
        tasks: tuple[str, ...] = (),
    ) -> str | None:
        """Add a document once, put it into the pools of `tasks`; its id, or None if it was refused."""
        split = self.world.split[concept]
        key = (source, text, picture and picture.pixels, split)
        if key not in self.documents:
            row = self._row(source, text, picture, concept)
            if row is None:
                return None
            self.documents[key] = row | {"id": self._number("document", source), "split": split}
        identity = self.documents[key]["id"]
        for task in tasks:
            if identity not in self.members[task, split]:
                self.members[task, split].append(identity)
        return identity

    def query(
        self,
        task: str,
        concept: str,
        positives: list[str | None],
        text: str | None = None,
        picture: src.Picture | None = None,
        pairs: str | None = None,
    ) -> None:
        """Add a query to its split's table, or to the table `pairs` (training concepts only, no instruction)."""
        positives = list(dict.fromkeys(p for p in positives if p))
        split = self.world.split[concept]
        source, number = dataset_and_task(task)
        if not positives or (pairs and split != "train"):
            return
        wanted = ("text" in MODALITIES[number][0], "image" in MODALITIES[number][0])
        if (bool(text), bool(picture)) != wanted:
            return
        row = self._row(source, text, picture, concept)
        if row is not None:
            self.queries[pairs or split].append(row | {"task": task, "positive_ids": positives})

    def finish(self) -> None:
        """Drop repeated queries, then order, cap and number them and add instructions."""
        for name, rows in self.queries.items():
            unique = {(r["task"], r["text"], r["image"], tuple(sorted(r["positive_ids"]))): r for r in rows}
            rows = list(unique.values())
            rng("order", name).shuffle(rows)
            if name in MAX_QUERIES:
                taken = defaultdict(int)
                kept = []
                for row in rows:
                    taken[row["task"]] += 1
                    if taken[row["task"]] <= MAX_QUERIES[name]:
                        kept.append(row)
                rows = sorted(kept, key=lambda row: list(PROMPTS).index(row["task"]))
            if name == "text_pairs":
                rows = rows[:TEXT_PAIRS]
            for row in rows:
                row["id"] = self._number("query", row["source"])
                row["instruction"] = None
                if name in SPLITS:
                    prompts = PROMPTS[row["task"]]
                    row["instruction"] = rng("prompt", row["id"]).choice(prompts) if name == "train" else prompts[0]
            self.queries[name] = rows

    def pools(self) -> list[dict]:
        """Training: all documents of a task. Held-out splits: their own documents, filled up with training ones."""
        pools = []
        for task in PROMPTS:
            train = self.members[task, "train"]
            pools.append({"task": task, "split": "train", "document_ids": train})
            for split in ("validation", "test"):
                own = self.members[task, split]
                # Tasks that share documents share distractors too, which keeps the global pool small.
                order = sorted(train, key=lambda d: hashlib.sha256(f"{split}:{d}".encode()).hexdigest())
                pools.append(
                    {"task": task, "split": split, "document_ids": own + order[: max(0, POOL_SIZE - len(own))]}
                )
        return pools


def emoji_rows(t: Tables) -> None:
    w = t.world
    by_gender = defaultdict(dict)
    for e in w.emoji:
        if e.gender and not e.is_flag:
            by_gender[e.key][e.gender] = e
    for e in w.emoji:
        if e.is_flag:
            continue
        concept = w.concept_of[f"emoji:{e.code}"]
        tags = [tag for tag in e.tags if normalize(tag) != normalize(e.label)]
        described = f"{e.label}: {', '.join(tags[:8])}" if tags else e.label
        text = t.document("emoji", concept, text=e.label and described, tasks=("emoji_task3",)) if e.label else None
        pictures = {
            s: t.document("emoji", concept, picture=p, tasks=("emoji_task0", "emoji_task4", "emoji_task7"))
            for s, p in e.pictures.items()
        }
        toned = {key: t.document("emoji", concept, picture=p, tasks=("emoji_task7",)) for key, p in e.toned.items()}
        choice = rng("emoji", e.code)
        style = choice.choice(src.STYLES)  # only one artist's picture is a query, which keeps query pictures few
        everyone = list(pictures.values())
        sampled_tags = choice.sample(tags, min(3, len(tags)))
        if e.label:
            t.query("emoji_task0", concept, everyone, text=", ".join([e.label, *sampled_tags]))
            if w.split[concept] == "train":
                t.query("emoji_task0", concept, everyone, text=e.label)
            captions = [e.label, described, ", ".join([e.label, *choice.sample(tags, min(2, len(tags)))])]
            for caption in dict.fromkeys(captions):
                t.query("emoji_task0", concept, everyone, text=caption, pairs="image_pairs")
            for tone, (_, label) in e.tones.items():
                shown = [identity for (of, _), identity in toned.items() if of == tone]
                t.query("emoji_task0", concept, shown, text=label, pairs="image_pairs")
            t.query("emoji_task3", concept, [text], picture=e.pictures[style])
            t.query("keywords_task1", concept, [text], text=e.label if tags else None, pairs="text_pairs")
        t.query("emoji_task4", concept, [d for s, d in pictures.items() if s != style], picture=e.pictures[style])
        edits(t, e, concept, style, pictures, toned, by_gender[e.key], choice)
        keywords(t, e, concept)


def edits(
    t: Tables, e: src.Emoji, concept: str, style: str, pictures: dict, toned: dict, genders: dict, choice
) -> None:
    """Task 7: the same emoji by another artist, or the same artist's with another skin tone or gender."""
    other = choice.choice([s for s in src.STYLES if s != style])
    t.query(
        "emoji_task7", concept, [pictures[other]], text=choice.choice(STYLE_EDITS[other]), picture=e.pictures[style]
    )
    for (tone, drawn), identity in toned.items():
        edit = choice.choice(TONE_EDITS).format(src.TONE_NAMES[tone])
        t.query("emoji_task7", concept, [identity], text=edit, picture=e.pictures[drawn])
    for gender, target in genders.items():
        if e.gender and gender != e.gender:
            wordings = NEUTRAL_EDITS if gender == "person" else GENDER_EDITS
            identity = t.document("emoji", concept, picture=target.pictures[style], tasks=("emoji_task7",))
            t.query(
                "emoji_task7",
                concept,
                [identity],
                text=choice.choice(wordings).format(gender),
                picture=e.pictures[style],
            )


def keywords(t: Tables, e: src.Emoji, concept: str) -> None:
    """Task 1: label -> human keywords without the label's own words, if at least three remain."""
    label_words = set(normalize(e.label).split())
    words = [k for k in dict.fromkeys(e.keywords) if normalize(k) and normalize(k) != normalize(e.label)]
    words = [k for k in words if not set(normalize(k).split()) <= label_words]
    if not e.label or len(words) < 3:
        return
    document = t.document("keywords", concept, text=", ".join(words[:10]), tasks=("keywords_task1",))
    t.query("keywords_task1", concept, [document], text=e.label)
    t.query("keywords_task1", concept, [document], text=e.label, pairs="text_pairs")


def wiki_rows(t: Tables) -> None:
    w = t.world
    uses = defaultdict(int)
    for a in w.articles:
        uses[normalize(a.description)] += 1
        uses[normalize(f"{a.description} {a.topic}")] += 1
    pictures_of = article_pictures(w)
    for i, a in enumerate(w.articles):
        concept = w.concept_of[f"article:{i}"]
        if not a.extract:
            continue
        text = t.document("wiki", concept, text=a.extract, tasks=("wiki_task1", "wiki_task6"))
        described = None
        if len(normalize(a.description).split()) >= 3:
            with_topic = f"{a.description} ({a.topic})"
            if uses[normalize(a.description)] == 1:
                described = a.description
            elif a.topic != "Uncategorized" and uses[normalize(with_topic)] == 1:
                described = with_topic
        t.query("wiki_task1", concept, [text], text=described)
        t.query("wiki_task1", concept, [text], text=described or a.title, pairs="text_pairs")
        if rng("title", a.title).random() < 0.25:
            t.query("wiki_task1", concept, [text], text=a.title, pairs="text_pairs")
        shown = pictures_of.get(concept)
        if shown:
            pictured_article(t, concept, a, text, described, shown)


def article_pictures(w: World) -> dict[str, list[tuple[src.Picture, str]]]:
    """concept -> [(picture, noun)], for concepts with exactly one article. Flags only represent countries."""
    found = defaultdict(list)
    for concept, nodes in w.members.items():
        articles = [w.articles[int(node.split(":")[1])] for node in nodes if node.startswith("article:")]
        if len(articles) != 1 or articles[0].title in OTHER_SENSE:
            continue
        emoji = [w.code[n.split(":")[1]] for n in sorted(nodes) if n.startswith("emoji:")]
        flags = [e for e in emoji if e.is_flag]
        if len(flags) > 1:
            continue
        for e in (flags or emoji)[:2]:
            found[concept] += [(p, noun_for(e.subgroup)) for p in e.pictures.values()]
        found[concept] += [
            (w.flags[n.split(":")[1]], "country or territory") for n in sorted(nodes) if n.startswith("flag:")
        ]
        if not flags:
            clips = [w.clipart[int(n.split(":")[1])] for n in sorted(nodes) if n.startswith("clipart:")]
            found[concept] += [(c.picture, noun_for(c.category)) for c in clips[:3]]
    return {concept: pictures for concept, pictures in found.items() if pictures}


def pictured_article(
    t: Tables,
    concept: str,
    a: src.Article,
    text: str | None,
    described: str | None,
    pictures: list[tuple[src.Picture, str]],
) -> None:
    """Tasks 2, 6 and 8. Task 8's query picture has no document, because every picture + extract would answer it."""
    choice = rng("wiki", a.title)
    query_picture, noun = choice.choice(pictures)
    shown = [p for p, _ in pictures if len(pictures) == 1 or p.pixels != query_picture.pixels][:3]
    documents = [
        t.document("wiki", concept, text=a.extract, picture=p, tasks=("wiki_task2", "wiki_task8")) for p in shown
    ]
    if described:
        for question in choice.sample(DESCRIPTION_QUESTIONS, 2 if t.world.split[concept] == "train" else 1):
            t.query("wiki_task2", concept, documents, text=question.format(described))
    for picture, its_noun in choice.sample(pictures, min(2, len(pictures))):
        t.query("wiki_task6", concept, [text], text=choice.choice(PICTURE_QUESTIONS).format(its_noun), picture=picture)
    if query_picture.pixels not in {p.pixels for p in shown}:
        t.query(
            "wiki_task8", concept, documents, text=choice.choice(PICTURE_QUESTIONS).format(noun), picture=query_picture
        )


def clipart_rows(t: Tables) -> None:
    w = t.world
    same_title = defaultdict(list)
    for i, c in enumerate(w.clipart):
        if c.title:
            same_title[normalize(c.title)].append((i, c))
    for name, clips in same_title.items():
        concept = w.concept_of[f"clipart:{clips[0][0]}"]
        pictures = [t.document("clipart", concept, picture=c.picture, tasks=("clipart_task0",)) for _, c in clips]
        described = {}
        for i, c in clips:
            words = [k for k in c.keywords if normalize(k) != name]
            described[i] = f"{c.title}: {', '.join(words[:6])}" if words else c.title
        texts = [t.document("clipart", concept, text=d, tasks=("clipart_task3",)) for d in described.values()]
        for i, c in clips:
            t.query("clipart_task0", concept, pictures, text=described[i].replace(": ", ", ", 1))
            t.query("clipart_task0", concept, pictures, text=c.title, pairs="image_pairs")
            t.query("clipart_task0", concept, pictures, text=described[i], pairs="image_pairs")
            t.query("clipart_task3", concept, texts, picture=c.picture)
            if described[i] != c.title:
                t.query("keywords_task1", concept, texts, text=c.title, pairs="text_pairs")


def flag_rows(t: Tables) -> None:
    """Flags that an artist draws identically for several places (France and its territories) are left out, because such
    a picture does not identify the place."""
    w = t.world
    by_concept = defaultdict(list)
    for e in w.emoji:
        if e.is_flag:
            by_concept[w.concept_of[f"emoji:{e.code}"]].append(e)
    for concept, (e, *same_flag) in by_concept.items():
        if same_flag:
            continue
        pictures = [*e.pictures.values(), *([w.flags[e.code]] if e.code in w.flags else [])]
        documents = {p.pixels: t.document("flags", concept, picture=p, tasks=("flags_task4",)) for p in pictures}
        query_pictures = pictures if w.split[concept] != "train" else rng("flag", concept).sample(pictures, 2)
        for picture in query_pictures:
            t.query(
                "flags_task4",
                concept,
                [d for pixels, d in documents.items() if pixels != picture.pixels],
                picture=picture,
            )
        if e.label:
            for text in (e.label, f"flag of {e.label.removeprefix('flag: ')}"):
                t.query("clipart_task0", concept, list(documents.values()), text=text, pairs="image_pairs")
