"""`umarvel VERB [RECIPE] key=value … [--dry-run]`, and the entry point shared by the scripts in `jobs/`.

A user error or a full disk ends in one line on stderr and exit status 2, Ctrl-C in one line and status 130, a closed
pipe in status 141.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from umarvel_ray.errors import UserError
from umarvel_ray.ray_session import prepare_environment, start_ray
from umarvel_ray.recipe import LADDER, RERANKER, Recipe, dump_recipe, load_recipe

if TYPE_CHECKING:
    from umarvel_ray.runs import Run

# verb: (its job in `pipeline.JOBS`, help text)
JOB_VERBS = {
    "demo": ("pipeline", "run all stages and write the report; the same command resumes an interrupted run"),
    "train": ("pipeline", "the same for your own recipe"),
    "train-stage1": ("stage1", "progressive transition: text pairs, image-caption pairs, instructions"),
    "mine": ("mine", "embed the training set, search it exactly and filter: the hard negatives"),
    "train-stage2": ("stage2", "continue training with mined hard negatives"),
    "train-reranker": ("reranker", "train the pointwise reranker"),
    "train-stage3": ("stage3", "distill recall-then-rerank into the embedder"),
    "embed": ("embed", "embed all documents with the final model"),
    "evaluate": ("evaluate", "measure recall per task for every finished phase, and write the report"),
}
MODEL_OPTIONS = {  # options of a verb: the recipe's key, and help text
    "embed": {
        "--model": ("embed.checkpoint", "embed with this model instead of the run's"),
        "--preset": ("embed.preset", "the system that released it, such as gme (docs/guide.md)"),
    },
    "evaluate": {
        "--model": (
            "evaluate.checkpoint",
            "evaluate this model instead of the run's (docs/guide.md); several for --benchmark",
        ),
        "--preset": ("evaluate.preset", "the system that released it, such as gme (docs/guide.md)"),
        "--reranker": ("evaluate.reranker", "rerank its results with this one"),
        "--reranker-preset": ("evaluate.reranker_preset", "the system that released the reranker"),
    },
}
ENVIRONMENT_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
}  # fmt: skip
INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """Reports a malformed command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def path(text: str) -> Path:
    """A path on the command line, where `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))


def main(argv: list[str] | None = None) -> int:
    """Entry point of `umarvel`; returns the exit status."""
    return guard(lambda: _main(argv))


def run_job(job_name: str) -> NoReturn:
    """Entry point of `jobs/*.py`: `--recipe NAME key=value … [--dry-run]` for one job of the pipeline."""
    parser = Parser(prog=f"jobs/{job_name}.py")
    parser.add_argument("--recipe", default="demo", help="a YAML file or the name of a shipped recipe (demo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    _add_switches(parser)

    def job() -> None:
        options = parser.parse_intermixed_args()
        _run_job(job_name, options.recipe, options.overrides, options)

    sys.exit(guard(job))


def _main(argv: list[str] | None) -> None:
    parser = Parser(prog="umarvel", description="Train, mine, rerank, distill, evaluate and serve a retriever.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    for verb, (job_name, text) in JOB_VERBS.items():
        job = verbs.add_parser(verb, help=text, description=text)
        job.add_argument("words", nargs="*", metavar="[RECIPE] key=value", help="a recipe (demo) and changes to it")
        _add_switches(job)
        for option, (_, text) in MODEL_OPTIONS.get(verb, {}).items():
            job.add_argument(option, help=text, action="append" if option == "--model" else "store")
        if verb == "evaluate":
            _add_benchmark(job)
        job.set_defaults(job_name=job_name, run=_run_job_verb)
    load = verbs.add_parser("import", help="make a data folder of your own pictures and texts, and a recipe for it")
    load.add_argument("source", type=path, help="a folder or a file (docs/your-data.md)")
    load.add_argument("--to", type=path, required=True, metavar="DIR", help="the data folder to create")
    load.add_argument("--kind", help="what the source is, such as captions or webdataset; default: found out")
    load.add_argument("--caption", metavar="KEY", help="of a picture's JSON, if several keys may hold its caption")
    load.add_argument(
        "--instruction", action="append", default=[], help="of all queries, or of one task: 'task0=Find a photo.'"
    )
    load.add_argument("--holdout", help="queries of validation and of test: a share or a count (5%%, 100 to 1000)")
    load.add_argument("--seed", type=int, default=42, help="of the draw of validation and test (42)")
    load.set_defaults(run=_run_import)
    index = verbs.add_parser(
        "index", help="build a faiss index from embedded documents, or copy them into a service's store"
    )
    index.add_argument("embeddings", nargs="?", type=path, default=Path("runs/demo/embeddings/documents"))
    index.add_argument("output", nargs="?", type=path, default=Path("runs/demo/index"))
    index.add_argument("--factory", help="a faiss factory string, such as HNSW32; default: chosen by size")
    index.add_argument(
        "--config", type=path, help="copy the documents of this Serve config's index and live into its store instead"
    )
    index.set_defaults(run=_run_index)
    export = verbs.add_parser("export", help="export a run's checkpoint to a folder for release")
    export.add_argument("words", nargs="*", metavar="[RECIPE] key=value", help="the run's recipe (demo)")
    export.add_argument("--to", type=path, required=True, metavar="DIR", help="the folder to create")
    export.add_argument(
        "--phase", help="text, image-text, …, or reranker; default: the last finished phase of the embedder"
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="data type of the weights; default: unchanged")
    export.add_argument("--license", dest="license_name", help="license for the model card, such as apache-2.0")
    export.set_defaults(run=_run_export)
    status = verbs.add_parser("status", help="how far a run is: phases, losses, speed, time left, failures")
    status.add_argument("folder", nargs="?", type=path, default=Path("runs/demo"), metavar="RUN", help="(runs/demo)")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_run_status)
    search = verbs.add_parser("search", help="search a run's documents with its newest model")
    search.add_argument("text", nargs="?", help="the query text")
    search.add_argument("--image", help="a query picture, alone or with the text")
    search.add_argument("--instruction", help="what kind of document to find, in words")
    search.add_argument("--run", dest="folder", type=path, default=Path("runs/demo"), help="run folder (runs/demo)")
    search.add_argument("--top-k", type=int, default=10, help="number of results (10)")
    search.add_argument("--rerank", action="store_true", help="rerank the best results")
    search.add_argument("--html", type=path, help="also write the results, with pictures, to this HTML file")
    search.set_defaults(run=_run_search)
    serve = verbs.add_parser("serve", help="serve embeddings, reranking and search over HTTP")
    serve.add_argument("model", nargs="?", help="an embedder's checkpoint; default: as the config file says")
    serve.add_argument("--preset", help="the system that released the model, such as gme (docs/guide.md)")
    serve.add_argument("--reranker", help="a reranker's checkpoint")
    serve.add_argument("--reranker-preset", help="the system that released the reranker")
    serve.add_argument("--index", help="a folder of embeddings or a saved index, to search in")
    serve.add_argument("--data", help="the documents behind the index: builtin:demo or a Parquet folder")
    serve.add_argument("--live", help="a folder for documents that clients may add")
    serve.add_argument("--config", type=path, help="a Ray Serve config file; default: the shipped one")
    serve.set_defaults(run=_run_serve)
    options, late = parser.parse_known_args(argv)
    if late and ("words" not in options or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # words after a switch
        options.words += late
    options.run(options)


def _add_switches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and a cost estimate, and exit"
    )
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray workers")


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a published benchmark instead of a run (docs/evaluation.md)")
    group.add_argument("--benchmark", metavar="NAME", help="such as circo or mbeir; a wrong name lists all")
    group.add_argument("--data", type=path, metavar="DIR", help="the benchmark's own folder")
    group.add_argument(
        "--rerank-weight", metavar="W", help="w in cosine + w · P(yes), or 'calibrate'; default: the paper's"
    )
    group.add_argument(
        "--protocol", choices=("ours", "reference"), default="ours", help="reference: repeat the authors' choices"
    )
    group.add_argument(
        "--prompts", choices=("hash", "average"), default="hash", help="M-BEIR's instructions: one per query, or all"
    )
    group.add_argument("--to", type=path, default=Path("runs/benchmarks"), help="output folder (runs/benchmarks)")


def _run_job_verb(options: argparse.Namespace) -> None:
    if getattr(options, "benchmark", None):
        _run_benchmark(options)
        return
    source, overrides = _recipe_words(options.words)
    _run_job(options.job_name, source, [*overrides, *_model_overrides(options)], options)


def _model_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides that the options for models stand for."""
    given = {
        option: (key, value)
        for option, (key, _) in MODEL_OPTIONS.get(options.job_name, {}).items()
        if (value := getattr(options, option.removeprefix("--").replace("-", "_"))) is not None
    }
    for preset, model in (("--preset", "--model"), ("--reranker-preset", "--reranker"), ("--reranker", "--model")):
        if preset in given and model not in given:
            raise UserError(f"{preset} needs {model}")
    if "--model" in given:
        key, models = given["--model"]
        if len(models) > 1:
            raise UserError("several --model are for --benchmark; give one")
        given["--model"] = key, models[0]
    return [f"{key}={json.dumps(value)}" for key, value in given.values()]


