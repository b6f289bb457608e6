"""From a word to features, and from features to words, without an image of the concept: through a paired text encoder.

A feature's decoder row lives in the residual stream of a block, a word in the joint space of images and texts behind the
tower. What a feature does to the image's embedding lies in the same space as the word's: the derivative of the embedding
along the decoder row, through the tower's remaining blocks. Texts all lie in one narrow cone of that space, so a
word is taken as what it adds to the mean of other words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sauce_hooks.activations.images import iter_inputs, to_device
from sauce_hooks.bank import Concept
from sauce_hooks.concepts.learn import select_features
from sauce_hooks.errors import ContrastError, HookPointError
from sauce_hooks.hookpoint import EditTokens, HookPoint, as_output, as_tokens, positions, untouched, unwrap
from sauce_hooks.sae import VisionSAE

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a picture of {}")
"""What a word is put into; its embedding is the mean over them (Radford et al., arXiv 2103.00020, Section 3.1.4)."""

COMMON_WORDS = (
    "person", "face", "hand", "crowd", "child", "dog", "cat", "bird", "fish", "horse", "insect", "animal", "tree",
    "flower", "grass", "forest", "mountain", "sea", "river", "sky", "cloud", "snow", "rain", "night", "sun", "food",
    "fruit", "bread", "drink", "table", "chair", "bed", "room", "kitchen", "house", "street", "city", "bridge", "car",
    "train", "ship", "airplane", "bicycle", "machine", "tool", "computer", "phone", "screen", "book", "text", "number",
    "sign", "map", "drawing", "painting", "toy", "ball", "game", "sport", "music", "clothes", "shoe", "hat", "red",
    "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "bright", "dark", "round", "striped",
    "old", "new", "wood", "metal", "glass", "stone", "fabric", "water", "fire", "happy", "sad", "angry", "tired", "fast",
    "big", "small", "many", "empty", "broken",
)  # fmt: skip
"""Other words than the one that is looked for: what all words have in common is taken from their mean."""

DEFAULT_K = 1
"""What comes after the best feature is less often the concept's (docs/words.md)."""
N_RANDOM = 512
"""Random directions that say how well a direction fits its best word by chance."""


@dataclass(frozen=True, eq=False)
class FeatureLabels:
    """The words that fit each feature best."""

    words: tuple[tuple[str, ...], ...]
    """Of each feature, best first; none where no word fits it."""
    scores: tuple[tuple[float, ...], ...]
    """The cosines of what the feature does with these words, in the same order."""
    threshold: float
    """The cosine that a feature's best word must exceed."""
    best_f: Float[Tensor, " d_sae"]
    """The cosine of the best word of every feature, also where it is too low; 0 of a feature that does nothing."""

    @property
    def labelled_share(self) -> float:
        """Share of the features that some word fits."""
        return sum(bool(words) for words in self.words) / len(self.words)

    def to_frame(self) -> pd.DataFrame:
        """One row a feature and word; features without a word have one row with None."""
        import pandas as pd

        rows = [
            {"feature": feature, "rank": rank, "word": word, "score": score}
            for feature, (words, scores) in enumerate(zip(self.words, self.scores, strict=True))
            for rank, (word, score) in enumerate(
                zip(words, scores, strict=True) if words else [(None, float(self.best_f[feature]))], start=1
            )
        ]
        return pd.DataFrame(rows)


def match_scores(
    effects_fj: Float[Tensor, "f joint"], texts_wj: Float[Tensor, "w joint"], center_j: Float[Tensor, " joint"]
) -> Float[Tensor, "f w"]:
    """e_i · (t_w − c) / ‖t_w − c‖: how far a feature moves the image towards what a word adds to the mean c of other words.

    Of effects of length 1 it is a cosine. A feature that does nothing has 0.
    """
    return effects_fj.float() @ F.normalize(texts_wj.float() - center_j.float(), dim=-1).T


