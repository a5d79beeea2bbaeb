"""The shipped demo data: complete, consistent, and without held-out concepts in training rows."""

import csv
import hashlib
import io
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import umarvel_ray.demo
from tools.demo.concepts import Phrases, find_leaks, group, normalize
from tools.demo.sources import concept_key, cut
from tools.demo.sources import pixel_hash as hash_of_pixels
from tools.demo.tasks import DATASET_IDS, MODALITIES, dataset_and_task

DATA = Path(umarvel_ray.demo.__file__).parent / "data"
pixel_hash = cache(hash_of_pixels)  # most pictures occur in several rows
QUERY_FILES = ("text_pairs", "image_pairs", "train", "validation", "test")


def read(name: str) -> list[dict]:
    return pq.read_table(DATA / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    rows = read("documents")
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


@pytest.fixture(scope="module")
def queries() -> dict[str, list[dict]]:
    return {name: read(name) for name in QUERY_FILES}


@pytest.fixture(scope="module")
def pools() -> dict[tuple[str, str], list[str]]:
    return {(row["task"], row["split"]): row["document_ids"] for row in read("pools")}


@pytest.fixture(scope="module")
def train_rows(documents, queries) -> list[dict]:
    rows = [row for row in documents.values() if row["split"] == "train"]
    return rows + [row for name in ("text_pairs", "image_pairs", "train") for row in queries[name]]


@pytest.fixture(scope="module")
def held_out_names() -> set[str]:
    return {name for row in read("held_out_concepts") for name in row["names"]}


@pytest.fixture(scope="module")
def held_out_pixels(documents, queries) -> set[str]:
    held_out = [row for row in documents.values() if row["split"] != "train"]
    held_out += queries["validation"] + queries["test"]
    return {pixel_hash(row["image"]) for row in held_out if row["image"]}


def test_no_training_row_names_or_shows_a_held_out_concept(train_rows, held_out_names, held_out_pixels):
    assert len(held_out_names) > 1000
    assert len(held_out_pixels) > 1000
    assert list(find_leaks(train_rows, Phrases(held_out_names), held_out_pixels, pixel_hash)) == []


def test_no_training_text_contains_a_held_out_name_by_plain_substring_search(train_rows, held_out_names):
    texts = {row.get(column) for row in train_rows for column in ("text", "instruction", "concept")} - {None}
    everything = "|".join(f" {normalize(text)} " for text in sorted(texts))
    assert [name for name in held_out_names if f" {name} " in everything] == []


def test_no_training_pixels_equal_held_out_pixels_by_plain_comparison(train_rows, documents, queries):
    def pixels(rows):
        pictures = {row["image"] for row in rows if row["image"]}
        return {Image.open(io.BytesIO(picture)).convert("RGB").tobytes() for picture in pictures}

    held_out = [row for row in documents.values() if row["split"] != "train"]
    assert pixels(train_rows).isdisjoint(pixels(held_out + queries["validation"] + queries["test"]))


def test_the_leak_checker_finds_a_planted_leak(train_rows, queries, held_out_names, held_out_pixels):
    names = Phrases(held_out_names)
    name = max(held_out_names, key=len)
    shown = next(row["image"] for row in queries["test"] if row["image"])
    larger = io.BytesIO()
    Image.open(io.BytesIO(shown)).convert("RGB").save(larger, "PNG")  # other bytes, the same pixels
    honest = train_rows[0]
    planted = {
        "text": honest | {"text": f"It is said: «{name.upper()}», no less."},
        "instruction": honest | {"instruction": f"Find {name}."},
        "concept": honest | {"concept": name},
        "image": honest | {"image": larger.getvalue()},
    }
    for column, row in planted.items():
        leaks = list(find_leaks([honest, row], names, held_out_pixels, pixel_hash))
        assert leaks
        assert all(reason.startswith(column) for _, reason in leaks)


def test_held_out_names_cover_the_labels_in_held_out_texts(documents, queries, held_out_names):
    labels = [
        row["text"].split(":")[0]
        for row in documents.values()
        if row["source"] == "clipart" and row["text"] and row["split"] != "train"
    ]
    labels += [
        row["text"] for name in ("validation", "test") for row in queries[name] if row["task"] == "keywords_task1"
    ]
    assert len(labels) > 300
    assert {label for label in labels if normalize(label) not in held_out_names} == set()


def test_a_concept_is_in_one_split(documents, queries):
    splits = defaultdict(set)
    for row in documents.values():
        splits[row["concept"]].add(row["split"])
    for name, rows in queries.items():
        for row in rows:
            splits[row["concept"]].add("train" if name.endswith("_pairs") else name)
    assert {concept for concept, found in splits.items() if len(found) > 1} == set()


def test_positives_exist_in_their_pool_and_have_the_task_s_modality(documents, queries, pools):
    members = {key: set(ids) for key, ids in pools.items()}
    for name, rows in queries.items():
        split = "train" if name.endswith("_pairs") else name
        for row in rows:
            assert row["positive_ids"], row["id"]
            asks, answers = MODALITIES[dataset_and_task(row["task"])[1]]
            assert row["modality"] == asks
            for positive in row["positive_ids"]:
                assert documents[positive]["modality"] == answers
                assert documents[positive]["split"] == split
                if not name.endswith("_pairs"):
                    assert positive in members[row["task"], split], (row["id"], positive)


def test_pools_hold_their_split_s_documents_and_training_distractors(documents, pools):
    for (task, split), ids in pools.items():
        assert len(ids) == len(set(ids)) >= 500, (task, split)
        assert {documents[i]["split"] for i in ids} <= {split, "train"}
    assert len({i for (_, split), ids in pools.items() if split == "test" for i in ids}) < 4500


def test_query_ids_are_unique_and_evaluation_stays_small(queries):
    ids = [row["id"] for rows in queries.values() for row in rows]
    assert len(ids) == len(set(ids))
    for name, limit in (("test", 150), ("validation", 60)):
        per_task = defaultdict(int)
        for row in queries[name]:
            per_task[row["task"]] += 1
        assert set(per_task) == {row["task"] for row in queries["train"]}
        assert max(per_task.values()) <= limit
        assert min(per_task.values()) >= 30


def test_every_picture_is_64_pixels_webp(documents, queries):
    pictures = {row["image"] for rows in (documents.values(), *queries.values()) for row in rows if row["image"]}
    for picture in pictures:
        image = Image.open(io.BytesIO(picture))
        assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")


def test_another_artist_s_picture_is_never_the_query_s_own(documents, queries):
    for name in ("train", "validation", "test"):
        for row in queries[name]:
            if row["task"] in ("emoji_task4", "flags_task4", "wiki_task8"):
                own = pixel_hash(row["image"])
                assert own not in {pixel_hash(documents[p]["image"]) for p in row["positive_ids"]}


def test_picture_questions_never_name_what_the_picture_shows(queries):
    names_of = {row["concept"]: row["names"] for row in read("held_out_concepts")}
    for name in ("train", "validation", "test"):
        for row in queries[name]:
            if row["task"] in ("wiki_task6", "wiki_task8", "emoji_task7"):
                names = names_of.get(row["concept"], [])
                assert not Phrases(names).found_in(row["text"]), row["text"]


def test_instructions_follow_mbeir_s_layout_and_are_the_ones_used(queries):
    with open(DATA / "instructions.tsv", newline="") as file:
        table = list(csv.reader(file, delimiter="\t"))
    assert table[0] == [
        "query_modality",
        "cand_modality",
        "dataset_name",
        "dataset_id",
        "prompt_1",
        "prompt_2",
        "prompt_3",
        "prompt_4",
    ]
    prompts = {(line[0], line[1], line[2]): line[4:] for line in table[1:]}
    assert {line[2]: int(line[3]) for line in table[1:]} == DATASET_IDS
    used = defaultdict(set)
    for name in ("train", "validation", "test"):
        for row in queries[name]:
            dataset, number = dataset_and_task(row["task"])
            allowed = prompts[(*MODALITIES[number], dataset)]
            assert row["instruction"] in (allowed if name == "train" else allowed[:1])
            used[row["task"]].add(row["instruction"])
    assert all(len(instructions) == 4 for instructions in used.values())
    assert {row["instruction"] for name in ("text_pairs", "image_pairs") for row in queries[name]} == {None}


def test_qrels_match_the_queries(queries):
    for split in ("validation", "test"):
        qrels, expected = defaultdict(set), defaultdict(set)
        for path in (DATA / "qrels").glob(f"*_{split}_qrels.txt"):
            for line in path.read_text().splitlines():
                query, zero, document, relevance, task = line.split()
                assert (zero, relevance) == ("0", "1")
                qrels[query, int(task)].add(document)
        for row in queries[split]:
            expected[row["id"], dataset_and_task(row["task"])[1]].update(row["positive_ids"])
        assert qrels == expected


def test_the_manifest_matches_the_files(documents, queries):
    manifest = json.loads((DATA / "manifest.json").read_text())
    files = {str(p.relative_to(DATA)): p for p in DATA.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == {
        name: entry["sha256"] for name, entry in manifest["files"].items()
    }
    assert sum(manifest["counts"]["documents"].values()) == len(documents)
    for name, rows in queries.items():
        assert sum(manifest["counts"]["queries"][name].values()) == len(rows)
    assert sum(path.stat().st_size for path in files.values()) < 18e6
    assert all(source["license"] for source in manifest["sources"])


def test_normalize_and_phrases_match_whole_words_only():
    assert normalize("São Tomé & Príncipe’s “Flag_1”") == "sao tome and principe s flag 1"
    phrases = Phrases(["red fox", "ant"])
    assert phrases.found_in("A Red-Fox and an elephant") == {"red fox"}
    assert phrases.found_in("An ant!") == {"ant"}
    assert phrases.found_in("red, the fox") == set()


def test_group_joins_what_is_linked_through_others():
    component = group([("a", "x"), ("b", "y"), ("c", "x"), ("c", "y"), ("d", "d")])
    assert component["a"] == component["b"] == component["c"]
    assert component["d"] != component["a"]


@pytest.mark.parametrize(
    ("code", "key"),
    [
        ("1f9d1-1f3ff-200d-1f680", ("P-1f680", "person")),  # an astronaut is not a rocket
        ("1f469-200d-1f680", ("P-1f680", "woman")),
        ("1f3c4-1f3fb-200d-2642", ("1f3c4", "man")),
        ("1f3f0", ("1f3f0", "person")),  # a castle: 1f3f0 is not a skin tone
        ("2640", ("2640", "person")),
        ("1f468-200d-1f469-200d-1f467", ("P-P-1f467", None)),
    ],
)
def test_concept_key_drops_tone_and_gender(code, key):
    assert concept_key(code) == key


def test_cut_keeps_whole_sentences():
    assert cut("One is here. Two is here. Three is far too long.", 26) == "One is here. Two is here."
    assert cut("a sentence that goes on, and on and on", 25) == "a sentence that goes on …"
