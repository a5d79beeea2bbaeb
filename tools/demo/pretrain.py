"""How the demo's base is made: one process, plain torch, one CPU core, and so much processor time instead of steps.

views    each training picture is drawn a few times with changes and shown to the picture teacher once
vision   the tower learns the picture teacher's map, the text teacher's reading of the picture's words, and that two
         drawings of one thing belong together (temporary heads, thrown away)
text     the language model, its word embeddings given by the text teacher, learns passages and questions
joint    everything together learns to say what a picture shows, to answer about it, and to say Yes or No
further  from a finished base: the same, and to tell in the language model what pictures and passages mean, and to judge
         which documents answer a query

Only the training split is read; validation concepts are looked at to report progress, never learnt from. The learning
rates follow the processor time used, so the recipe fits a busy machine too; a killed run goes on from its last save.
"""

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
from tools.demo.drawing import make_views, patches_of
from tools.demo.exam import Exam
from tools.demo.judging import Judging
from tools.demo.lessons import Heads, Lessons, Losses
from tools.demo.muon import Muon
from tools.demo.reading import Reader
from tools.demo.teachers import TextTeacher
from tools.demo.vocabulary import choose_pieces, embed_vocabulary

TEXTS_READ = 9000  # passages whose meaning the text teacher tells, besides every description of a picture
STAGES = {"vision": 0.55, "text": 0.12, "joint": 0.33}  # shares of the processor time; views come first, uncounted
FURTHER = {"further": 1.0}  # of a run that starts from a base, which reads all texts
RATES = {"vision": 1.0, "text": 0.5, "joint": 0.4, "further": 0.4}
SAVE_EVERY = 300.0


