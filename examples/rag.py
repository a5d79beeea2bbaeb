"""How often does the context retrieved for a question hold the answer? BM25, the embedder, and reranking, side by side.

    pip install bm25s
    python examples/rag.py --model runs/demo/checkpoints/distillation --reranker runs/demo/checkpoints/reranker
    python examples/rag.py --openstax FOLDER --book astronomy --model … --reranker …

The questions of the shipped demo are short descriptions ("Largest species of deer"), the context encyclopedia
paragraphs, some with a picture, and the answer is the name of what is described. With --openstax, a question is the
meaning of a textbook's glossary term and the answer is the term; the context is all of the book's paragraphs and, with
--pictures, its figures too. FOLDER holds tables of OpenStax's books (CC BY 4.0, made from the CNXML sources in its
osbooks-* repositories): passages.parquet (book, id, text), figures.parquet (book, id, caption, image) and
glossary.parquet (book, term, meaning).

A context holds the answer if its texts name it, whatever the case. That is what a reader of the context could answer
from, and it needs no judge.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from umarvel_ray import Embedder, Reranker, demo

INSTRUCTION = "Retrieve the encyclopedia paragraph that matches this short description."
CANDIDATES = 50  # that the reranker reads
MAX_QUESTIONS = 300


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


Search = Callable[[Question], Sequence[int]]  # the documents' numbers, best first


def demo_questions(pictures: bool) -> tuple[list[dict[str, Any]], list[Question]]:
    """The test split's paragraphs, with or without their pictures, and its descriptions of what they are about."""
    rows = pq.read_table(demo.DATA / "documents.parquet", filters=[("split", "=", "test"), ("source", "=", "wiki")])
    documents = [
        {"text": row["text"], "image": row["image"] if pictures else None}
        for row in rows.to_pylist()
        if pictures or row["modality"] == "text"
    ]
    queries = pq.read_table(demo.DATA / "test.parquet", filters=[("task", "=", "wiki_task1")]).to_pylist()
    return documents, [Question(row["text"], row["concept"]) for row in queries]


def book_questions(folder: Path, book: str, pictures: bool) -> tuple[list[dict[str, Any]], list[Question]]:
    """A textbook's paragraphs, with its figures on request, and the meanings of its glossary's terms."""

    def rows(table: str) -> list[dict[str, Any]]:
        return pq.read_table(folder / f"{table}.parquet", filters=[("book", "=", book)]).to_pylist()

    documents = [{"text": row["text"]} for row in rows("passages")]
    if pictures:
        documents += [{"text": row["caption"], "image": row["image"]} for row in rows("figures")]
    return documents, [Question(row["meaning"], row["term"]) for row in rows("glossary")]


def holds(question: Question, text: str | None) -> bool:
    """Whether the text names the answer."""
    return re.search(rf"\b{re.escape(question.answer)}\b", text or "", re.IGNORECASE) is not None


def bm25(documents: list[dict[str, Any]]) -> Search:
    """BM25 over the documents' texts."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize([one["text"] or "" for one in documents], show_progress=False), show_progress=False)

    def search(question: Question) -> Sequence[int]:
        asked = bm25s.tokenize([question.text], show_progress=False)
        found, _ = index.retrieve(asked, k=min(CANDIDATES, len(documents)), show_progress=False)
        return found[0].tolist()

    return search


def embedder_of(path: str, documents: list[dict[str, Any]]) -> Search:
    """The nearest documents by cosine."""
    embedder = Embedder.from_pretrained(path)
    vectors = embedder.encode_document(documents)

    def search(question: Question) -> Sequence[int]:
        query = embedder.encode_query({"text": question.text}, prompt=INSTRUCTION)
        return (-(vectors @ query)).argsort(kind="stable")[:CANDIDATES].tolist()

    return search


def reranked(search: Search, path: str, documents: list[dict[str, Any]]) -> Search:
    """The best of another search in the order of the reranker."""
    reranker = Reranker.from_pretrained(path)

    def again(question: Question) -> Sequence[int]:
        found = search(question)
        query = {"text": question.text, "instruction": INSTRUCTION}
        order = (-reranker.score(query, [documents[number] for number in found])).argsort(kind="stable")
        return [found[place] for place in order]

    return again


def measure(
    documents: list[dict[str, Any]], questions: list[Question], search: Search, depths: Sequence[int]
) -> dict[int, float]:
    """Share of the questions whose answer is in the first 1, 5 … documents."""
    found = np.zeros((len(questions), max(depths)), bool)
    for row, question in zip(found, questions, strict=True):
        held = [holds(question, documents[number]["text"]) for number in search(question)[: max(depths)]]
        row[: len(held)] = held
    return {depth: float(found[:, :depth].any(1).mean()) for depth in depths}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an embedder's checkpoint")
    parser.add_argument("--reranker", help="a reranker's checkpoint")
    parser.add_argument("--openstax", type=Path, help="folder of the textbooks' tables; default: the demo's questions")
    parser.add_argument("--book", default="astronomy")
    parser.add_argument("--pictures", action="store_true", help="the context may hold pictures too")
    parser.add_argument("--questions", type=int, default=MAX_QUESTIONS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(arguments)

    documents, asked = (
        book_questions(args.openstax, args.book, args.pictures) if args.openstax else demo_questions(args.pictures)
    )
    answerable = [one for one in asked if any(holds(one, document["text"]) for document in documents)]
    chosen = np.random.default_rng(0).permutation(len(answerable))[: args.questions]
    questions = [answerable[number] for number in sorted(chosen)]
    pictures = sum(one.get("image") is not None for one in documents)
    print(f"{len(questions)} questions, {len(documents)} documents, {pictures} with a picture")

    nearest = embedder_of(args.model, documents)
    searches = {"BM25": bm25(documents), "embedder": nearest}
    if args.reranker:
        searches["embedder, reranked"] = reranked(nearest, args.reranker, documents)
    figures = {}
    for name, search in searches.items():
        figures[name] = measure(documents, questions, search, (1, 5, 10))
        print(f"{name:20}" + "".join(f"  first {depth}: {share:.3f}" for depth, share in figures[name].items()))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
