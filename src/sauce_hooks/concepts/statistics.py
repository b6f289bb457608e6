"""What contrast sets say of every feature: sums that add up, so that any number of images fits in memory.

The sets of many concepts come from one pass over labelled images: those with a concept are summed, those without it are
the rest. Parts of a set, from other processes or machines, are saved, loaded and added: `sum(parts)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sauce_hooks.concepts.statistics_file import Facts, Source, read_statistics, write_statistics
from sauce_hooks.errors import ContrastError, UnknownConceptError
from sauce_hooks.sae.provenance import digest

Pool = Literal["mean", "max", "class", "last"]
"""How the tokens of an image become one activation a feature: over all that the SAE reads, or one token alone."""

BINS_PER_OCTAVE, OCTAVES = 4, 24
LOWEST = 2.0**-12
"""Activations below this share a bin, as do those above `LOWEST` · 2^`OCTAVES` = 4,096."""
N_BINS = 1 + BINS_PER_OCTAVE * OCTAVES
BLOCK = 2**23
"""Entries of sums over a batch that are made at a time, concepts × features: 64 MiB in float64."""


@dataclass(frozen=True, eq=False)
class SetStatistics:
    """Sums over the images of one set. Two parts of a set add up with `+` and `sum`; `-` takes a part away again.

    The sums are float64: what a rare feature adds is still there after millions of images, which it is not in float32.
    """

    n: int
    """Images."""
    sum_f: Float[Tensor, " d_sae"]
    """Sum over images of each feature's pooled activation."""
    squares_f: Float[Tensor, " d_sae"]
    """Sum of its squares."""
    fired_f: Float[Tensor, " d_sae"]
    """Number of images on which each feature fires at all."""
    histogram_bf: Int[Tensor, "bins d_sae"] | None = None
    """Number of images by pooled activation: none, then quarters of an octave. None if it was not asked for."""
    source: Source | None = None
    """What the activations are; None if nobody said. Statistics of different sources do not add up."""

    def __add__(self, other: SetStatistics) -> SetStatistics:
        return self._with(other, 1)

    def __radd__(self, zero: Literal[0]) -> SetStatistics:
        return self  # where `sum` starts

    def __sub__(self, other: SetStatistics) -> SetStatistics:
        rest = self._with(other, -1)
        # Counts are exact. Of a feature that fires on none of the images left, only rounding is left in its sums.
        silent_f = rest.fired_f == 0
        return replace(rest, sum_f=rest.sum_f.masked_fill(silent_f, 0), squares_f=rest.squares_f.masked_fill(silent_f, 0))

    def _with(self, other: SetStatistics, sign: int) -> SetStatistics:
        if len(self.sum_f) != len(other.sum_f):
            raise ContrastError(f"statistics of {len(self.sum_f)} and of {len(other.sum_f)} features are not of one SAE")
        difference = self.source and other.source and self.source.difference(other.source)
        if difference:
            raise ContrastError(f"a part of these statistics is of {difference}: all parts must be read in the same way")
        histogram_bf = None
        if self.histogram_bf is not None and other.histogram_bf is not None:
            histogram_bf = self.histogram_bf + sign * other.histogram_bf
        return SetStatistics(
            self.n + sign * other.n,
            self.sum_f + sign * other.sum_f,
            self.squares_f + sign * other.squares_f,
            self.fired_f + sign * other.fired_f,
            histogram_bf,
            self.source or other.source,
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
    def of(cls, z_bf: Float[Tensor, "batch d_sae"], *, histogram: bool = True) -> SetStatistics:
        """The sums of some images' pooled activations, with their histogram unless it is not wanted."""
        z_bf = z_bf.double()
        histogram_bf = histogram_of(bins_of(z_bf)) if histogram else None
        return cls(len(z_bf), z_bf.sum(0), z_bf.pow(2).sum(0), (z_bf > 0).double().sum(0), histogram_bf)

    def digest(self) -> str:
        """Of the counts, which stands for the images: it does not depend on their order, on batches or on parts."""
        return digest(self.n, self.fired_f)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        write_statistics(Path(path), Facts(self.n, self.source), _tensors(self))

    @classmethod
    def load(cls, path: str | Path) -> SetStatistics:
        """Read what `save` wrote; `SAEFileError` if it is damaged, foreign or of labelled images."""
        facts, tensors = read_statistics(Path(path), _AXES)
        return cls(facts.n, source=facts.source, **tensors)


@dataclass(frozen=True, eq=False)
class LabelledStatistics(Mapping[str, tuple[SetStatistics, SetStatistics]]):
    """The sets of many concepts, all from the same images. By name: the images that show the concept, and the others.

    Parts of the images, from other processes or machines, add up with `+` and `sum`, if all have counted the same
    concepts. In a part a concept may be on none of the images, or on all: it has no two sets and is no key, but it is among
    the `positives`.

    Memory: 24 bytes a concept and feature. For 1,000 concepts that is 0.4 GB with 16,384 features, 1.6 GB with 65,536.
    Histograms are 388 bytes more: 6.4 GB and 25 GB.
    """

    total: SetStatistics
    """Of all images."""
    positives: Mapping[str, SetStatistics]
    """By concept, of the images that show it. Rows of tensors [concepts, d_sae] when they come from a pass or a file."""

    def __getitem__(self, name: str) -> tuple[SetStatistics, SetStatistics]:
        """The images that show it, and the others.

        Raises:
            UnknownConceptError: it was not counted.
            ContrastError: none of the images shows it, or all of them do.
        """
        if name not in self.positives:
            raise UnknownConceptError(name, self.positives)
        positives = self.positives[name]
        if not self._tells_apart(positives):
            raise ContrastError(
                f"{positives.n} of the {self.total.n} images show {name!r}: both with it and without it are needed"
            )
        return positives, self.total - positives

    def _tells_apart(self, positives: SetStatistics) -> bool:
        return 0 < positives.n < self.total.n

    def __contains__(self, name: object) -> bool:
        return name in self.positives and self._tells_apart(self.positives[cast(str, name)])

    def __iter__(self) -> Iterator[str]:
        return (name for name, positives in self.positives.items() if self._tells_apart(positives))

    def __len__(self) -> int:
        return sum(map(self._tells_apart, self.positives.values()))

    def __eq__(self, other: object) -> bool:
        return self is other  # those of a mapping would compare sets, which are equal only to themselves

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"LabelledStatistics({len(self.positives)} concepts, {self.total.n} images, {len(self.total.sum_f)} features)"

    def __add__(self, other: LabelledStatistics) -> LabelledStatistics:
        lone = sorted(self.positives.keys() ^ other.positives.keys())
        if lone:
            raise ContrastError(
                f"parts that have counted different concepts do not add up: {lone[0]!r} is in one of them only. Give every "
                "part the same list of concepts"
            )
        positives = {name: mine + other.positives[name] for name, mine in self.positives.items()}
        return LabelledStatistics(self.total + other.total, positives)

    def __radd__(self, zero: Literal[0]) -> LabelledStatistics:
        return self  # where `sum` starts

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        totals, parts = _tensors(self.total), list(self.positives.values())
        stacked = {name: torch.stack([getattr(part, name) for part in parts]) for name in totals}
        facts = Facts(self.total.n, self.total.source, tuple(self.positives), tuple(part.n for part in parts))
        write_statistics(Path(path), facts, {**stacked, **{_TOTAL + name: tensor for name, tensor in totals.items()}})

    @classmethod
    def load(cls, path: str | Path) -> LabelledStatistics:
        """Read what `save` wrote; `SAEFileError` if it is damaged, foreign or of a single set."""
        axes = {name: ("concepts", *axes) for name, axes in _AXES.items()}
        facts, tensors = read_statistics(Path(path), axes | {_TOTAL + name: axes for name, axes in _AXES.items()})
        totals = {name: tensors.pop(_TOTAL + name) for name in _AXES if _TOTAL + name in tensors}
        total = SetStatistics(facts.n, source=facts.source, **totals)
        return cls(total, _rows(facts.concepts or (), facts.counts or (), tensors, facts.source))


_AXES = {"sum_f": ("features",), "squares_f": ("features",), "fired_f": ("features",), "histogram_bf": ("bins", "features")}
"""The tensors of a set."""
_TOTAL = "total."


def _tensors(part: SetStatistics) -> dict[str, Tensor]:
    return {name: getattr(part, name) for name in _AXES if getattr(part, name) is not None}


def _rows(
    names: Sequence[str], counts: Sequence[int], tensors: Mapping[str, Tensor], source: Source | None
) -> dict[str, SetStatistics]:
    """The sets of concepts as rows of the tensors of all; nothing is copied."""
    rows = {key: tensor.unbind() for key, tensor in tensors.items()}
    return {
        name: SetStatistics(n, source=source, **{key: row[i] for key, row in rows.items()})
        for i, (name, n) in enumerate(zip(names, counts, strict=True))
    }


# From activations. ----------------------------------------------------------------------------------------------------


def pooled(z_btf: Float[Tensor, "batch tokens d_sae"], pool: Pool) -> Float[Tensor, "batch d_sae"]:
    """One activation an image and feature: the mean or the largest |z| over its tokens; of a single token, that one.

    Where z can be negative (abstopk), an edit changes it by (γ − 1) z either way: its size is what counts.
    """
    # |z| as a tensor of its own would double the memory.
    z_bf = torch.linalg.vector_norm(z_btf, torch.inf if pool == "max" else 1, dim=1)
    return z_bf if pool == "max" else z_bf / z_btf.shape[1]


def bins_of(z_bf: Float[Tensor, "batch d_sae"]) -> Int[Tensor, "batch d_sae"]:
    """The bin of each activation: 0 where the feature does not fire."""
    quarters = torch.arange(1, N_BINS - 1, dtype=torch.float64, device=z_bf.device) / BINS_PER_OCTAVE
    tiny = quarters.new_full((1,), torch.finfo(torch.float64).tiny)
    return torch.bucketize(z_bf.double(), torch.cat([tiny, LOWEST * 2**quarters]), right=True)


def histogram_of(bins_bf: Int[Tensor, "batch d_sae"]) -> Int[Tensor, "bins d_sae"]:
    """How many images have each feature in each bin."""
    histogram_bf = torch.zeros(N_BINS, bins_bf.shape[1], dtype=torch.int32, device=bins_bf.device)
    return histogram_bf.scatter_add_(0, bins_bf, torch.ones_like(bins_bf, dtype=torch.int32))


def accumulate(
    batches: Iterable[Float[Tensor, "_ d_sae"]], *, histogram: bool = True, source: Source | None = None
) -> SetStatistics:
    """The sums of a stream of batches of pooled activations; `ContrastError` if it is empty."""
    total: SetStatistics | None = None
    for z_bf in batches:
        part = SetStatistics.of(z_bf, histogram=histogram)
        total = part if total is None else total + part
    if total is None:
        raise ContrastError("a contrast set is empty: give at least one image that shows the concept and one that does not")
    return replace(total, source=source)


def accumulate_labelled(
    batches: Iterable[Float[Tensor, "_ d_sae"]],
    labels: Sequence[Collection[str]],
    concepts: Sequence[str],
    *,
    histograms: bool = False,
    source: Source | None = None,
) -> LabelledStatistics:
    """The two sets of every concept, from one pass: the images that are labelled with it, and the others.

    The work grows with the concepts that a batch shows, not with those there are: the sums of a batch's concepts are one
    matrix product each, labels [concepts, images] times activations [images, features].

    Args:
        batches: pooled activations of images, in the order of the labels.
        labels: what each image shows; a string is a single label.
        concepts: the concepts wanted.
        histograms: whether to keep the histograms that the score "auroc" needs, in 17 times the memory.
        source: what the activations are, as in `SetStatistics`.

    Raises:
        ContrastError: images and labels differ in number, or there is no concept.
    """
    if not concepts:
        raise ContrastError("no concept to count: no image has a label. Of a part of the images, give concepts=[...]")
    names = list(dict.fromkeys(concepts))
    row_of = {name: row for row, name in enumerate(names)}
    held = [frozenset(row_of[name] for name in _names(shown) if name in row_of) for shown in labels]
    total: SetStatistics | None = None
    by_concept: _ByConcept | None = None
    at = 0
    for z_bf in batches:
        z_bf = z_bf.double()
        part = SetStatistics.of(z_bf, histogram=histograms)
        total = part if total is None else total + part
        by_concept = by_concept or _ByConcept(len(names), z_bf, histograms)
        by_concept.add(z_bf, held[at : at + len(z_bf)])
        at += len(z_bf)
    if total is None or by_concept is None or at != len(labels):
        raise ContrastError(f"{at} images could be read, and there are {len(labels)} labels: each image needs its own")
    counts = Counter(row for rows in held for row in rows)
    positives = _rows(names, [counts[row] for row in range(len(names))], by_concept.tensors(), source)
    return LabelledStatistics(replace(total, source=source), positives)


class _ByConcept:
    """The sums of many concepts, filled in place a batch at a time: they may be most of the memory there is."""

    def __init__(self, n: int, like_bf: Float[Tensor, "_ d_sae"], histograms: bool) -> None:
        d_sae = like_bf.shape[1]
        self.sums_cf = tuple(like_bf.new_zeros(n, d_sae) for _ in range(3))
        """Of z, of z² and of z > 0."""
        self.histogram_cbf = like_bf.new_zeros(n, N_BINS, d_sae, dtype=torch.int32) if histograms else None

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in `SetStatistics`."""
        found = dict(zip(_AXES, (*self.sums_cf, self.histogram_cbf), strict=True))
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def add(self, z_bf: Float[Tensor, "batch d_sae"], held: Sequence[Collection[int]]) -> None:
        """One batch, and the concepts of each of its images."""
        shown = sorted({row for rows in held for row in rows})
        moments = (z_bf, z_bf.pow(2), (z_bf > 0).double())
        step = max(1, BLOCK // z_bf.shape[1])
        for some in (shown[start : start + step] for start in range(0, len(shown), step)):
            labels_cb = z_bf.new_tensor([[row in rows for rows in held] for row in some])
            rows_c = torch.tensor(some, device=z_bf.device)
            for sum_cf, moment_bf in zip(self.sums_cf, moments, strict=True):
                sum_cf.index_add_(0, rows_c, labels_cb @ moment_bf)
        if self.histogram_cbf is not None:
            bins_bf = bins_of(z_bf)
            for row in shown:
                self.histogram_cbf[row] += histogram_of(bins_bf[[i for i, rows in enumerate(held) if row in rows]])


def label_names(labels: Iterable[Collection[str]]) -> list[str]:
    """Every label, in alphabetical order."""
    return sorted({name for names in labels for name in _names(names)})


def _names(names: Collection[str]) -> Collection[str]:
    return (names,) if isinstance(names, str) else names
