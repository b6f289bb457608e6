"""Dense rivals of features: a concept as a subspace of the residual stream, to be projected out. No SAE plays a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations import read_activations
from sauce_hooks.bank import Concept, Projection
from sauce_hooks.errors import ContrastError
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.provenance import provenance_of


@dataclass(frozen=True, eq=False)
class TokenMoments:
    """First and second moments of all tokens of a set of images. Parts of a set add up with `+`; O(d²) memory."""

    n: int
    """Tokens."""
    sum_d: Float[Tensor, " d"]
    """Sum of the activations, in double precision, as the rest."""
    outer_dd: Float[Tensor, "d d"]
    """Sum of their outer products x xᵀ."""

    def __add__(self, other: TokenMoments) -> TokenMoments:
        return TokenMoments(self.n + other.n, self.sum_d + other.sum_d, self.outer_dd + other.outer_dd)

    @classmethod
    def of(cls, rows: Iterable[Float[Tensor, "_ d"]]) -> TokenMoments:
        """The moments of a stream of activations; `ContrastError` if it is empty."""
        total: TokenMoments | None = None
        for part in rows:
            x_nd = part.double()
            found = cls(len(x_nd), x_nd.sum(0), x_nd.T @ x_nd)
            total = found if total is None else total + found
        if total is None:
            raise ContrastError("a contrast set is empty: give images that show the concept and images that do not")
        return total

    @property
    def mean_d(self) -> Float[Tensor, " d"]:
        """μ."""
        return self.sum_d / self.n

    @property
    def covariance_dd(self) -> Float[Tensor, "d d"]:
        """Σ = E[x xᵀ] − μ μᵀ."""
        return self.outer_dd / self.n - torch.outer(self.mean_d, self.mean_d)


def token_moments(
    model: nn.Module, sae: VisionSAE, images: Any, *, processor: Any = None, batch_size: int = 64
) -> TokenMoments:
    """One streaming pass over a set of images, over the tokens that the SAE reads.

    Args:
        model: the model whose tower the SAE belongs to.
        sae: says where and which tokens; it encodes nothing.
        images: as everywhere.
        processor: the model's processor.
        batch_size: images a forward of the tower.

    Raises:
        ImagesError: no image can be read.
    """
    place = sae.locate(model)
    return TokenMoments.of(
        read_activations(model, images, place, tokens=sae.tokens.read, processor=processor, batch_size=batch_size)
    )


def difference_of_means(positives: TokenMoments, negatives: TokenMoments) -> Projection:
    """Every token projected off v = μ_c − μ_nc, keeping there what the negatives have: x′ = x − ((x − μ_nc)·v̂) v̂.

    Raises:
        ContrastError: the means are the same.
    """
    v_d = positives.mean_d - negatives.mean_d
    if not float(v_d.norm()) > 0:
        raise ContrastError("the two sets have the same mean activation: are they the same?")
    v_rd = (v_d / v_d.norm())[None].float()
    return Projection(v_rd, v_rd, negatives.mean_d.float())


def leace(positives: TokenMoments, negatives: TokenMoments) -> Projection:
    """LEACE: the smallest affine change after which no linear classifier tells the sets' tokens apart.

    x′ = x − W⁺ P W (x − μ), with W = Σ^(−1/2) (pseudo-inverse) and P the orthogonal projection onto the column space of
    W Σ_xz, here the one direction u = W (μ_c − μ_nc) / ‖·‖: R = uᵀ W, L = (W⁺ u)ᵀ. Belrose et al. 2023 (arXiv 2306.03819),
    Theorem 4.3. Every token of a positive image counts as positive.

    Raises:
        ContrastError: the means are the same.
    """
    both = positives + negatives
    values, vectors = torch.linalg.eigh(both.covariance_dd)
    real = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    roots, axes_dr = values[real].sqrt(), vectors[:, real]
    u_r = (axes_dr.T @ (positives.mean_d - negatives.mean_d)) / roots  # in the coordinates of the principal axes
    if not float(u_r.norm()) > 0:
        raise ContrastError("the two sets have the same mean activation: are they the same?")
    u_r = u_r / u_r.norm()
    left_d, right_d = axes_dr @ (roots * u_r), axes_dr @ (u_r / roots)
    size = left_d.norm()  # so that both have a size that half precision can hold
    return Projection((left_d / size)[None].float(), (right_d * size)[None].float(), both.mean_d.float())


PROJECTIONS: Mapping[str, Callable[[TokenMoments, TokenMoments], Projection]] = MappingProxyType(
    {"difference_of_means": difference_of_means, "leace": leace}
)
"""Ways to find what is projected out, by name: functions of the two sets' moments. LEACE is of Belrose et al., arXiv
2306.03819."""


def learn_projection(
    model: nn.Module,
    sae: VisionSAE,
    name: str,
    positives: Any,
    negatives: Any,
    *,
    processor: Any = None,
    method: str = "difference_of_means",
    batch_size: int = 64,
) -> Concept:
    """Learn a dense projection for a concept, and store it in `sae.concepts`; erased with `edit="project"`.

    The direction between the means of the two sets, or LEACE (Belrose et al., arXiv 2306.03819).

    A concept that the bank already knows keeps its features and its edit, and can from then on be erased either way. A new
    one has no features, and "project" is its own edit.

    Args:
        model: the model whose tower the SAE belongs to.
        sae: its bank takes the concept; its hook point and tokens say where.
        name: the concept's name.
        positives: images that show the concept, or their `TokenMoments`.
        negatives: images that do not, likewise.
        processor: the model's processor.
        method: a name in `PROJECTIONS`.
        batch_size: images a forward of the tower.

    Raises:
        ContrastError: the sets have the same mean; an unknown method.
        ImagesError: a set is empty or wholly unreadable.
    """
    if method not in PROJECTIONS:
        raise ContrastError(f"unknown method {method!r}; known: {', '.join(PROJECTIONS)}")
    moments = [
        images
        if isinstance(images, TokenMoments)
        else token_moments(model, sae, images, processor=processor, batch_size=batch_size)
        for images in (positives, negatives)
    ]
    projection = PROJECTIONS[method](*moments)
    record = {"projection": method, "projection_tokens": [m.n for m in moments], **provenance_of(sae)}
    known = sae.concepts[name] if name in sae.concepts else Concept(name, (), edit="project")
    concept = replace(known, projection=projection, provenance={**known.provenance, **record})
    sae.concepts.add(concept, sae=sae.record())
    return concept