def _run_benchmark(options: argparse.Namespace) -> None:
    if not options.data or not (options.model or options.dry_run):
        raise UserError("--benchmark needs --data DIR and --model CHECKPOINT")
    named = bool(_recipes_in(options.words))
    source, overrides = _recipe_words(options.words)
    prepare_environment()
    from umarvel_ray.evaluate.benchmarks import Job, check_benchmark, evaluate_benchmark, local_resources
    from umarvel_ray.evaluate.suites import Protocol

    weight = options.rerank_weight
    job = Job(
        options.benchmark,
        options.data,
        options.model or [],
        options.reranker,
        Protocol(options.protocol == "reference", options.prompts, _weight(weight) if weight else None),
        options.preset,
        options.reranker_preset,
        named or any(word.startswith("model.") for word in overrides),
        options.to,
    )
    if options.dry_run:
        print(check_benchmark(job))
        return
    recipe = load_recipe(source, overrides if named else [*local_resources(), *overrides])
    if not recipe.cluster.gpus_per_embedder:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns about guessing
    check_benchmark(job)
    with start_ray(verbose=options.verbose):
        evaluate_benchmark(job, recipe)


def _weight(text: str) -> float | Literal["calibrate"]:
    if text == "calibrate":
        return "calibrate"
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0.0 <= weight < float("inf"):
        raise UserError(f"--rerank-weight {text}: give a number that is not negative, or 'calibrate'")
    return weight


