"""All that a trained SAE tells, measured at once and kept with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sauce_hooks.evaluation.loss_added import Answered, loss_added, prepare_answers
from sauce_hooks.sae.describe import Embed, describe_features
from sauce_hooks.sae.gallery import TOP_IMAGES
from sauce_hooks.sae.vision_sae import VisionSAE


def describe_sae(
    model: nn.Module,
    sae: VisionSAE,
    images: Any,
    *,
    processor: Any,
    answered: Sequence[Answered] = (),
    answers: str = "given",
    embed: Embed | None = None,
    k: int = TOP_IMAGES,
    batch_size: int = 64,
) -> None:
    """Measure an SAE's features on images and keep the result in `sae.stats` and `sae.gallery`; `sae.save` stores both.

    Args:
        model: the model whose tower the SAE belongs to; left exactly as it was.
        sae: the SAE.
        images: a folder, paths, PIL images or a Hugging Face dataset.
        processor: the model's processor.
        answered: questions about images with their answers, for the loss added; none: it is not measured.
        answers: whose answers these are, in words.
        embed: how alike images are, for the monosemanticity score; see `describe_features`.
        k: top images of a feature.
        batch_size: images a forward of the tower.

    Raises:
        ImagesError: no readable image, or an embedding that is zero.
        SAEMismatchError: the SAE belongs to another tower.
    """
    stats, gallery = describe_features(model, sae, images, processor=processor, embed=embed, k=k, batch_size=batch_size)
    if answered:
        loss = loss_added(model, sae, prepare_answers(answered, processor), answers=answers)
        stats = replace(stats, loss_added=loss)
    sae.stats, sae.gallery = stats, gallery