class Pretraining:
    """State of one run: model, heads, clock. `work` holds views, the log and the resumable state.

    Args:
        start: a finished base to go on from.
    """

    def __init__(
        self, data: Path, out: Path, work: Path, minutes: float, start: Path | None = None, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        work.mkdir(parents=True, exist_ok=True)
        self.data, self.out, self.work, self.start, self.seconds = data, out, work, start, minutes * 60
        self.stages = FURTHER if start else STAGES
        self.state = work / ("further.pt" if start else "state.pt")
        self.corpus = read_corpus(data, "train")
        self.log(f"{len(self.corpus.pictures)} pictures, {len(self.corpus.passages)} texts")
        self.teacher = TextTeacher()
        pieces, piece_ids = choose_pieces(self.teacher, self.corpus)
        self.tokenizer = build_tokenizer(pieces)
        config = build_config(len(self.tokenizer))
        table, basis = embed_vocabulary(self.teacher, piece_ids, [score for _, score in pieces[1:]])
        if start:
            self.model = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        else:
            self.model = Qwen2VLForConditionalGeneration(config)
            self._initialise(table)
        self.model.get_input_embeddings().weight.requires_grad_(False)  # unseen words must keep their place
        self.heads = Heads(basis, config.vision_config.embed_dim)
        self.reader = Reader(self.model, self.tokenizer)
        self.stage, self.spent = next(iter(self.stages)), 0.0
        size = sum(p.numel() for p in self.model.parameters())
        self.log(f"{size / 1e6:.2f} M parameters, {len(self.tokenizer)} pieces")

    def _initialise(self, table: Tensor) -> None:
        model = self.model
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            embeddings.normal_(std=0.02)
            embeddings[-len(table) :] = table
            for name, p in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.fc2.weight")):
                    p.mul_(0.35)
            # The first layer looks at patches through their own main directions, evened out.
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
        """The base (usable at any time: each file is replaced whole) and the state to go on from."""
        fresh = self.work / "base"
        save_base(self.model, self.tokenizer, fresh)
        self.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(fresh.iterdir()):
            os.replace(_copy_beside(file, self.out), self.out / file.name)
        state = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage,
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
        self.stage, self.spent = state["stage"], state["spent"]
        random.seed(self.spent)  # not the same draws again
        self.log(f"going on in stage {self.stage} after {self.spent / 60:.1f} min")
        return state

    def run(self) -> None:
        """All stages, from wherever the last run stopped."""
        state = self.resume()
        if state is None:
            self.save([])
        meanings = self._meanings()
        lessons, exam = self._lessons(meanings), self._exam()
        for stage in list(self.stages)[list(self.stages).index(self.stage) :]:
            self.stage = stage
            self._stage(getattr(lessons, stage), exam, self.stages[stage] * self.seconds, state)
            state, self.spent = None, 0.0
        self.log("finished")

    def _meanings(self) -> dict[str, Tensor]:
        """What the text teacher says of every description of a picture, and of passages."""
        described = sorted({text for own in self.corpus.texts for text in own})
        others = sorted({text for pair in self.corpus.pairs for text in pair} - set(described))
        others = random.Random(0).sample(others, len(others) if self.start else min(len(others), TEXTS_READ))
        files = {"described": described, f"others-{len(others)}": others}
        told = [
            cached(self.work / f"{name}.pt", lambda t=texts: self.teacher.embed(t)) for name, texts in files.items()
        ]
        return dict(zip(described + others, torch.cat(told), strict=True))

    def _lessons(self, meanings: dict[str, Tensor]) -> Lessons:
        views = make_views(self.corpus, self.work, self.log)
        judging = Judging(self.data, "train", self.corpus, self.work / "base", meanings)
        return Lessons(self.corpus, views, meanings, judging, self.reader, self.heads)

    def _exam(self) -> Exam:
        corpus = read_corpus(self.data, "validation")
        labels = sorted({(c, min(own, key=len)) for c, own in zip(corpus.concepts, corpus.texts, strict=True) if own})
        judging = Judging(self.data, "validation", corpus, self.work / "base", {})
        return Exam(corpus, judging, labels, self.teacher.embed([text for _, text in labels]))

    def _stage(self, losses: Callable[[], Losses], exam: Exam, seconds: float, state: dict | None) -> None:
        matrices, rest, heads = [], [], list(self.heads.parameters())
        core = self.model.model
        trained = {"vision": [core.visual], "text": [core.language_model]}
        for module in trained.get(self.stage, [core.visual, core.language_model]):
            for name, p in module.named_parameters():
                if p.requires_grad:
                    inner = p.ndim == 2 and (".layers." in f".{name}" or ".blocks." in f".{name}")
                    (matrices if inner else rest).append(p)
        scale = RATES[self.stage]
        rates = [3e-3 * scale, 1.5e-3 * scale, 1.5e-3 * scale]
        optimizers = [
            Muon(matrices, rates[0]),
            *(torch.optim.AdamW(p, rates[1], betas=(0.9, 0.98), weight_decay=0.01) for p in (rest, heads)),
        ]
        # Heads that begin anew must not lead a finished tower astray.
        warm_up = 200 if self.stage == "further" and not state else 30
        if state and state["optimizers"]:
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.log(f"stage {self.stage}: {(seconds - self.spent) / 60:.1f} min")
        last, step, means = time.process_time(), 0, defaultdict(float)
        saved_at = told_at = time.time()
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
            if now - told_at > 30:
                told = " ".join(f"{k} {v:.3f}" for k, v in means.items())
                self.log(f"{self.stage} {100 * done:.0f} % step {step} {told}")
                told_at = now
            if now - saved_at > SAVE_EVERY:
                self._checkpoint(optimizers, exam)
                saved_at, last = time.time(), time.process_time()
        self._checkpoint(optimizers, exam)

    def _checkpoint(self, optimizers: list, exam: Exam) -> None:
        self.save(optimizers)
        self.log("validation " + json.dumps(exam.figures(self.reader, self.heads)))


def cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, kept on disk."""
    if not path.exists():
        torch.save(compute(), path)
    return torch.load(path)


def _copy_beside(file: Path, folder: Path) -> Path:
    copy = folder / f".{file.name}.new"
    copy.write_bytes(file.read_bytes())
    return copy