def _recipe_words(words: list[str]) -> tuple[str, list[str]]:
    """Split arguments into the recipe's name and its overrides."""
    recipes = _recipes_in(words)
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {' and '.join(recipes)}; write changes as key=value")
    return recipes[0] if recipes else "demo", [word for word in words if word not in recipes]


def _recipes_in(words: list[str]) -> list[str]:
    return [word for word in words if "=" not in word or os.path.isfile(word)]


def _run_job(job_name: str, source: str, overrides: list[str], options: argparse.Namespace) -> None:
    recipe = load_recipe(source, overrides)
    if options.dry_run:
        from umarvel_ray.estimate.table import estimate

        print(dump_recipe(recipe), *(f"# {line}".rstrip() for line in estimate(recipe).splitlines()), sep="\n")
        return
    with open_run(recipe, options.verbose, job_name) as run:
        from umarvel_ray.pipeline import JOBS

        JOBS[job_name](run)


@contextmanager
def open_run(recipe: Recipe, verbose: bool = False, job: str | None = None) -> Iterator[Run]:
    """Open a run folder and start Ray, as a driver needs them; before Ray, look at what the job reads."""
    if not recipe.cluster.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns about guessing
    prepare_environment()
    from umarvel_ray.preflight import check_job
    from umarvel_ray.runs import Run

    is_new = not Run(recipe, recipe.run_dir).recipe_path.exists()
    run = Run.open(recipe)
    with run.held():
        try:
            if job:
                check_job(run, job)
        except UserError:
            if is_new:  # nothing was made by this recipe: the folder shall take a mended one
                run.recipe_path.unlink()
            raise
        with start_ray(verbose=verbose):
            try:
                yield run
            except SystemExit:  # raised by the Ctrl-C handler that Ray Train installs
                raise KeyboardInterrupt from None


