"""How the demo's base is made: one process, plain torch, one CPU core, and so much processor time instead of steps.

views    each training picture is drawn a few times with changes and shown to the picture teacher once
vision   the tower learns the picture teacher's map, the text teacher's reading of the picture's words, and that two
         drawings of one thing belong together (temporary heads, thrown away)
text     the language model, its word embeddings given by the text teacher, learns passages and questions
joint    everything together learns to say what a picture shows, to answer about it, and to say Yes or No

Only the training split is read; validation concepts are looked at to report progress, never learnt from. The learning
rates follow the processor time used, so the recipe fits a busy machine too; a killed run goes on from its last save.
"""

import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from umarvel_ray.demo.base_model import (
    CONTROL_TOKENS,
    HIDDEN,
    PATCH,
    TEMPORAL,
    build_config,
    build_tokenizer,
    save_base,
)
from umarvel_ray.demo.corpus import Turn, read_corpus
from umarvel_ray.demo.drawing import TEACHER_DIM, VIEWS, disturb, make_views, patches_of
from umarvel_ray.demo.fast_tower import Tower
from umarvel_ray.demo.muon import Muon
from umarvel_ray.demo.teachers import PATCH_DIM, TextTeacher
from umarvel_ray.demo.vocabulary import choose_pieces, embed_vocabulary
from umarvel_ray.model.positions import Span, rotary_positions

TEXTS_READ = 9000  # passages whose meaning the text teacher tells, besides every description of a picture
STAGES = {"vision": 0.55, "text": 0.12, "joint": 0.33}  # shares of the processor time; views come first, uncounted
SAVE_EVERY = 150.0


class Heads(nn.Module):
    """What is thrown away afterwards: visual tokens and hidden states → the teachers' spaces."""

    def __init__(self, basis: Tensor, width: int) -> None:
        super().__init__()
        self.patches = nn.Linear(width, PATCH_DIM)
        self.cells = nn.Linear(HIDDEN, TEACHER_DIM)
        self.whole = nn.Linear(HIDDEN, TEACHER_DIM)
        self.artist = nn.Linear(HIDDEN, 128, bias=False)
        self.words = nn.Linear(HIDDEN, basis.shape[1])
        self.sentence = nn.Linear(HIDDEN, basis.shape[1])
        for head in (self.words, self.sentence):
            with torch.no_grad():
                head.weight.copy_(basis.T)
                head.bias.zero_()


