"""The images that make each feature fire most, and how alike they are: data that is stored with an SAE."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sauce_hooks.errors import SAEFileError

FORMAT = 1
TOP_IMAGES = 9
"""Images that are kept of each feature."""


@dataclass(frozen=True, eq=False)
class Gallery:
    """Each feature's top images, and its monosemanticity score (Pach et al., arXiv 2504.02821).

    Raises:
        ValueError: parts that do not belong together.
    """

    images_fk: Int[Tensor, "d_sae k"] = field(repr=False)
    """Top images of each feature, strongest first, by their place among the images given; −1 where fewer fire it."""
    strengths_fk: Float[Tensor, "d_sae k"] = field(repr=False)
    """The feature's largest activation on a token of each, max |z|; 0 where fewer fire it."""
    monosemanticity_f: Float[Tensor, " d_sae"] = field(repr=False)
    """Score of Pach et al. (2025), see `describe_features`; NaN for features that fire on fewer than two images."""
    null_similarity: float
    """The mean similarity of two images whatever fires on them: what a score that means nothing would be."""
    embedding: str
    """How similarity was measured, in words. Scores with different embeddings must not be compared."""
    n_images: int
    """Images searched."""
    thumbnails: dict[int, bytes] = field(repr=False)
    """Small JPEGs of top images, by image; perhaps not of all of them."""

    def __post_init__(self) -> None:
        d_sae, shape = len(self.monosemanticity_f), self.images_fk.shape
        if len(shape) != 2 or shape != self.strengths_fk.shape or self.monosemanticity_f.shape != shape[:1]:
            raise ValueError(f"top images of shape {tuple(shape)} do not belong to {d_sae} features")
        if self.images_fk.is_floating_point() or ((self.images_fk < -1) | (self.images_fk >= self.n_images)).any():
            raise ValueError(f"top images that are no numbers of {self.n_images} images")
        if not all(0 <= number < self.n_images for number in self.thumbnails):
            raise ValueError(f"thumbnails of other images than the {self.n_images}")

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        numbers = sorted(self.thumbnails)
        pictures = [self.thumbnails[number] for number in numbers]
        tensors = {
            "images": self.images_fk.int(),
            "strengths": self.strengths_fk.float(),
            "monosemanticity": self.monosemanticity_f.float(),
            "thumbnail_images": torch.tensor(numbers, dtype=torch.int32),
            "thumbnail_sizes": torch.tensor([len(picture) for picture in pictures], dtype=torch.int32),
            "thumbnail_bytes": torch.frombuffer(bytearray(b"".join(pictures)) or bytearray(1), dtype=torch.uint8),
        }
        facts = {
            "format": FORMAT,
            "null_similarity": self.null_similarity,
            "embedding": self.embedding,
            "n_images": self.n_images,
        }
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path, {"gallery": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path, d_sae: int) -> Gallery:
        """Read what `save` wrote; `SAEFileError` if it is damaged, foreign or another SAE's."""
        try:
            with safe_open(path, "pt") as file:
                facts = cast(dict[str, Any], json.loads(file.metadata()["gallery"]))
                if facts["format"] != FORMAT:
                    raise SAEFileError(f"{path} is of format {facts['format']}; this version reads {FORMAT}")
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sizes = [int(size) for size in tensors["thumbnail_sizes"]]
            numbers = [int(number) for number in tensors["thumbnail_images"]]
            data = tensors["thumbnail_bytes"].numpy().tobytes()
            ends = [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]
            if min(sizes, default=0) < 0 or ends[-1] > len(data) or len(sizes) != len(numbers):
                raise SAEFileError(f"{path}: {len(data)} bytes of thumbnails, and {ends[-1]} are meant to be there")
            if len(tensors["monosemanticity"]) != d_sae:
                raise SAEFileError(f"{path} is of {len(tensors['monosemanticity'])} features, and the SAE has {d_sae}")
            return cls(
                images_fk=tensors["images"],
                strengths_fk=tensors["strengths"],
                monosemanticity_f=tensors["monosemanticity"],
                null_similarity=float(facts["null_similarity"]),
                embedding=str(facts["embedding"]),
                n_images=int(facts["n_images"]),
                thumbnails={n: data[ends[i] : ends[i + 1]] for i, n in enumerate(numbers)},
            )
        except (SafetensorError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError, OSError) as problem:
            if isinstance(problem, SAEFileError):
                raise
            raise SAEFileError(f"{path} is no gallery of features, or a damaged one: {problem!r}") from problem