def _run_import(options: argparse.Namespace) -> None:
    from umarvel_ray.importing.importer import import_dataset

    import_dataset(
        options.source, options.to, options.kind, options.instruction, options.holdout, options.seed, options.caption
    )


def _run_index(options: argparse.Namespace) -> None:
    if options.config:
        if not options.config.is_file():
            raise UserError(f"no Serve config {options.config}; give --config FILE")
        from umarvel_ray.serving.store import fill_store

        fill_store(options.config)
        return
    from umarvel_ray.index.faiss_index import build_index

    build_index(options.embeddings, options.output, options.factory)


def _run_export(options: argparse.Namespace) -> None:
    recipe = load_recipe(*_recipe_words(options.words))
    if options.phase not in (None, *LADDER, RERANKER):
        raise UserError(f"no phase '{options.phase}'; choose one of: {', '.join((*LADDER, RERANKER))}")
    from umarvel_ray.evaluate.report import scores_of
    from umarvel_ray.model.export import export_checkpoint
    from umarvel_ray.runs import Run

    run = Run(recipe, recipe.run_dir)
    phase = options.phase or run.last_phase or LADDER[0]
    source = run.parent(phase, "export")
    export_checkpoint(source, options.to, scores_of(run, phase), options.dtype, options.license_name)
    print(f"exported {source} to {options.to.absolute()}")


def _run_status(options: argparse.Namespace) -> None:
    from umarvel_ray.status import as_json, as_text, read_status

    status = read_status(options.folder)
    print(as_json(status) if options.json else as_text(status))


def _run_search(options: argparse.Namespace) -> None:
    image = options.image and os.path.expanduser(options.image)
    fields = {"text": options.text, "image": image, "instruction": options.instruction}
    query = {key: value for key, value in fields.items() if value is not None}
    if not query.keys() & {"text", "image"}:
        raise UserError("nothing to search for; give a text, --image FILE, or both")
    if options.top_k < 1:
        raise UserError(f"--top-k {options.top_k}: must be at least 1")
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
    names = ("preset", "reranker", "reranker_preset", "index", "data", "live")
    parts = {f"UMARVEL_{name.upper()}": getattr(options, name) for name in names}
    if options.model:
        os.environ["UMARVEL_EMBEDDER"] = options.model
        for name in ("UMARVEL_PRESET", "UMARVEL_RERANKER", "UMARVEL_INDEX", "UMARVEL_LIVE"):
            os.environ.setdefault(name, "")  # the config file's belong to its own embedder
    os.environ.update({name: value for name, value in parts.items() if value is not None})
    from umarvel_ray.serving.auth import VARIABLE, hashed
    from umarvel_ray.serving.run import run

    if listed := os.environ.get(VARIABLE, "").strip():
        os.environ[VARIABLE] = hashed(listed)  # the environment of many processes, for as long as they live
    run(config)


def guard(work: Callable[[], None]) -> int:
    """Run a driver's work and return the exit status; an error that the user can fix is one line on stderr.

    What the terminal's encoding lacks is shown as "?". A reader of the output that has gone, such as `head`, ends the
    work without a word.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed there at the exit
        return PIPE_CLOSED
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
    """The line that tells a user how to fix an error; None for a bug in this package."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free some space or set output=DIR to another folder"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, nearest first, with Ray's wrappers removed."""
    remote = sys.modules["ray"].exceptions.RayTaskError if "ray" in sys.modules else ()
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, remote):
            pending.append(current.cause)
        else:
            yield current
        pending += [current.__cause__, current.__context__]


if __name__ == "__main__":
    sys.exit(main())
