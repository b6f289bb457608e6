"""What a contrast set says of every feature: sums that add up, so any number of images fits in O(d_sae) memory.

The sets of many concepts come from one pass over labelled images: those with a concept are summed, those without it are
the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sauce_hooks.errors import ContrastError

Pool = Literal["mean", "max", "class", "last"]
"""How the tokens of an image become one activation a feature: over all that the SAE reads, or one token alone."""

BINS_PER_OCTAVE, OCTAVES = 4, 24
LOWEST = 2.0**-12
"""Activations below this share a bin, as do those above `LOWEST` · 2^`OCTAVES` = 4,096."""
N_BINS = 1 + BINS_PER_OCTAVE * OCTAVES


@dataclass(frozen=True, eq=False)
class SetStatistics:
    """Sums over the images of one set. Two parts of a set add up with `+`; `-` takes a part away again."""

    n: int
    """Images."""
    sum_f: Float[Tensor, " d_sae"]
    """Sum over images of each feature's pooled activation."""
    squares_f: Float[Tensor, " d_sae"]
    """Sum of its squares."""
    fired_f: Float[Tensor, " d_sae"]
    """Number of images on which each feature fires at all."""
    histogram_bf: Int[Tensor, "bins d_sae"]
    """Number of images by pooled activation: none, then quarters of an octave."""

    def __add__(self, other: SetStatistics) -> SetStatistics:
        return self._with(other, 1)

    def __sub__(self, other: SetStatistics) -> SetStatistics:
        return self._with(other, -1)

    def _with(self, other: SetStatistics, sign: int) -> SetStatistics:
        return SetStatistics(
            self.n + sign * other.n,
            self.sum_f + sign * other.sum_f,
            self.squares_f + sign * other.squares_f,
            self.fired_f + sign * other.fired_f,
            self.histogram_bf + sign * other.histogram_bf,
        )

    @property
    def mean_f(self) -> Float[Tensor, " d_sae"]:
        """μ(i, D): the mean activation of each feature over the set (Section 3.2)."""
        return self.sum_f / self.n

    @property
    def variance_f(self) -> Float[Tensor, " d_sae"]:
        """σ²: the variance over the images, divided by n; never below 0."""
        return (self.squares_f / self.n - self.mean_f**2).clamp_min(0)

    @property
    def frequency_f(self) -> Float[Tensor, " d_sae"]:
        """p: the share of the images on which each feature fires."""
        return self.fired_f / self.n

    @classmethod
    def of(cls, z_bf: Float[Tensor, "batch d_sae"]) -> SetStatistics:
        """The sums of some images' pooled activations."""
        z_bf = z_bf.double()
        bins_bf = (torch.log2(z_bf.clamp_min(LOWEST / 2) / LOWEST) * BINS_PER_OCTAVE).floor().long() + 1
        bins_bf = torch.where(z_bf > 0, bins_bf.clamp(1, N_BINS - 1), 0)
        histogram_bf = torch.zeros(N_BINS, z_bf.shape[1], dtype=torch.int32)
        histogram_bf.scatter_add_(0, bins_bf, torch.ones_like(bins_bf, dtype=torch.int32))
        return cls(len(z_bf), z_bf.sum(0), z_bf.pow(2).sum(0), (z_bf > 0).double().sum(0), histogram_bf)


def pooled(z_btf: Float[Tensor, "batch tokens d_sae"], pool: Pool) -> Float[Tensor, "batch d_sae"]:
    """One activation an image and feature: the mean or the largest |z| over its tokens; of a single token, that one.

    Where z can be negative (abstopk), an edit changes it by (γ − 1) z either way: its size is what counts.
    """
    # |z| as a tensor of its own would double the memory.
    z_bf = torch.linalg.vector_norm(z_btf, torch.inf if pool == "max" else 1, dim=1)
    return z_bf if pool == "max" else z_bf / z_btf.shape[1]


def accumulate(batches: Iterable[Float[Tensor, "_ d_sae"]]) -> SetStatistics:
    """The sums of a stream of batches of pooled activations; `ContrastError` if it is empty."""
    total: SetStatistics | None = None
    for z_bf in batches:
        part = SetStatistics.of(z_bf)
        total = part if total is None else total + part
    if total is None:
        raise ContrastError("a contrast set is empty: give at least one image that shows the concept and one that does not")
    return total


def accumulate_labelled(
    batches: Iterable[Float[Tensor, "_ d_sae"]], labels: Sequence[Collection[str]], concepts: Sequence[str]
) -> dict[str, tuple[SetStatistics, SetStatistics]]:
    """The two sets of every concept, from one pass: the images that are labelled with it, and the others.

    Args:
        batches: pooled activations of images, in the order of the labels.
        labels: what each image shows.
        concepts: the concepts wanted.

    Raises:
        ContrastError: images and labels differ in number, or all or none of the images show a concept.
    """
    total: SetStatistics | None = None
    holding: dict[str, SetStatistics] = {}
    at = 0
    for z_bf in batches:
        part = SetStatistics.of(z_bf)
        total = part if total is None else total + part
        here = labels[at : at + len(z_bf)]
        at += len(z_bf)
        for concept in concepts:
            rows = [i for i, names in enumerate(here) if concept in names]
            if rows:
                found = SetStatistics.of(z_bf[rows])
                holding[concept] = holding[concept] + found if concept in holding else found
    if total is None or at != len(labels):
        raise ContrastError(f"{at} images could be read, and there are {len(labels)} labels: each image needs its own")
    for concept in concepts:
        n = holding[concept].n if concept in holding else 0
        if n in (0, total.n):
            raise ContrastError(f"{n} of the {total.n} images show {concept!r}: both with it and without it are needed")
    return {concept: (holding[concept], total - holding[concept]) for concept in concepts}
