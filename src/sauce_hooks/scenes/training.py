"""Train the bundled vision-language model from nothing. Run by the project, not by its users.

    python -m sauce_hooks.scenes.training --out runs/scenes          # resumes what it finds there

Stages, each resumable: draw a pool of training scenes; train the CLIP tower through linear heads on its penultimate patch
tokens; train projector and language model on the frozen tower; train the SAE and, for comparison, the paper's; learn the
concept bank. Model and processor are saved the Hugging Face way, the SAEs as `VisionSAE`s.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from jaxtyping import Float, Int
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from sauce_hooks.sae import VisionSAE, train_sae
from sauce_hooks.scenes import language, world
from sauce_hooks.scenes.bundled import asset, competence, load_model
from sauce_hooks.scenes.learning import learn_bank, learn_paper_bank

PATCH = 8
SHARD = 2_000
LABELS = (*world.CONCEPTS, "object", "face", "game")
"""What the heads learn: every concept, and the kind of thing, so that a thing without its concept is still a thing."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD, BOS, EOS, UNK, IMAGE = range(5)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    pool: int = 60_000
    """Scenes drawn for training."""
    pixels: int = 48
    """Of a side of the picture as the tower sees it."""
    width: int = 160
    layers: int = 5
    """Blocks of the tower; LLaVA reads the last but one, so the last is inert and stays as initialised."""
    tower_steps: int = 3_000
    tower_batch: int = 128
    tower_lr: float = 1.0e-3
    lm_width: int = 128
    lm_layers: int = 4
    lm_steps: int = 3_000
    lm_batch: int = 32
    lm_lr: float = 1.5e-3
    sae_expansion: int = 8
    sae_images: int = 20_000
    """Scenes of the pool that the SAEs are trained on."""
    paper_sae_epochs: int = 26
    """Epochs over its 20,000 scenes: 507 optimiser steps, where the paper takes 2,500 (a CPU has its limits)."""
    questions: int = 6
    """Yes/no questions asked of each image in a step, half of them true."""

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.pixels // PATCH


# The pool. -----------------------------------------------------------------------------------------------------------


def _draw_shard(job: tuple[Recipe, int, str]) -> None:
    from sauce_hooks.scenes.render import render

    recipe, shard, path = job
    size, n = recipe.pixels, recipe.side
    pixels = np.zeros((SHARD, size, size, 3), dtype=np.uint8)
    labels = np.zeros((SHARD, n * n, len(LABELS)), dtype=bool)
    for row in range(SHARD):
        scene = scene_at(recipe.seed, shard * SHARD + row)
        drawn = render(scene)
        pixels[row] = np.asarray(drawn.image.resize((size, size), Image.Resampling.BICUBIC))
        side = drawn.masks[0].shape[0] // n
        for thing, mask in zip(scene.things, drawn.masks, strict=True):
            cover = mask.reshape(n, side, n, side).mean((1, 3)).reshape(-1)
            for name in (*thing.concepts, thing.kind):
                labels[row, cover > 0.2, LABELS.index(name)] = True
    temporary = f"{path}.partial.npz"
    np.savez(temporary, pixels=pixels, labels=np.packbits(labels, axis=-1))
    os.replace(temporary, path)


def scene_at(seed: int, index: int) -> world.Scene:
    """Scene `index` of the training split."""
    return world._scene("train", seed, index)  # pyright: ignore[reportPrivateUsage]


