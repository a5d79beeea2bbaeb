"""`umarvel VERB [RECIPE] key=value … [--dry-run]`, and the shared main of the scripts in `jobs/`.

A user's mistake or a full disk ends in one line on stderr and status 2, Ctrl-C in one line and status 130.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from umarvel_ray.errors import UserError
from umarvel_ray.ray_session import prepare_environment, start_ray
from umarvel_ray.recipe import LADDER, RERANKER, Recipe, dump_recipe, load_recipe

if TYPE_CHECKING:
    from umarvel_ray.runs import Run

# verb: (its job in umarvel_ray.pipeline, help)
JOB_VERBS = {
    "demo": ("pipeline", "run every stage and write the report; the same command resumes an interrupted run"),
    "train": ("pipeline", "the same for a recipe of your own"),
    "train-stage1": ("stage1", "progressive transition: text pairs, image-caption pairs, instructions"),
    "mine": ("mine", "embed, exact top-k and filters: the hard negatives"),
    "train-stage2": ("stage2", "continue training with mined hard negatives"),
    "train-reranker": ("reranker", "train the pointwise reranker"),
    "train-stage3": ("stage3", "distill recall-then-rerank into the embedder"),
    "embed": ("embed", "embed every document with the final model"),
    "evaluate": ("evaluate", "measure recall per task after every finished phase, and write the report"),
}
ENVIRONMENT_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
}  # fmt: skip
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports a malformed command in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `umarvel`; returns the exit status."""
    return guard(lambda: _main(argv))


