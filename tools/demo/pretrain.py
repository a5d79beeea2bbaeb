"""Pretrains the demo's base: one process, plain torch, one CPU core, for a given CPU time rather than number of steps.

views    each training picture is redrawn a few times and shown once to the picture teacher
vision   the tower learns the picture teacher's maps, the text teacher's vectors of the picture's words, and that two
         drawings of one thing belong together (through temporary heads)
text     the language model, whose word embeddings come from the text teacher, learns passages and questions
joint    the whole model learns to say what a picture shows, to answer questions about it, and to say Yes or No
further  from a finished base: the same, and to embed what pictures, texts and the words of a dictionary mean, and to
         judge which documents answer a query

Only the training split and the dictionary are trained on; validation concepts are used to report progress. Learning
rates follow the CPU time used, so a busy machine changes nothing; a killed run resumes from its last save.
"""

import hashlib
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from tools.demo.base_model import PATCH, TEMPORAL, build_config, build_tokenizer, save_base
from tools.demo.corpus import read_corpus
from tools.demo.dictionary import FOLDER, read_dictionary
from tools.demo.lessons import Lessons
from tools.demo.losses import Heads, Losses, PretrainingLosses
from tools.demo.muon import Muon
from tools.demo.pair_sampler import PairSampler
from tools.demo.reading import Reader
from tools.demo.teachers import TextTeacher
from tools.demo.validation import Validation
from tools.demo.views import make_views, patches_of
from tools.demo.vocabulary import ANSWERS, choose_pieces, embed_vocabulary, lengthen

DICTIONARY = 24_000  # of WordNet's nouns, the 18,430 things first
PASSAGES_TAUGHT = 9000  # passages embedded by the text teacher, besides every description of a picture
PARTS = {"vision": 0.55, "text": 0.12, "joint": 0.33}  # shares of the CPU time, which excludes the views
FURTHER = {"further": 1.0}  # for a run that starts from a base, which uses all passages
RATES = {"vision": 1.0, "text": 0.5, "joint": 0.4, "further": 0.4}
SAVE_EVERY = 300.0  # seconds