class Pretraining:
    """State of one run: model, heads, data, clock. `work` holds views, the log and the resumable state."""

    def __init__(self, data: Path, out: Path, work: Path, minutes: float, seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        work.mkdir(parents=True, exist_ok=True)
        self.out, self.work, self.seconds = out, work, minutes * 60
        self.corpus, self.held_out = read_corpus(data, "train"), read_corpus(data, "validation")
        self.log(f"{len(self.corpus.pictures)} pictures, {len(self.corpus.passages)} texts")
        self.words = TextTeacher()
        pieces, piece_ids = choose_pieces(self.words, self.corpus)
        self.tokenizer = build_tokenizer(pieces)
        config = build_config(len(self.tokenizer))
        self.model = Qwen2VLForConditionalGeneration(config)
        table, basis = embed_vocabulary(self.words, piece_ids, [score for _, score in pieces[1:]])
        self._initialise(table)
        self.heads = Heads(basis, config.vision_config.embed_dim)
        self.tower = Tower(self.model.model.visual)
        self.elapsed, self.stage, self.spent = 0.0, "vision", 0.0
        self.tell = {}
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
        embeddings.requires_grad_(False)  # unseen words must keep their place among the seen ones

    # -- clock, saving, log

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
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def resume(self) -> dict | None:
        path = self.work / "state.pt"
        if not path.exists():
            return None
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.spent = state["stage"], state["spent"]
        self.log(f"going on in stage {self.stage} after {self.spent / 60:.1f} min")
        return state

    def run(self) -> None:
        """All stages, from wherever the last run stopped."""
        state = self.resume()
        if state is None:
            self.save([])
        self._prepare()
        for stage in list(STAGES)[list(STAGES).index(self.stage) :]:
            self.stage = stage
            self._stage(getattr(self, f"_{stage}_loss"), STAGES[stage] * self.seconds, state)
            state, self.spent = None, 0.0
        self.log("finished")

    def _prepare(self) -> None:
        self.views = make_views(self.corpus, self.work, self.log)
        corpus = self.corpus
        described = sorted({text for own in corpus.texts for text in own})
        self.meanings = cached(self.work / "described.pt", lambda: self.words.embed(described))
        row = {text: i for i, text in enumerate(described)}
        self.text_rows = [[row[t] for t in own] for own in corpus.texts]
        named = [min(own, key=len) if own else "" for own in corpus.texts]
        self.keys = list(zip(corpus.concepts, named, strict=True))
        groups = defaultdict(list)
        for i, key in enumerate(self.keys):
            groups[key].append(i)
        self.groups = list(groups.values())
        self.concept_ids = torch.tensor([hash(c) for c in corpus.concepts])
        # Every description of a picture, for choosing among all of them: its meaning and its picture's concept.
        told = sorted({(r, corpus.concepts[i]) for i, rows in enumerate(self.text_rows) for r in rows})
        self.bank_rows = torch.tensor([r for r, _ in told])
        self.bank = self.meanings[self.bank_rows]
        self.bank_concepts = torch.tensor([hash(c) for _, c in told])
        by_kind = defaultdict(list)
        for turn in corpus.turns:
            kind = "text" if turn.picture is None else "caption" if turn.prompt == "What is this?" else "question"
            by_kind[kind].append(turn)
        self.turns = dict(by_kind)
        self.ids: dict[str, list[int]] = {}
        others = sorted({text for pair in corpus.pairs for text in pair} - set(described))
        others = random.Random(0).sample(others, min(len(others), TEXTS_READ))
        told_by_teacher = cached(self.work / "others.pt", lambda: self.words.embed(others))
        read, meanings = described + others, torch.cat([self.meanings, told_by_teacher])
        by_length = sorted(range(len(read)), key=lambda i: len(read[i]))
        self.read, self.read_meanings = [read[i] for i in by_length], meanings[by_length]

    def _stage(self, loss_of, seconds: float, state: dict | None) -> None:
        matrices, rest = [], []
        trained = {
            "vision": [self.model.model.visual],
            "text": [self.model.model.language_model],
            "joint": [self.model.model.visual, self.model.model.language_model],
        }[self.stage]
        scale = {"vision": 1.0, "text": 0.5, "joint": 0.4}[self.stage]
        for module in trained:
            for name, p in module.named_parameters():
                if p.requires_grad:
                    inner = p.ndim == 2 and (".layers." in f".{name}" or ".blocks." in f".{name}")
                    (matrices if inner else rest).append(p)
        rates = [3e-3 * scale, 1.5e-3 * scale]
        optimizers = [
            Muon(matrices, rates[0]),
            torch.optim.AdamW([*rest, *self.heads.parameters()], rates[1], betas=(0.9, 0.98), weight_decay=0.01),
        ]
        if state and state["optimizers"]:
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.log(f"stage {self.stage}: {(seconds - self.spent) / 60:.1f} min")
        last, step, means = time.process_time(), 0, defaultdict(float)
        saved_at = told_at = time.time()
        self.model.train()
        while self.spent < seconds:
            done = self.spent / seconds
            factor = min(1.0, (step + 1) / 30) * min(1.0, (1.0 - done) / 0.7 + 0.01)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
            parts = loss_of()
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
                self._checkpoint(optimizers)
                saved_at, last = time.time(), time.process_time()
        self._checkpoint(optimizers)

    def _checkpoint(self, optimizers: list) -> None:
        self.save(optimizers)
        figures = self.monitor()
        self.log("validation " + json.dumps(figures))

    # -- losses

    def _vision_loss(self, pairs: int = 32) -> dict[str, Tensor]:
        chosen = []
        for group in random.choices(self.groups, weights=self._group_weights(), k=pairs):
            chosen += random.sample(group, 2) if len(group) > 1 else [group[0], group[0]]
        return self._tower_losses(torch.tensor(chosen))[0]

    def _group_weights(self) -> list[float]:
        if "weights" not in self.tell:
            per_concept = Counter(self.keys[g[0]][0] for g in self.groups)
            self.tell["weights"] = [per_concept[self.keys[g[0]][0]] ** -0.4 for g in self.groups]
        return self.tell["weights"]

    def _tower_losses(self, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Neighbours 2i, 2i + 1 of `chosen` show the same. Also returns the visual tokens."""
        view = [random.randrange(VIEWS) for _ in range(len(chosen))]
        drawn, inner, target = (
            torch.stack([kept[v][i] for v, i in zip(view, chosen.tolist(), strict=True)]).float()
            for kept in (self.views.pictures, self.views.patches, self.views.cells)
        )
        middle, tokens = self.tower(patches_of(disturb(drawn)))
        pooled = tokens.mean(1)
        patches = F.mse_loss(self.heads.patches(middle), inner)
        cells = 1 - F.cosine_similarity(self.heads.cells(tokens), target, dim=-1).mean()
        whole = 1 - F.cosine_similarity(self.heads.whole(pooled), target.mean(1), dim=-1).mean()

        concepts = self.concept_ids[chosen]
        rows = torch.tensor([random.choice(self.text_rows[i]) if self.text_rows[i] else -1 for i in chosen.tolist()])
        told = rows >= 0
        meaning = self.meanings[rows[told]]
        close = (meaning @ self.bank.T) / 0.05
        mine = self.bank_rows == rows[told][:, None]
        others = (self.bank_concepts == concepts[told][:, None]) & ~mine  # the concept's other texts are not wrong
        close = close.masked_fill(others, -1e4)
        want = 0.6 * mine / mine.sum(1, keepdim=True) + 0.4 * close.softmax(-1)
        said = F.normalize(self.heads.words(pooled[told]), dim=-1) @ self.bank.T / 0.05
        words = -(want * said.masked_fill(others, -1e4).log_softmax(-1)).sum(-1).mean()

        made = F.normalize(self.heads.artist(pooled), dim=-1)
        alike = made @ made.T / 0.1
        partner = torch.arange(len(chosen)) ^ 1
        same = torch.tensor([hash(self.keys[i]) for i in chosen.tolist()])
        hidden = (same == same[:, None]) & (partner[:, None] != torch.arange(len(chosen)))
        artist = F.cross_entropy(alike.masked_fill(hidden, -1e4), partner)
        losses = {"patches": 0.5 * patches, "cells": cells, "whole": whole}
        return losses | {"words": 0.4 * words, "artist": 0.4 * artist}, tokens

    def _text_loss(self) -> dict[str, Tensor]:
        """Passages or answers to go on with, and sentences whose meaning the text teacher tells."""
        turns = random.choices(self.turns["text"], k=20)
        generated = self._generate([(t if random.random() < 0.5 else Turn("", None, t.answer)) for t in turns], None)
        return {"generated": generated, **self._meaning_losses(96)}

    def _meaning_losses(self, size: int) -> dict[str, Tensor]:
        """Texts of like length, read on full attention: each one's meaning, and which of them are alike."""
        start = random.randrange(len(self.read) - 4 * size)
        rows = start + torch.randperm(4 * size)[:size]
        ids, mask = pad([self._tokens(self.read[i])[:64] for i in rows.tolist()])
        both = torch.zeros(size, 1, ids.shape[1], ids.shape[1]).masked_fill(~mask[:, None, None], -1e9)
        output = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(ids),
            attention_mask=both,
            position_ids=torch.arange(ids.shape[1]).expand(3, *ids.shape),
            output_hidden_states=True,
            use_cache=False,
        )
        # The last layer is left to generation; meaning is read below it.
        hidden = output.hidden_states[-2] * mask[..., None]
        read = F.normalize(self.heads.sentence(hidden.sum(1) / mask.sum(1, keepdim=True)), dim=-1)
        meaning = self.read_meanings[rows]
        want = (meaning @ meaning.T / 0.05).softmax(-1)
        alike = -(want * (read @ meaning.T / 0.05).log_softmax(-1)).sum(-1).mean()
        return {"meaning": 4 * (1 - (read * meaning).sum(-1).mean()), "alike": 0.3 * alike}

    def _joint_loss(self, pairs: int = 24) -> dict[str, Tensor]:
        turns, chosen = [], []
        for group in random.choices(self.groups, weights=self._group_weights(), k=pairs):
            chosen += random.sample(group, 2) if len(group) > 1 else [group[0], group[0]]
        for i in chosen:
            turns.append(self._turn_about(i))
        losses, tokens = self._tower_losses(torch.tensor(chosen))
        kept = [n for n, turn in enumerate(turns) if turn is not None]
        generated = self._generate([turns[n] for n in kept], tokens[kept])
        texts = self._generate(random.choices(self.turns["text"], k=6), None)
        losses |= self._meaning_losses(24)
        return {name: 0.5 * loss for name, loss in losses.items()} | {"generated": generated, "text": 0.2 * texts}

    def _turn_about(self, picture: int) -> Turn | None:
        texts = self.corpus.texts[picture]
        if not texts:
            return None
        kind = random.random()
        asked = self._asked().get(picture, [])
        if kind < 0.25 and asked:
            return random.choice(asked)
        if kind < 0.5:
            right = random.random() < 0.5
            other = random.choice(self.turns["caption"]).picture
            wrong = self.corpus.concepts[other] != self.corpus.concepts[picture]
            text = random.choice(texts if right or not wrong else self.corpus.texts[other])
            return Turn(f"Does the picture show this: {text}?", picture, "Yes" if right or not wrong else "No")
        return Turn(random.choice(("What is this?", "Describe the picture.", "")), picture, random.choice(texts))

    def _asked(self) -> dict[int, list[Turn]]:
        if "asked" not in self.tell:
            self.tell["asked"] = defaultdict(list)
            for turn in self.turns["question"]:
                self.tell["asked"][turn.picture].append(turn)
        return self.tell["asked"]

    def _tokens(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.ids[text]

    def _generate(self, turns: list[Turn], tokens: Tensor | None, each: bool = False) -> Tensor:
        """Next-token loss on the answers; `tokens` (n, 16, HIDDEN) are the turns' pictures."""
        name = CONTROL_TOKENS.index
        image, rows, answers = name("<|image_pad|>"), [], []
        for turn in turns:
            shown = [name("<|vision_start|>"), *[image] * 16, name("<|vision_end|>")] if tokens is not None else []
            asked = [name("<|im_start|>"), *self._tokens("user"), *shown, *self._tokens(turn.prompt)[:64]]
            asked += [name("<|im_end|>"), name("<|im_start|>"), *self._tokens("assistant")]
            answer = [*self._tokens(turn.answer)[:64], name("<|im_end|>")]
            rows.append(asked + answer)
            answers.append((len(asked), len(answer)))
        ids, mask = pad(rows)
        embedded = self.model.get_input_embeddings()(ids)
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        for i, row in enumerate(rows):
            spans = [Span((1, 4, 4))] if tokens is not None else []
            walked = rotary_positions(np.array(row) == image, spans, "mrope")
            positions[:, i, : len(row)] = torch.from_numpy(walked.astype(np.int64))
        if tokens is not None:
            embedded = embedded.masked_scatter((ids == image)[..., None], tokens)
        hidden = self.model.model.language_model(
            inputs_embeds=embedded, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        index = [(i, start - 1 + n) for i, (start, size) in enumerate(answers) for n in range(size)]
        rows_of, columns = torch.tensor(index).T
        logits = self.model.lm_head(hidden[rows_of, columns])
        loss = F.cross_entropy(logits, ids[rows_of, columns + 1], reduction="none" if each else "mean")
        if not each:
            return loss
        sums = torch.zeros(len(turns)).index_add(0, rows_of, loss)
        return sums / torch.tensor([size for _, size in answers])

    # -- progress on concepts never learnt from

    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """On validation pictures: finding another drawing of the same concept; finding the right words through the
        temporary head; how much the right picture lowers a caption's loss against a wrong one."""
        self.model.eval()
        corpus = self.held_out
        tokens = torch.cat([self.tower(patches_of(p))[1] for p in torch.from_numpy(corpus.pictures).split(128)])
        pooled = tokens.mean(1)
        figures = {"artist R@5": found_again(pooled, corpus.concepts)}
        labels = sorted({(c, min(own, key=len)) for c, own in zip(corpus.concepts, corpus.texts, strict=True) if own})
        if "labels" not in self.tell:
            self.tell["labels"] = self.words.embed([text for _, text in labels])
        said = F.normalize(self.heads.words(pooled), dim=-1) @ self.tell["labels"].T
        right = torch.tensor([[c == label for label, _ in labels] for c in corpus.concepts])
        named = right.any(1)
        figures["words R@5"] = right.gather(1, said.topk(5).indices)[named].any(1).float().mean().item()
        figures["words pool"] = len(labels)
        told = [i for i, own in enumerate(corpus.texts) if own][::3]
        turns = [Turn("What is this?", i, min(corpus.texts[i], key=len)) for i in told]
        wrong = told[len(told) // 2 :] + told[: len(told) // 2]
        own_loss, other_loss = (self._generate(turns, tokens[list(which)], each=True) for which in (told, wrong))
        figures["caption loss"] = own_loss.mean().item()
        figures["right picture wins"] = (own_loss < other_loss).float().mean().item()
        self.model.train()
        return {name: round(value, 4) for name, value in figures.items()}


def found_again(vectors: Tensor, concepts: list[str]) -> float:
    """Share of pictures with another picture of their concept among their 5 nearest (centred cosine)."""
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    alike = (vectors @ vectors.T).fill_diagonal_(-2.0)
    same = torch.tensor([[a == b for b in concepts] for a in concepts]).fill_diagonal_(False)
    return same.gather(1, alike.topk(5).indices)[same.any(1)].any(1).float().mean().item()


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, (n, longest)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, kept on disk."""
    if not path.exists():
        torch.save(compute(), path)
    return torch.load(path)


def _copy_beside(file: Path, folder: Path) -> Path:
    copy = folder / f".{file.name}.new"
    copy.write_bytes(file.read_bytes())
    return copy