@torch.no_grad()
def embed_words(
    dual: Any, words: Sequence[str], *, processor: Any, templates: Sequence[str] = TEMPLATES, batch_size: int = 256
) -> Float[Tensor, "w joint"]:
    """The text embedding of each word: of length 1 in each template, then their mean, of length 1 again.

    Args:
        dual: a model with a paired text encoder: it has `get_text_features`.
        words: any text.
        processor: its processor, or its tokenizer alone.
        templates: texts with `{}` where the word goes.
        batch_size: texts a forward.

    Raises:
        ContrastError: no word, or an empty one; no template, or one without `{}`.
        HookPointError: the model has no paired text encoder.
    """
    if not words or not all(word.strip() for word in words):
        raise ContrastError("an empty word has no features: give at least one word, and no empty ones")
    if not templates or not all("{}" in template for template in templates):
        raise ContrastError(f"the templates {templates!r} must be texts with {{}} where the word goes")
    root = unwrap(dual)
    encode = _paired(root).get_text_features
    tokenizer = getattr(processor, "tokenizer", processor)
    length = _text_length(root)
    # Not str.format: a template or a word may hold braces of its own.
    texts = [template.replace("{}", word) for word in words for template in templates]
    parts: list[Tensor] = []
    with untouched(root):
        for start in range(0, len(texts), batch_size):
            tokens: Any = tokenizer(
                texts[start : start + batch_size],
                padding="max_length" if length else True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            parts.append(_embedding(encode(**to_device(dict(tokens), next(root.parameters())))).float().cpu())
    texts_wtj = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(words), len(templates)))
    return F.normalize(texts_wtj.mean(1), dim=-1)


def _text_length(root: Any) -> int | None:
    """SigLIP was trained on texts padded to their full length, and reads the last token; CLIP does not see its padding."""
    text: Any = root.config.text_config
    return int(text.max_position_embeddings) if "siglip" in str(text.model_type) else None


def _paired(root: nn.Module) -> Any:
    for name in ("get_text_features", "get_image_features"):
        if not hasattr(root, name):
            raise HookPointError(
                f"{type(root).__name__} has no {name}: words need a model that pairs a text encoder with the vision tower. "
                "For LLaVA that is the CLIP model its tower comes from, "
                'CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336") for LLaVA-1.5.'
            )
    return root


def _embedding(output: Any) -> Tensor:
    """The embedding: transformers 5 gives it inside an output, older ones by itself."""
    return output if isinstance(output, Tensor) else output.pooler_output


# What features do to the image's embedding. ---------------------------------------------------------------------------


