"""Call a running service over plain HTTP: embeddings, reranking and search; with OpenAI's client too, if installed.

    make demo serve                                          # or: umarvel serve, on a finished run
    python examples/call_service.py --query "a red flag"
    python examples/call_service.py --url https://search.example.org --image flag.png

The key of a protected service is read from UMARVEL_API_KEY. Interactive documentation of the routes: URL/docs.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

INSTRUCTION = "Find a picture that matches the description."
DOCUMENTS = ["a flag with a red star", "two boats near a pier", "a bowl of soup"]
KEY = os.environ.get("UMARVEL_API_KEY", "none")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--query", default="a red flag")
    parser.add_argument("--image", type=Path, help="a picture that is part of the query")
    args = parser.parse_args(arguments)

    query = {"text": args.query, "instruction": INSTRUCTION}
    if args.image:
        query["image"] = base64.b64encode(args.image.read_bytes()).decode()

    answer = call(f"{args.url}/v1/embeddings", {"input": [query], "input_type": "query"})
    vector = answer["data"][0]["embedding"]
    print(f"embedding by '{answer['model']}': {len(vector)} dimensions, {answer['usage']['total_tokens']} tokens")

    print("documents by relevance:")
    for result in call(f"{args.url}/v1/rerank", {"query": query, "documents": DOCUMENTS})["results"]:
        print(f"  {result['relevance_score']:.3f}  {DOCUMENTS[result['index']]}")

    print("found in the index:")
    found = call(f"{args.url}/v1/search", {"query": query, "top_k": 5, "rerank": True, "return_documents": True})
    for result in found["results"]:
        text = result["document"]["text"] or ""
        print(f"  {result['score']:.3f}  {result['id']:<10}  {result['modality']:<10}  {text[:60]}".rstrip())

    if importlib.util.find_spec("openai"):
        from openai import OpenAI

        client = OpenAI(base_url=f"{args.url}/v1", api_key=KEY)
        embedded = client.embeddings.create(
            model=answer["model"], input=DOCUMENTS, extra_body={"input_type": "document"}
        )
        print(f"OpenAI's client: {len(embedded.data)} embeddings of {len(embedded.data[0].embedding)} dimensions")


def call(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a POST."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