def run_job(job_name: str) -> NoReturn:
    """Entry point of `jobs/*.py`: `--recipe NAME key=value … [--dry-run]` for one job of the pipeline."""
    parser = Parser(prog=f"jobs/{job_name}.py")
    parser.add_argument("--recipe", default="demo", help="a YAML file or a shipped recipe's name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    _add_switches(parser)

    def job() -> None:
        options = parser.parse_intermixed_args()
        _run_job(job_name, options.recipe, options.overrides, options)

    sys.exit(guard(job))


def _main(argv: list[str] | None) -> None:
    parser = Parser(prog="umarvel", description="Train, mine, rerank, distil, evaluate and serve a retriever.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    for verb, (job_name, text) in JOB_VERBS.items():
        job = verbs.add_parser(verb, help=text, description=text)
        job.add_argument("words", nargs="*", metavar="[RECIPE] key=value", help="default: demo, as it is")
        _add_switches(job)
        job.set_defaults(job_name=job_name, run=_run_job_verb)
    index = verbs.add_parser("index", help="build a faiss index from embedded documents")
    index.add_argument("embeddings", nargs="?", type=Path, default=Path("runs/demo/embeddings/documents"))
    index.add_argument("output", nargs="?", type=Path, default=Path("runs/demo/index"))
    index.add_argument("--factory", help="a faiss factory string, such as HNSW32; default: by size")
    index.set_defaults(run=_run_index)
    export = verbs.add_parser("export", help="copy a run's checkpoint to a folder of its own, for release")
    export.add_argument("words", nargs="*", metavar="[RECIPE] key=value", help="the run's recipe (demo)")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to make")
    export.add_argument("--phase", help="text, image-text, …, or reranker; default: the embedder's last finished one")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as they are")
    export.add_argument("--license", dest="license_name", help="for the model card, such as apache-2.0")
    export.set_defaults(run=_run_export)
    search = verbs.add_parser("search", help="search a run's documents with its newest model")
    search.add_argument("text", nargs="?", help="what to look for")
    search.add_argument("--image", help="a picture to look for, alone or with the text")
    search.add_argument("--instruction", help="what kind of document to find, in words")
    search.add_argument("--run", dest="folder", type=Path, default=Path("runs/demo"), help="run folder (runs/demo)")
    search.add_argument("--top-k", type=int, default=10, help="results (10)")
    search.add_argument("--rerank", action="store_true", help="reorder the best ones with the reranker")
    search.add_argument("--html", type=Path, help="also write the results, with pictures, to this page")
    search.set_defaults(run=_run_search)
    serve = verbs.add_parser("serve", help="answer over HTTP: embeddings, rerank, search")
    serve.add_argument("model", nargs="?", help="an embedder's checkpoint; default: what the config file names")
    serve.add_argument("--reranker", help="a reranker's checkpoint; without it nothing is reranked")
    serve.add_argument("--index", help="a folder of embeddings or a saved index; without it nothing is searched")
    serve.add_argument("--data", help="the documents that the index names: builtin:demo or a Parquet folder")
    serve.add_argument("--config", type=Path, help="a Ray Serve config file; default: the one of this package")
    serve.set_defaults(run=_run_serve)
    options = parser.parse_args(argv)
    options.run(options)


def _add_switches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and an estimate of its work, and stop"
    )
    parser.add_argument("--verbose", action="store_true", help="show the workers' own output")


def _run_job_verb(options: argparse.Namespace) -> None:
    _run_job(options.job_name, *_recipe_words(options.words), options)


def _recipe_words(words: list[str]) -> tuple[str, list[str]]:
    """The recipe and its overrides."""
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {' and '.join(recipes)}; write changes as key=value")
    return recipes[0] if recipes else "demo", [word for word in words if "=" in word]


def _run_job(job_name: str, source: str, overrides: list[str], options: argparse.Namespace) -> None:
    recipe = load_recipe(source, overrides)
    if options.dry_run:
        from umarvel_ray.estimate.table import estimate

        print(dump_recipe(recipe), *(f"# {line}".rstrip() for line in estimate(recipe).splitlines()), sep="\n")
        return
    with open_run(recipe, options.verbose) as run:
        from umarvel_ray.pipeline import JOBS

        JOBS[job_name](run)


@contextmanager
def open_run(recipe: Recipe, verbose: bool = False) -> Iterator[Run]:
    """A run folder and the Ray that a driver works on it with."""
    if not recipe.cluster.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed
    prepare_environment()
    from umarvel_ray.runs import Run

    run = Run.open(recipe)
    with start_ray(verbose=verbose):
        try:
            yield run
        except SystemExit:  # raised by Ray Train's own Ctrl-C handler, which its first run installs
            raise KeyboardInterrupt from None


def _run_index(options: argparse.Namespace) -> None:
    from umarvel_ray.index.faiss_index import build_index

    build_index(options.embeddings, options.output, options.factory)


def _run_export(options: argparse.Namespace) -> None:
    recipe = load_recipe(*_recipe_words(options.words))
    if options.phase not in (None, *LADDER, RERANKER):
        raise UserError(f"no phase '{options.phase}'; give one of: {', '.join((*LADDER, RERANKER))}")
    from umarvel_ray.evaluate.report import scores_of
    from umarvel_ray.model.export import export_checkpoint
    from umarvel_ray.runs import Run

    run = Run(recipe, recipe.run_dir)
    phase = options.phase or run.last_phase or LADDER[0]
    source = run.parent(phase, "export")
    export_checkpoint(source, options.to, scores_of(run, phase), options.dtype, options.license_name)
    print(f"exported {source} to {options.to.absolute()}")


def _run_search(options: argparse.Namespace) -> None:
    given = {"text": options.text, "image": options.image, "instruction": options.instruction}
    query = {key: value for key, value in given.items() if value is not None}
    if not query.keys() & {"text", "image"}:
        raise UserError("nothing to search for; give a text, --image FILE, or both")
    if options.top_k < 1:
        raise UserError(f"--top-k {options.top_k}: ask for at least one result")
    from umarvel_ray.search import as_lines, search_run, write_page

    hits = search_run(options.folder, query, options.top_k, options.rerank)
    print(as_lines(hits))
    if options.html:
        write_page(options.html, query, hits)


def _run_serve(options: argparse.Namespace) -> None:
    config = options.config or Path(str(files("umarvel_ray.serving") / "config.yaml"))
    if not config.is_file():
        raise UserError(f"no Serve config {config}; give --config FILE")
    for folder in filter(None, (options.model, options.reranker, options.index)):
        if not Path(folder).is_dir():
            raise UserError(f"no folder {folder} to serve; give a checkpoint or an index")
    from umarvel_ray.serving.environment import SERVE

    prepare_environment(SERVE)
    parts = {"UMARVEL_RERANKER": options.reranker, "UMARVEL_INDEX": options.index, "UMARVEL_DATA": options.data}
    if options.model:
        os.environ["UMARVEL_EMBEDDER"] = options.model
        parts |= {name: parts[name] or "" for name in ("UMARVEL_RERANKER", "UMARVEL_INDEX")}
    os.environ.update({name: value for name, value in parts.items() if value is not None})
    os.execv(sys.executable, [sys.executable, "-m", "ray.serve.scripts", "run", str(config)])


def guard(work: Callable[[], None]) -> int:
    """Do the work of a driver; returns the exit status, after one line on stderr for an error that the user can fix."""
    try:
        work()
    except KeyboardInterrupt:
        print("umarvel: interrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = next(filter(None, map(_line, _causes(error))), None)
        if line is None:
            raise
        print(f"umarvel: {line}", file=sys.stderr)
        return 2
    return 0


def _line(error: BaseException) -> str | None:
    """The one line a user needs to fix an error; None for a defect of this package."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free some space or set output=DIR to another folder"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, nearest first, without Ray's wrappers."""
    remote = sys.modules["ray"].exceptions.RayTaskError if "ray" in sys.modules else ()
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, remote):
            todo.append(current.cause)
        else:
            yield current
        todo += [current.__cause__, current.__context__]


if __name__ == "__main__":
    sys.exit(main())
