"""A text encoder beside the bundled vision tower, and how good concepts from a word are with it.

    python -m sauce_hooks.scenes.dual --out runs/dual          # trains it if it is not there yet, then measures

The bundled tower was trained through its patch tokens up to the block that the language side reads; the block behind that
was never trained, and nothing was ever read off its class token. So the block behind, the projections and the text encoder
are trained here, with CLIP's contrastive loss; up to the hook point the tower stays what it is, bit by bit, and the bundled
SAE belongs to it as it does to the bundled model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.concepts import SCORERS, SetStatistics, labelled_statistics, select_features
from sauce_hooks.concepts.scores import auroc_score
from sauce_hooks.concepts.statistics import Pool
from sauce_hooks.concepts.words import (
    TEMPLATES,
    FeatureEffects,
    feature_effects,
    label_features,
    learn_concept_from_word,
)
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.evaluation import Results, evaluate
from sauce_hooks.hookpoint import find_hook_point
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes import language
from sauce_hooks.scenes.bundled import load
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.world import CONCEPTS, Scene, Split, sample

PAD, UNK, BOS, EOS = range(4)
"""transformers takes an `eos_token_id` of 2 for a sign of old CLIP files, and then reads the token with the highest id."""
SEED = 77
"""The stream of training scenes; the bundled model and its bank have seen others."""


@dataclass(frozen=True)
class DualRecipe:
    """Everything that decides the result; a few minutes on one core."""

    seed: int = 0
    scenes: int = 3_000
    width: int = 64
    layers: int = 2
    joint: int = 64
    """Width of the joint space."""
    steps: int = 500
    batch: int = 128
    lr: float = 2e-3


def build_dual(model: Any, processor: Any, recipe: DualRecipe | None = None) -> tuple[Any, Any]:
    """A CLIP model around a LLaVA's CLIP tower, its text encoder untrained, with its processor.

    Args:
        model: the bundled model, or another LLaVA with a CLIP tower.
        processor: its processor, of which the image half is taken.
        recipe: the sizes.

    Returns:
        A `CLIPModel` with a copy of the tower's weights, and a `CLIPProcessor`.
    """
    import transformers

    hf: Any = transformers  # its configs take more than their annotations say
    recipe = recipe or DualRecipe()
    tokenizer = build_tokenizer()
    text = hf.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        max_position_embeddings=48,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        projection_dim=recipe.joint,
    )
    vision = hf.CLIPVisionConfig(**{**model.config.vision_config.to_dict(), "projection_dim": recipe.joint})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        dual = hf.CLIPModel(
            hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.joint)
        )
    dual.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    return dual.eval(), hf.CLIPProcessor(image_processor=processor.image_processor, tokenizer=tokenizer)


def build_tokenizer() -> Any:
    """A word-level tokenizer of the world's language and of the words in `TEMPLATES`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    extra = [word for template in TEMPLATES for word in language.split_words(template.format(""))]
    words = dict.fromkeys(["<pad>", "<unk>", "<s>", "</s>", *language.vocabulary(), *extra])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=48,
    )


def loose_caption(scene: Scene, rng: np.random.Generator) -> str:
    """What the web says of a picture: some of what is in it, in any order; in a third of the cases only keywords."""
    things = [scene.things[int(i)] for i in rng.permutation(len(scene.things))]
    told = things[: int(rng.integers(1, len(things) + 1))]
    if rng.random() < 1 / 3:
        words = sorted({concept for thing in told for concept in thing.concepts}) or ["thing"]
        text = ", ".join(words[int(i)] for i in rng.permutation(len(words))[: int(rng.integers(1, len(words) + 1))])
    else:
        left_out = [
            replace(thing, **{name: None for name in ("shape", "color", "material") if rng.random() < 0.25})
            for thing in told
        ]
        text = Scene(tuple(left_out), scene.seed).caption.rstrip(".")
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(text)


@torch.no_grad()
def tokens_at(model: Any, processor: Any, scenes: Sequence[Scene], layer: int) -> Float[Tensor, "n tokens d"]:
    """All tokens of the scenes behind a block, in half the bytes."""
    tower = model.model.vision_tower
    parts: list[Tensor] = []
    for start in range(0, len(scenes), 250):
        images = [scene.image for scene in scenes[start : start + 250]]
        pixels = processor.image_processor(images, return_tensors="pt").pixel_values
        parts.append(tower(pixels, output_hidden_states=True).hidden_states[layer + 1].half())
        for scene in scenes[start : start + 250]:
            vars(scene).pop("image", None)  # it is drawn when first asked for, and kept
    return torch.cat(parts)