def _jacobian(
    root: Any, place: HookPoint, tokens: EditTokens, inputs: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "joint d"], int]:
    """J, the sum over images of the derivative of their embedding along a shift of the edited tokens; and how many images.

    A backward pass through what lies behind the hook point for each dimension of the joint space.
    """
    like = next(root.parameters())
    shift_d = torch.zeros(place.d_in, dtype=like.dtype, device=like.device, requires_grad=True)

    def shift(module: nn.Module, args: Any, output: Any) -> Any:
        acts_utd = as_tokens(output, place).detach()  # nothing is derived through the blocks before
        edited_t = torch.zeros(acts_utd.shape[1], dtype=acts_utd.dtype, device=acts_utd.device)
        edited_t[list(positions(place.layout, tokens, len(edited_t)))] = 1
        return as_output(acts_utd + edited_t[:, None] * shift_d.to(acts_utd), output, place)

    with untouched(root), torch.enable_grad():
        handle = place.module(root).register_forward_hook(shift)
        try:
            embedding_uj = F.normalize(_embedding(root.get_image_features(**inputs)).float(), dim=-1)
        finally:
            handle.remove()
        rows: list[Tensor] = []
        for value in embedding_uj.sum(0):
            # Zeros where the embedding does not read what is shifted.
            rows += torch.autograd.grad(value, shift_d, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.stack(rows).float().cpu(), len(embedding_uj)


@dataclass(frozen=True, eq=False)
class FeatureEffects:
    """What each feature does to the image's embedding. Words are matched with it; it need be found only once."""

    effects_fj: Float[Tensor, "d_sae joint"]
    """e_i = m_i J w_i: the derivative of the normalised embedding along the decoder row w_i, times the feature's mean
    activation m_i while it fires; 0 of a feature that never fires."""
    random_nj: Float[Tensor, "n joint"]
    """The same of random directions of the residual stream: how well a direction fits a word by chance."""
    n_images: int
    """Images whose embedding was watched."""


def feature_effects(
    dual: Any, sae: VisionSAE, images: Any = None, *, processor: Any, batch_size: int = 16
) -> FeatureEffects:
    """What every feature of an SAE does to the image's embedding in the joint space of a dual encoder.

    Args:
        dual: a model that pairs a text encoder with the tower the SAE was trained on: CLIP, SigLIP, ...
        sae: the SAE. It may have been trained in another model around the same tower, such as a LLaVA.
        images: what the features are added to, a handful of any images; nothing need be known of them. By default one
            plain grey image.
        processor: the dual encoder's processor.
        batch_size: images a forward.

    Raises:
        SAEMismatchError: the SAE was trained on another tower.
        HookPointError: the model has no paired text encoder.
        ContrastError: nothing that a feature adds at the hook point reaches the embedding.
        ImagesError: no image can be read.
    """
    root = _paired(unwrap(dual))
    place = sae.locate(root)
    total_jd, n_images = torch.zeros(1, sae.d_in), 0
    for inputs in iter_inputs([_grey(root, place)] if images is None else images, processor, batch_size):
        pixels = to_device({k: v for k, v in inputs.items() if k in _IMAGE_INPUTS}, next(root.parameters()))
        jacobian_jd, n = _jacobian(root, place, sae.tokens.edit, pixels)
        total_jd, n_images = total_jd + jacobian_jd, n_images + n
    mean_nj = _directions(sae) @ (total_jd / n_images).T
    if not mean_nj.isfinite().all() or not total_jd.any():
        raise ContrastError(
            f"nothing that is added at {place.path} changes the embedding of an image: {type(root).__name__} does not read "
            "what this SAE edits"
        )
    return FeatureEffects(mean_nj[: sae.d_sae], mean_nj[sae.d_sae :], n_images)


_IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""What `get_image_features` takes; the last two are SigLIP 2's."""


def _grey(root: nn.Module, place: HookPoint) -> Image.Image:
    size: Any = getattr(getattr(place.tower_module(root), "config", None), "image_size", None) or 224
    return Image.new("RGB", (size, size) if isinstance(size, int) else (size[1], size[0]), (124, 116, 104))


def _directions(sae: VisionSAE) -> Float[Tensor, "n d_in"]:
    """The decoder rows, each times its feature's mean activation while it fires, then `N_RANDOM` as long random ones."""
    rows_fd = sae.sae.W_dec.detach().float().cpu()
    stats = sae.stats
    written_fd = F.normalize(rows_fd, dim=-1) if stats is None else stats.mean_when_active_f[:, None].float() * rows_fd
    norms_f = written_fd.norm(dim=-1)
    generator = torch.Generator().manual_seed(0)
    random_nd = F.normalize(torch.randn(N_RANDOM, rows_fd.shape[1], generator=generator), dim=-1)
    return torch.cat([written_fd, random_nd * norms_f[norms_f > 0].median()])


# Concepts and labels. -------------------------------------------------------------------------------------------------


def learn_concept_from_word(
    dual: Any,
    sae: VisionSAE,
    word: str,
    *,
    processor: Any,
    name: str | None = None,
    against: Sequence[str] = COMMON_WORDS,
    templates: Sequence[str] = TEMPLATES,
    effects: FeatureEffects | None = None,
    k: int = DEFAULT_K,
    gamma: float | None = None,
) -> Concept:
    """Select the features of a word, without an image of what it means, and store them in `sae.concepts`.

    The score of a feature is e_i · (t_w − c) / ‖t_w − c‖: e_i is what the feature does to an image's embedding, t_w the
    word's text embedding, c the mean of other words'. It is less sure than `learn_concept` with images (docs/words.md).

    Args:
        dual: a model that pairs a text encoder with the tower the SAE was trained on: for a CLIP or SigLIP tower the whole
            CLIP or SigLIP model, for LLaVA the CLIP model that its tower comes from.
        sae: the SAE.
        word: a word or a few, in a language the text encoder knows.
        processor: the dual encoder's processor.
        name: the concept's name; by default the word.
        against: other words, of which the word itself is left out; best those of the same field.
        templates: texts with `{}` where the word goes.
        effects: from `feature_effects`, to find them once for many words; by default those on a plain grey image.
        k: how many features at the most.
        gamma: the factor this concept wants; None leaves it to the eraser.

    Raises:
        ContrastError: an empty word, no other words, or no feature that fits.
        SAEMismatchError: the SAE was trained on another tower.
        HookPointError: the model has no paired text encoder.
    """
    if k < 1:
        raise ContrastError(f"k={k}: at least one feature must be chosen")
    others = [other for other in dict.fromkeys(against) if other != word]
    if not others:
        raise ContrastError(f"against= holds no other word than {word!r}: what all words have in common can't be told")
    texts_wj = embed_words(dual, [word, *others], processor=processor, templates=templates)
    center_j = texts_wj[1:].mean(0)
    if torch.allclose(texts_wj[0], center_j, atol=1e-6):
        raise ContrastError(f"to the text encoder {word!r} is the same as the mean of the {len(others)} other words")
    found = effects or feature_effects(dual, sae, processor=processor)
    _check_fits(found, sae)
    features, scores = select_features(match_scores(found.effects_fj, texts_wj[:1], center_j)[:, 0], k)
    if not features:
        raise ContrastError(f"no feature fits {word!r}: take another word for it, or learn it from images")
    concept = Concept(
        name=word if name is None else name,
        features=features,
        scores=scores,
        gamma=gamma,
        provenance={
            "scorer": "from a word",
            "word": word,
            "k": k,
            "images": found.n_images,
            "templates": list(templates),
            "against": len(others),
            "model": _name_of(dual),
        },
    )
    sae.concepts.add(concept, sae=sae.record())
    return concept


def label_features(
    dual: Any,
    sae: VisionSAE,
    vocabulary: Sequence[str],
    *,
    processor: Any,
    templates: Sequence[str] = TEMPLATES,
    effects: FeatureEffects | None = None,
    best: int = 3,
    chance: float = 0.01,
) -> FeatureLabels:
    """The words of a vocabulary that fit each feature best.

    Args:
        dual: as in `learn_concept_from_word`, like the rest that is not named here.
        sae: the SAE.
        vocabulary: the words to choose from, at least two; texts are centred on their mean.
        processor: the dual encoder's processor.
        templates: texts with `{}` where the word goes.
        effects: from `feature_effects`.
        best: how many words a feature at the most; only those that fit better than chance.
        chance: a feature has no label if its best word fits it no better than so large a share of random directions are
            fitted by theirs.

    Raises:
        ContrastError: fewer than two words, or an empty one.
        SAEMismatchError: the SAE was trained on another tower.
        HookPointError: the model has no paired text encoder.
    """
    words = list(dict.fromkeys(vocabulary))
    if len(words) < 2:
        raise ContrastError(f"a vocabulary of {len(words)} words leaves nothing to choose from: give at least two")
    if best < 1 or not 0 < chance < 1:
        raise ContrastError(f"best={best} must be at least 1, and chance={chance} between 0 and 1")
    texts_wj = embed_words(dual, words, processor=processor, templates=templates)
    found = effects or feature_effects(dual, sae, processor=processor)
    _check_fits(found, sae)
    return labels_of(found, texts_wj, words, best=best, chance=chance)


def labels_of(
    effects: FeatureEffects, texts_wj: Float[Tensor, "w joint"], words: Sequence[str], *, best: int, chance: float
) -> FeatureLabels:
    """`label_features` from what it has computed: effects of the features, embeddings of the words."""
    center_j = texts_wj.mean(0)
    scores_fw = match_scores(F.normalize(effects.effects_fj.float(), dim=-1), texts_wj, center_j)
    by_chance_n = match_scores(F.normalize(effects.random_nj.float(), dim=-1), texts_wj, center_j).max(1).values
    threshold = float(torch.quantile(by_chance_n, 1 - chance))
    top = scores_fw.topk(min(best, len(words)), dim=1)
    kept: list[list[tuple[str, float]]] = [
        [(words[int(w)], score) for score, w in zip(scores, chosen, strict=True) if score > threshold]
        for scores, chosen in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    return FeatureLabels(
        words=tuple(tuple(word for word, _ in row) for row in kept),
        scores=tuple(tuple(score for _, score in row) for row in kept),
        threshold=threshold,
        best_f=top.values[:, 0],
    )


def _check_fits(effects: FeatureEffects, sae: VisionSAE) -> None:
    if len(effects.effects_fj) != sae.d_sae:
        raise ContrastError(f"these are the effects of {len(effects.effects_fj)} features, and the SAE has {sae.d_sae}")


def _name_of(dual: Any) -> str:
    config: Any = unwrap(dual).config
    return str(getattr(config, "name_or_path", "") or config.model_type)