def draw_pool(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Draw the pool in shards of `SHARD` scenes; shards already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = recipe.pool // SHARD
    jobs = [(recipe, i, str(path)) for i in range(shards) if not (path := folder / f"{i:03}.npz").exists()]
    task = progress.add_task("draw scenes", total=shards, completed=shards - len(jobs))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as workers:
        for _ in workers.imap_unordered(_draw_shard, jobs):
            progress.advance(task)


def load_pool(recipe: Recipe, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All pixels `[pool, side, side, 3]` (uint8) and patch labels `[pool, patches, labels]` (bool)."""
    parts = [np.load(folder / f"{i:03}.npz") for i in range(recipe.pool // SHARD)]
    pixels = np.concatenate([part["pixels"] for part in parts])
    labels = np.concatenate([part["labels"] for part in parts])
    return pixels, np.unpackbits(labels, axis=-1, count=len(LABELS)).view(bool)


def normalize(pixels: np.ndarray) -> Float[Tensor, "b 3 h w"]:
    """What the processor's rescaling and normalisation do, for a whole batch."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


# The model. ----------------------------------------------------------------------------------------------------------


def build_processor(pixels: int = Recipe.pixels) -> Any:
    """The real processor: CLIP image processing (Pillow), word-level tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = {word: i for i, word in enumerate([*special, *language.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=True,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def build_model(recipe: Recipe, vocabulary: int) -> Any:
    """The untrained LLaVA."""
    import transformers

    hf: Any = transformers  # its configs take more than their annotations say
    torch.manual_seed(recipe.seed)
    vision = hf.CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=5,
        image_size=recipe.pixels,
        patch_size=PATCH,
        projection_dim=recipe.width,
    )
    text = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.lm_width,
        intermediate_size=round(2.75 * recipe.lm_width),
        num_hidden_layers=recipe.lm_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=recipe.side**2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return hf.LlavaForConditionalGeneration(config)


def tower_tokens(tower: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b patches d"]:
    """The penultimate block's patch tokens, without running the inert last block."""
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in tower.encoder.layers[:-1]:
        out = block(x, attention_mask=None)
        x = out[0] if isinstance(out, tuple) else out
    return x[:, 1:]


# Training. -----------------------------------------------------------------------------------------------------------


class Stage:
    """One training stage: optimiser, schedule, and a checkpoint that is written atomically and found again."""

    def __init__(self, module: nn.Module, lr: float, steps: int, path: Path, every: int = 200) -> None:
        decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.module, self.steps, self.path, self.every = module, steps, path, every
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
        warm = min(200, steps // 10 + 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: min((s + 1) / warm, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))),
        )
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step = state["step"]

    def update(self, loss: Tensor) -> None:
        """One optimiser step; the checkpoint is written every `every` steps and at the end."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.step % self.every == 0 or self.step == self.steps:
            state = {
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "step": self.step,
            }
            _save_atomically(state, self.path)


class TowerWithHeads(nn.Module):
    """The tower and one linear read-out a label, on raw penultimate tokens as LLaVA's projector sees them."""

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.Linear(width, len(LABELS))
        nn.init.constant_(self.heads.bias, -4.0)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b patches labels"]:
        """One logit a patch and label."""
        return self.heads(tower_tokens(self.tower, pixels))


def train_tower(
    recipe: Recipe, model: Any, folder: Path, run: Path, progress: Progress, heads: dict[str, Tensor] | None = None
) -> None:
    """Binary cross-entropy on every patch (which labels cover it) and, max-pooled, on the image; `heads` to begin with."""
    device = next(model.parameters()).device
    net = TowerWithHeads(model.model.vision_tower, recipe.width).to(device)
    if heads is not None:
        net.heads.load_state_dict(heads)
    stage = Stage(net, recipe.tower_lr, recipe.tower_steps, run / "tower.pt")
    task = progress.add_task("train tower", total=recipe.tower_steps, completed=stage.step)
    if stage.step == recipe.tower_steps:
        return
    pixels, labels = load_pool(recipe, folder)
    held = 1_000
    net.train()
    while stage.step < stage.steps:
        rng = np.random.default_rng((recipe.seed, 1, stage.step))
        rows = np.sort(rng.integers(held, len(pixels), recipe.tower_batch))
        x, y = pixels[rows], labels[rows]
        if rng.random() < 0.5:  # mirror: nothing in this world is told apart by its handedness
            n = recipe.side
            x = x[:, :, ::-1].copy()
            y = y.reshape(len(rows), n, n, -1)[:, :, ::-1].reshape(len(rows), n * n, -1).copy()
        x = normalize(x)
        x = x * torch.from_numpy(rng.uniform(0.9, 1.1, (len(x), 1, 1, 1)).astype(np.float32))
        logits = net(x.to(device))
        target = torch.from_numpy(y).to(device).float()
        patch_loss = F.binary_cross_entropy_with_logits(logits, target)
        image_loss = F.binary_cross_entropy_with_logits(logits.amax(1), target.amax(1))
        stage.update(8 * patch_loss + image_loss)
        progress.advance(task)
        if stage.step % 100 == 0:
            net.eval()
            with torch.no_grad():
                held_logits = net(normalize(pixels[:held]).to(device)).amax(1).cpu()
            net.train()
            truth = torch.from_numpy(labels[:held].any(1))
            right = (held_logits > 0) == truth
            balanced = (right & truth).sum(0) / truth.sum(0) / 2 + (right & ~truth).sum(0) / (~truth).sum(0) / 2
            worst = torch.argsort(balanced)[:4].tolist()
            print(
                f"tower {stage.step}: patch {patch_loss.item():.4f} image {image_loss.item():.4f} "
                f"balanced {balanced.mean():.4f} worst {[(LABELS[i], round(balanced[i].item(), 3)) for i in worst]}",
                flush=True,
            )


@dataclass(frozen=True)
class Branch:
    """One question and its answer after the image."""

    question: list[int]
    answer: list[int]


def make_branches(rng: np.random.Generator, scene: world.Scene, questions: int, encode: Any) -> list[Branch]:
    """Half true, half false yes/no questions (a third of the false ones about a look-alike), and one description."""
    present = sorted(scene.concepts)
    absent = [concept for concept in world.CONCEPTS if concept not in scene.concepts]
    asked: list[tuple[str, bool]] = []
    for i in range(questions):
        if i % 2 == 0 and present:
            asked.append((present[int(rng.integers(len(present)))], True))
        else:
            near = [s for c in present if (s := world.SIBLINGS[c]) not in scene.concepts]
            source = near if near and rng.random() < 0.35 else absent
            asked.append((source[int(rng.integers(len(source)))], False))
    branches: list[Branch] = []
    for concept, truth in asked:
        lang = "fr" if rng.random() < 0.2 else "en"
        phrasing = int(rng.integers(len(language.YES_NO[lang]) - 1))
        answer = (language.YES if truth else language.NO)[lang]
        branches.append(Branch(encode(language.yes_no_prompt(concept, phrasing, lang)), encode(answer)))
    lang = "fr" if rng.random() < 0.2 else "en"
    phrasing = int(rng.integers(len(language.DESCRIBE[lang]) - 1))
    branches.append(Branch(encode(language.describe_prompt(phrasing, lang)), encode(language.caption(scene, lang))))
    return branches


def pack(
    rows: Sequence[Sequence[Branch]], prefix: int
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Int[Tensor, "b t"], Float[Tensor, "b 1 t t"]]:
    """All branches of an image behind one copy of it: ids, targets (−100 where nothing is learnt), positions, mask.

    A branch sees the shared prefix and itself, so one pass over the image answers many questions as if each were asked
    alone.
    """
    length = prefix + max(sum(len(b.question) + len(b.answer) + 1 for b in row) for row in rows)
    ids = np.full((len(rows), length), PAD)
    targets = np.full((len(rows), length), -100)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    owner = np.full((len(rows), length), -1)
    positions[:, :prefix] = np.arange(prefix)
    owner[:, :prefix] = 0
    for r, row in enumerate(rows):
        at = prefix
        for k, branch in enumerate(row, start=1):
            tokens = [*branch.question, *branch.answer, EOS]
            span = slice(at, at + len(tokens))
            ids[r, span] = tokens
            positions[r, span] = prefix + np.arange(len(tokens))
            owner[r, span] = k
            first = at + len(branch.question)
            targets[r, first - 1 : at + len(tokens) - 1] = [*branch.answer, EOS]
            at += len(tokens)
    own = torch.from_numpy(owner)
    sees = (own[:, None, :] == own[:, :, None]) | (own[:, None, :] == 0)
    sees &= torch.tril(torch.ones(length, length, dtype=torch.bool))
    sees |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no row of the softmax is empty
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(positions), mask


class Reader(nn.Module):
    """Projector and language model: all that this stage trains."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(
        self,
        image: Float[Tensor, "b patches d"],
        ids: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        mask: Float[Tensor, "b 1 t t"],
        start: int,
        targets: Int[Tensor, "b t"],
    ) -> Tensor:
        """Next-token loss on the targets, the image's tokens standing at `start`."""
        embeds = self.language_model.embed_tokens(ids)
        embeds = torch.cat([embeds[:, :start], self.projector(image), embeds[:, start + image.shape[1] :]], dim=1)
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        learnt = targets != -100
        return F.cross_entropy(self.lm_head(out[learnt]), targets[learnt])


@torch.no_grad()
def pool_tokens(recipe: Recipe, model: Any, folder: Path, path: Path) -> Float[Tensor, "pool patches d"]:
    """The frozen tower's tokens of the whole pool, computed once and kept beside the checkpoints (fp16)."""
    if path.exists():
        return torch.load(path, weights_only=True)
    pixels, _ = load_pool(recipe, folder)
    device = next(model.parameters()).device
    parts = np.array_split(pixels, max(1, len(pixels) // 128))
    tower = model.model.vision_tower
    tokens = torch.cat([tower_tokens(tower, normalize(part).to(device)).cpu().half() for part in parts])
    _save_atomically(tokens, path)
    return tokens


def _save_atomically(value: Any, path: Path) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(value, temporary)
    os.replace(temporary, path)


def train_reader(recipe: Recipe, model: Any, processor: Any, folder: Path, run: Path, progress: Progress) -> None:
    """Next-token loss on the answers, the tower frozen."""
    device = next(model.parameters()).device
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    reader = Reader(model).to(device).train()
    stage = Stage(reader, recipe.lm_lr, recipe.lm_steps, run / "reader.pt")
    task = progress.add_task("train language model", total=recipe.lm_steps, completed=stage.step)
    if stage.step == recipe.lm_steps:
        return
    features = pool_tokens(recipe, model, folder, run / "tokens.pt")
    tokenizer = processor.tokenizer

    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            known[text] = tokenizer(text.replace("user: <image> ", ""), add_special_tokens=False).input_ids
        return known[text]

    prefix_ids = [BOS, *tokenizer("user:", add_special_tokens=False).input_ids]
    start, prefix = len(prefix_ids), len(prefix_ids) + recipe.side**2
    average = 2.0
    while stage.step < stage.steps:
        rng = np.random.default_rng((recipe.seed, 2, stage.step))
        chosen = np.sort(rng.integers(0, len(features), recipe.lm_batch))
        scenes = [scene_at(recipe.seed, int(i)) for i in chosen]
        rows = [make_branches(rng, scene, recipe.questions, encode) for scene in scenes]
        ids, targets, positions, mask = pack(rows, prefix)
        ids[:, :start] = torch.tensor(prefix_ids)
        batch = (t.to(device) for t in (features[chosen].float(), ids, positions, mask))
        loss = reader(*batch, start, targets.to(device))
        stage.update(loss)
        progress.advance(task)
        average += 0.02 * (loss.item() - average)
        if stage.step % 100 == 0:
            print(f"reader {stage.step}: loss {average:.4f}", flush=True)


def save(model: Any, processor: Any, recipe: Recipe, out: Path) -> None:
    """The Hugging Face way, with the recipe beside it."""
    model.generation_config.max_new_tokens = 48
    model.generation_config.do_sample = False
    model.eval().save_pretrained(out, safe_serialization=True)
    processor.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")


class PoolBatches(Sequence[dict[str, Tensor]]):
    """The pool's pictures as batches of model inputs, normalised when they are asked for."""

    def __init__(self, pixels: np.ndarray, size: int = 200) -> None:
        self._pixels, self._size = pixels, size

    def __len__(self) -> int:
        return -(-len(self._pixels) // self._size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"pixel_values": normalize(self._pixels[index * self._size : (index + 1) * self._size])}


def train_saes(recipe: Recipe, model: Any, folder: Path, out: Path) -> None:
    """The bundled SAE, and one with the paper's settings to the letter for the comparison."""
    pixels, _ = load_pool(recipe, folder)
    images = PoolBatches(pixels[: recipe.sae_images])
    if not (out / "sae" / "vision_sae.json").exists():
        train_sae(model, images, preset="batchtopk", expansion=recipe.sae_expansion, out=out / "sae", resume=True)
    if not (out / "sae_paper" / "vision_sae.json").exists():
        sae = train_sae(model, images, preset="sauce", epochs=recipe.paper_sae_epochs, out=out / "sae_paper", resume=True)
        sae.sae.to(dtype=torch.bfloat16)  # half the bytes; it is loaded in float32 again
        sae.save(out / "sae_paper")


def train(out: Path, recipe: Recipe) -> None:
    """All stages, resuming whatever is already in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (out / "model" / "config.json").exists():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn()) as progress:
            draw_pool(recipe, out / "pool", progress)
            processor = build_processor()
            model = build_model(recipe, len(processor.tokenizer)).to(device)
            train_tower(recipe, model, out / "pool", out, progress)
            train_reader(recipe, model, processor, out / "pool", out, progress)
        save(model.cpu(), processor, recipe, out / "model")
    model, processor = load_model(out / "model")
    print(competence(model, processor, split="val").require())
    train_saes(recipe, model, out / "pool", out)
    sae = VisionSAE.load(out / "sae")
    if len(sae.concepts) < len(world.CONCEPTS):
        learn_bank(model, processor, sae)
        sae.save(out / "sae")
    paper = VisionSAE.load(out / "sae_paper")
    if len(paper.concepts) < len(world.CONCEPTS):
        learn_paper_bank(model, processor, paper)
        paper.save(out / "sae_paper")


def main(out: Path = Path("runs/scenes"), seed: int = 0, install: bool = False) -> None:
    """Train the bundled model; run again with the same folder to go on after an interruption.

    --install then puts the result into the package's assets.
    """
    train(out, Recipe(seed=seed))
    if install:
        for name in ("model", "sae", "sae_paper"):
            shutil.copytree(out / name, asset(name), dirs_exist_ok=True, ignore=shutil.ignore_patterns("training"))


if __name__ == "__main__":
    typer.run(main)