class Pretraining:
    """One run: model, heads and clock.

    Args:
        work: folder for the views, the log and the state to resume from.
        minutes: CPU time to train for.
        start: a finished base to continue from.
        dictionary: WordNet's folder, needed to continue.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        work: Path,
        minutes: float,
        start: Path | None = None,
        dictionary: Path = FOLDER,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        work.mkdir(parents=True, exist_ok=True)
        self.data, self.out, self.work, self.start, self.seconds = data, out, work, start, minutes * 60
        self.dictionary = dictionary
        self.parts = FURTHER if start else PARTS
        self.state = work / ("further.pt" if start else "state.pt")
        self.corpus = read_corpus(data, "train")
        self.log(f"{len(self.corpus.pictures)} pictures, {len(self.corpus.passages)} texts")
        self.teacher = TextTeacher()
        pieces, piece_ids = choose_pieces(self.teacher, self.corpus)
        self.tokenizer = build_tokenizer(pieces)
        config = build_config(len(self.tokenizer))
        table, basis = embed_vocabulary(self.teacher, piece_ids, [score for _, score in pieces[1:]])
        self.model = Qwen2VLForConditionalGeneration(config)
        if start:
            self.model.load_state_dict(Qwen2VLForConditionalGeneration.from_pretrained(start).state_dict())
        else:
            self._initialize(table)
        embeddings = self.model.get_input_embeddings().weight
        embeddings.requires_grad_(False)  # words not seen in training must keep their embeddings
        lengthen(embeddings, [self.tokenizer.convert_tokens_to_ids(piece) for piece in ANSWERS])
        self.heads = Heads(basis, config.vision_config.embed_dim)
        self.reader = Reader(self.model, self.tokenizer)
        self.part, self.spent = next(iter(self.parts)), 0.0
        size = sum(p.numel() for p in self.model.parameters())
        self.log(f"{size / 1e6:.2f} M parameters, {len(self.tokenizer)} pieces")

    def _initialize(self, table: Tensor) -> None:
        model = self.model
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            embeddings.normal_(std=0.02)
            embeddings[-len(table) :] = table
            for name, p in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.fc2.weight")):
                    p.mul_(0.35)
            # The first layer starts as the whitened principal components of patches.
            clean = patches_of(torch.from_numpy(self.corpus.pictures[::7])).flatten(0, 1)[::11]
            projection = model.model.visual.patch_embed.proj.weight
            half = clean.view(-1, 3, TEMPORAL, PATCH, PATCH)[:, :, 0].flatten(1)
            values, vectors = torch.linalg.eigh(half.T @ half / len(half))
            kept = vectors[:, -len(projection) :] / (values[-len(projection) :] + 0.05).sqrt()
            projection.copy_((kept.T / TEMPORAL).view(-1, 3, 1, PATCH, PATCH).expand_as(projection))

    def log(self, line: str) -> None:
        line = f"[{time.strftime('%H:%M:%S')}] {line}"
        print(line, flush=True)
        with open(self.work / "log.txt", "a") as file:
            file.write(line + "\n")

    def save(self, optimizers: list) -> None:
        """The base, replaced file by file so that it is always usable, and the state to resume from."""
        fresh = self.work / "base"
        save_base(self.model, self.tokenizer, fresh)
        self.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(fresh.iterdir()):
            os.replace(_copy_beside(file, self.out), self.out / file.name)
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "part": self.part,
            "spent": self.spent, "optimizers": [o.state_dict() for o in optimizers],
        }  # fmt: skip
        torch.save(state, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.state)

    def resume(self) -> dict | None:
        if not self.state.exists():
            return None
        state = torch.load(self.state)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.part, self.spent = state["part"], state["spent"]
        random.seed(self.spent)  # different draws from those before the interruption
        self.log(f"resuming {self.part} after {self.spent / 60:.1f} min")
        return state

    def run(self) -> None:
        """All parts, from wherever the last run stopped."""
        state = self.resume()
        if state is None:
            self.save([])
        losses, validation = self._losses(), self._validation()
        for part in list(self.parts)[list(self.parts).index(self.part) :]:
            self.part = part
            self._train(losses[part], validation, self.parts[part] * self.seconds, state)
            state, self.spent = None, 0.0
        self.log("finished")

    def _losses(self) -> dict[str, Callable[[], Losses]]:
        views = make_views(self.corpus, self.work, self.log)
        described = sorted({text for own in self.corpus.texts for text in own})
        others = sorted({text for pair in self.corpus.pairs for text in pair} - set(described))
        if not self.start:
            others = random.Random(0).sample(others, min(len(others), PASSAGES_TAUGHT))
            drawn = PretrainingLosses(self.corpus, views, self._meanings(described, others), self.reader, self.heads)
            return {"vision": drawn.vision, "text": drawn.text, "joint": drawn.joint}
        dictionary = read_dictionary(self.dictionary, set(self.teacher.pieces()), DICTIONARY)
        defined = sorted({text for entry in dictionary for text in entry})
        meanings = self._meanings(described, others, defined, self.corpus.requests)
        sampler = PairSampler(self.data, "train", self.corpus, self.work / "base", meanings)
        lessons = Lessons(self.corpus, views, meanings, sampler, self.reader, self.heads, dictionary)
        return {"further": lessons.further}

    def _meanings(self, *groups: list[str]) -> dict[str, Tensor]:
        """The text teacher's vectors; those of each group are cached."""
        meanings = {}
        for texts in groups:
            digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
            embedded = cached(self.work / f"meanings-{digest}.pt", lambda t=texts: self.teacher.embed(t))
            meanings |= dict(zip(texts, embedded, strict=True))
        return meanings

    def _validation(self) -> Validation:
        corpus = read_corpus(self.data, "validation")
        labels = sorted({(c, min(own, key=len)) for c, own in zip(corpus.concepts, corpus.texts, strict=True) if own})
        sampler = PairSampler(self.data, "validation", corpus, self.work / "base", {})
        return Validation(corpus, sampler, labels, self.teacher.embed([text for _, text in labels]))

    def _train(self, losses: Callable[[], Losses], validation: Validation, seconds: float, state: dict | None) -> None:
        matrices, rest, heads = [], [], list(self.heads.parameters())
        core = self.model.model
        trained = {"vision": [core.visual], "text": [core.language_model]}
        for module in trained.get(self.part, [core.visual, core.language_model]):
            for name, p in module.named_parameters():
                if p.requires_grad:
                    inner = p.ndim == 2 and (".layers." in f".{name}" or ".blocks." in f".{name}")
                    (matrices if inner else rest).append(p)
        scale = RATES[self.part]
        rates = [3e-3 * scale, 1.5e-3 * scale, 1.5e-3 * scale]
        optimizers = [
            Muon(matrices, rates[0]),
            *(torch.optim.AdamW(p, rates[1], betas=(0.9, 0.98), weight_decay=0.01) for p in (rest, heads)),
        ]
        # Fresh heads must not disturb a finished tower.
        warm_up = 200 if self.part == "further" and not state else 30
        if state and state["optimizers"]:
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.log(f"{self.part}: {(seconds - self.spent) / 60:.1f} min")
        last, step, means = time.process_time(), 0, defaultdict(float)
        saved_at = logged_at = time.time()
        self.model.train()
        while self.spent < seconds:
            done = self.spent / seconds
            factor = min(1.0, (1.0 - done) / 0.7 + 0.01)
            for optimizer, rate, steps in zip(optimizers, rates, (warm_up, warm_up, 30), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor * min(1.0, (step + 1) / steps)
            parts = losses()
            total = sum(parts.values())
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=False)
            total.backward()
            nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            for name, value in parts.items():
                means[name] = 0.95 * means[name] + 0.05 * value.item() if step > 1 else value.item()
            used = time.process_time()
            self.spent, last = self.spent + used - last, used
            now = time.time()
            if now - logged_at > 30:
                line = " ".join(f"{k} {v:.3f}" for k, v in means.items())
                self.log(f"{self.part} {100 * done:.0f} % step {step} {line}")
                logged_at = now
            if now - saved_at > SAVE_EVERY:
                self._checkpoint(optimizers, validation)
                saved_at, last = time.time(), time.process_time()
        self._checkpoint(optimizers, validation)

    def _checkpoint(self, optimizers: list, validation: Validation) -> None:
        self.save(optimizers)
        self.log("validation " + json.dumps(validation.figures(self.reader, self.heads)))


def cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, cached on disk."""
    if not path.exists():
        torch.save(compute(), path)
    return torch.load(path)


def _copy_beside(file: Path, folder: Path) -> Path:
    copy = folder / f".{file.name}.new"
    copy.write_bytes(file.read_bytes())
    return copy