def train_dual(model: Any, processor: Any, recipe: DualRecipe | None = None, *, progress: bool = False) -> tuple[Any, Any]:
    """Train what `build_dual` gives with CLIP's loss; up to the hook point the tower is left as it is.

    Args:
        model: the bundled model.
        processor: its processor.
        recipe: sizes and lengths.
        progress: print the loss now and then.
    """
    recipe = recipe or DualRecipe()
    dual, both = build_dual(model, processor, recipe)
    layer = find_hook_point(model).layer
    scenes = sample(recipe.scenes, seed=SEED, split="train")
    tokens_ntd = tokens_at(model, processor, scenes, layer)
    (behind,) = dual.vision_model.encoder.layers[layer + 1 :]
    trained = [dual.text_model, dual.text_projection, dual.visual_projection, dual.vision_model.post_layernorm, behind]
    with torch.no_grad():  # the class token is long here; what an untrained block adds to it would be lost in it
        behind.self_attn.v_proj.weight.mul_(3)
        behind.self_attn.out_proj.weight.mul_(4)
    weights = [dual.logit_scale, *(weight for part in trained for weight in part.parameters())]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    rng = np.random.default_rng((recipe.seed, SEED))
    for step, rows in enumerate(_batches(rng, len(scenes), recipe)):
        image_bj = F.normalize(embed_image(dual, tokens_ntd[rows].float(), behind), dim=-1)
        texts = [loose_caption(scenes[int(row)], rng) for row in rows]
        inputs = both.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        text_bj = F.normalize(dual.get_text_features(**inputs).pooler_output, dim=-1)
        logits_bb = image_bj @ text_bj.T * dual.logit_scale.exp().clamp_max(100)
        target_b = torch.arange(len(rows))
        loss = (F.cross_entropy(logits_bb, target_b) + F.cross_entropy(logits_bb.T, target_b)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if progress and (step + 1) % 50 == 0:
            print(f"step {step + 1} of {recipe.steps}: loss {loss.item():.3f}", flush=True)
    return dual.eval(), both


def embed_image(dual: Any, acts_btd: Float[Tensor, "b tokens d"], block: Any) -> Float[Tensor, "b joint"]:
    """The tower's last block and what is behind it, of the class token alone: nobody reads the others."""
    normed_btd = block.layer_norm1(acts_btd)
    attention = block.self_attn
    q_bhtd, k_bhtd, v_bhtd = (
        rearrange(project(part), "b t (h d) -> b h t d", h=attention.num_heads)
        for project, part in (
            (attention.q_proj, normed_btd[:, :1]),
            (attention.k_proj, normed_btd),
            (attention.v_proj, normed_btd),
        )
    )
    attended = rearrange(F.scaled_dot_product_attention(q_bhtd, k_bhtd, v_bhtd), "b h t d -> b t (h d)")
    class_bd = (acts_btd[:, :1] + attention.out_proj(attended))[:, 0]
    class_bd = class_bd + block.mlp(block.layer_norm2(class_bd))
    return dual.visual_projection(dual.vision_model.post_layernorm(class_bd))


def _batches(rng: np.random.Generator, n: int, recipe: DualRecipe) -> Iterator[np.ndarray]:
    for _ in range(recipe.steps):
        yield rng.choice(n, min(recipe.batch, n), replace=False)


def load_dual(folder: Path) -> tuple[Any, Any]:
    """What `main` saved."""
    from transformers import CLIPModel, CLIPProcessor

    hf_model: Any = CLIPModel
    processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    return hf_model.from_pretrained(folder, local_files_only=True).eval(), processor


@dataclass(frozen=True)
class WordFigures:
    """How good concepts from a word are on the bundled world, beside contrast with images."""

    top1: float
    """Share of the concepts whose best feature from the word is among the contrast's best three."""
    precision: float
    """Share of the three best features from the word that are among the contrast's best three."""
    median_rank: float
    """Where the contrast's best feature comes in the word's order."""
    auroc: float
    """Mean AUROC of the best feature from the word (its largest activation) for the concept being in a validation scene."""
    auroc_contrast: float
    """The same of the contrast's best feature."""
    n_features: int
    """Features with an AUROC above 0.9 for some concept."""
    labelled: float
    """Share of them that get any label, of the world's concepts."""
    right: float
    """Share of them that get the concept they tell best."""
    others_labelled: float
    """Share of the other features that fire at all that get a label nonetheless."""


def measure(model: Any, processor: Any, sae: VisionSAE, effects: FeatureEffects, dual: Any, both: Any) -> WordFigures:
    """Features from words and labels of features against what validation scenes say.

    Args:
        model: the bundled model.
        processor: its processor.
        sae: its SAE; concepts that it has under the same names are replaced.
        effects: what its features do to the dual encoder's embedding.
        dual: the dual encoder.
        both: its processor.
    """

    def statistics(split: Split, pool: Pool, n: int) -> Mapping[str, tuple[SetStatistics, SetStatistics]]:
        scenes = sample(n, seed=SEED + 1, split=split)
        images, labels = [scene.image for scene in scenes], [scene.concepts for scene in scenes]
        return labelled_statistics(model, sae, images, labels, CONCEPTS, processor=processor, pool=pool)

    train, val = statistics("train", "mean", 1_200), statistics("val", "max", 800)
    auroc_cf = torch.stack([0.5 + auroc_score(*val[concept]) for concept in CONCEPTS])
    top1, shared, ranks, word_auroc, contrast_auroc = [], [], [], [], []
    for row, concept in enumerate(CONCEPTS):
        by_contrast, _ = select_features(SCORERS["sauce"](*train[concept]), 3)
        found = learn_concept_from_word(
            dual, sae, concept, processor=both, against=CONCEPTS, effects=effects, k=sae.d_sae
        ).features
        top1.append(found[0] in by_contrast)
        shared.append(len(set(found[:3]) & set(by_contrast)) / 3)
        ranks.append(found.index(by_contrast[0]) if by_contrast[0] in found else sae.d_sae)
        word_auroc.append(float(auroc_cf[row, found[0]]))
        contrast_auroc.append(float(auroc_cf[row, by_contrast[0]]))
    labels = label_features(dual, sae, CONCEPTS, processor=both, effects=effects, best=1).words
    fires_f = effects.effects_fj.any(dim=1)
    telling = [f for f in range(sae.d_sae) if auroc_cf[:, f].max() > 0.9 and fires_f[f]]
    others = [f for f in range(sae.d_sae) if auroc_cf[:, f].max() <= 0.9 and fires_f[f]]
    return WordFigures(
        top1=float(np.mean(top1)),
        precision=float(np.mean(shared)),
        median_rank=1 + float(np.median(ranks)),
        auroc=float(np.mean(word_auroc)),
        auroc_contrast=float(np.mean(contrast_auroc)),
        n_features=len(telling),
        labelled=float(np.mean([bool(labels[f]) for f in telling])),
        right=float(np.mean([labels[f] == (CONCEPTS[int(auroc_cf[:, f].argmax())],) for f in telling])),
        others_labelled=float(np.mean([bool(labels[f]) for f in others])),
    )


def erase_by_word(
    model: Any, processor: Any, sae: VisionSAE, effects: FeatureEffects, dual: Any, both: Any, n: int
) -> Results:
    """Every concept erased by the one feature of its word, and by the one of the contrast, at the same γ.

    Args:
        model: the bundled model, like the rest as in `measure`.
        processor: its processor.
        sae: its SAE with its bank from images.
        effects: what its features do.
        dual: the dual encoder.
        both: its processor.
        n: test images that hold each concept, and as many that lack it.
    """
    gamma = -1.0
    scratch = copy.copy(sae)
    scratch.concepts = ConceptBank()
    images = [Concept(name, concept.features[:1], gamma=gamma) for name, concept in sae.concepts.items()]
    by_image = {concept.name: concept for concept in images}
    by_word = {
        name: learn_concept_from_word(
            dual, scratch, name, processor=both, against=CONCEPTS, effects=effects, k=1, gamma=gamma
        )
        for name in CONCEPTS
    }
    return evaluate(
        model,
        sae,
        probes(n, retained=4),
        list(CONCEPTS),
        processor=processor,
        methods={
            "from images": lambda name: ConceptEraser(model, sae, [by_image[name]]),
            "from a word": lambda name: ConceptEraser(model, sae, [by_word[name]]),
        },
    )


def main(out: Path = Path("runs/dual"), n: int = 20, images: int = 8) -> None:
    """Train the text encoder, unless it is in the folder already, and print the figures.

    --n 0 leaves the erasing out, --images is how many unlabelled scenes the features' effects are taken on.
    """
    model, processor, sae = load()
    if not (out / "config.json").exists():
        start = time.process_time()
        dual, both = train_dual(model, processor, progress=True)
        print(f"trained in {time.process_time() - start:.0f} s of one core")
        both.save_pretrained(out)
        dual.save_pretrained(out)
    dual, both = load_dual(out)
    some = [scene.image for scene in sample(images, seed=SEED + 2, split="train")]
    scratch = copy.copy(sae)
    scratch.concepts = ConceptBank()
    for name, given in (("a plain grey image", None), (f"{images} unlabelled scenes", some)):
        effects = feature_effects(dual, sae, given, processor=both)
        print(f"effects on {name}: {measure(model, processor, scratch, effects, dual, both)}", flush=True)
    if n:
        effects = feature_effects(dual, sae, some, processor=both)
        print(erase_by_word(model, processor, sae, effects, dual, both, n).to_markdown())


if __name__ == "__main__":
    typer.run(main)
