"""How a linear reader sees a concept, and where an edit can write so that it alone sees less.

A feature's decoder direction carries more than its concept: whatever else goes along with it in images. Scaled as it is, it
moves the read-outs of other concepts too. So only what the features add to the concept's own read-out is written, along one
direction that no other concept's reader sees:

h_c = Σ⁻¹ v_c                      how a linear reader sees c (Fisher's linear discriminant), v_c = μ_c − μ_nc
l_c = a − Uᵀ U a,  l_c · h_c = 1     U: an orthonormal basis of the other concepts' h
x′ = x + Σ_{i ∈ F} (γ − 1) z_i (W_dec[i] · h_c) l_c

γ = 0 takes away what the features add to h_c · x, and h_o · x of every other concept o stays as it is, whatever γ is. With
a = v_c the thing turns into what stands there without it, with a = s_c = μ_c − mean of the siblings' μ into a sibling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.bank import Subspace
from sauce_hooks.concepts.projections import TokenMoments
from sauce_hooks.concepts.statistics import SetStatistics
from sauce_hooks.errors import ContrastError

RIDGE = 1e-3
"""Added to the diagonal of the covariance, as a share of its mean."""
CROWD = 0.25
"""At most this share of the dimensions is kept free for others: beyond, little would be left to write to."""


def read_outs(
    differences_cd: Float[Tensor, "c d"], covariance_dd: Float[Tensor, "d d"], ridge: float = RIDGE
) -> Float[Tensor, "c d"]:
    """H = (Σ + ridge · tr Σ / d · 1)⁻¹ v for every concept. Fisher 1936."""
    d = len(covariance_dd)
    regular_dd = covariance_dd + ridge * covariance_dd.trace() / d * torch.eye(d, dtype=covariance_dd.dtype)
    return torch.linalg.solve(regular_dd, differences_cd.T).T


def written_direction(
    difference_d: Float[Tensor, " d"], read_d: Float[Tensor, " d"], others_od: Float[Tensor, "o d"]
) -> Float[Tensor, " d"]:
    """L = v less its part in the span of the others' read-outs, of a size such that l · h = 1.

    Only the nearest others count if there are more than `CROWD` of d.

    Raises:
        ContrastError: nothing of v is left that the concept's own reader sees: another concept is the same.
    """
    others_od = torch.nn.functional.normalize(others_od, dim=-1)
    near = (others_od @ difference_d).abs().argsort(descending=True)[: max(1, int(CROWD * len(difference_d)))]
    _, size_r, basis_rd = torch.linalg.svd(others_od[near], full_matrices=False)
    basis_rd = basis_rd[size_r > 1e-4 * size_r.max()] if len(near) else basis_rd
    left_d = difference_d - (difference_d @ basis_rd.T) @ basis_rd
    seen = float(left_d @ read_d)
    if not abs(seen) > 1e-6 * float(difference_d.norm() * read_d.norm()):
        raise ContrastError("another concept's images differ from theirs in the same direction: are two concepts the same?")
    return left_d / seen


def keep_apart(
    moments: Mapping[str, tuple[TokenMoments, TokenMoments]],
    others: Iterable[Subspace] = (),
    *,
    towards: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Subspace]:
    """For every concept the direction that its edit may write, and how what is written there is read.

    Args:
        moments: of each concept those of the images that show it, and of the others.
        others: of further concepts that must not be touched, for example those in a bank.
        towards: for a concept, the siblings that it is to be turned into, of those in `moments`; others turn into what is
            there without them.

    Returns:
        One-dimensional subspaces: `read_rd` is h, `basis_rd` is l. All are apart from all.

    Raises:
        ContrastError: two concepts cannot be told apart.
    """
    negatives = list(moments.values())
    total = sum((second for _, second in negatives[1:]), start=negatives[0][1])
    differences_cd = torch.stack([first.mean_d - second.mean_d for first, second in moments.values()])
    h_cd = read_outs(differences_cd, total.covariance_dd)
    known_od = torch.cat([h_cd, *(other.reader_rd.to(h_cd) for other in others)])
    found: dict[str, Subspace] = {}
    for i, name in enumerate(moments):
        apart = torch.arange(len(known_od)) != i
        try:
            to_d = differences_cd[i]
            if towards.get(name):
                to_d = moments[name][0].mean_d - torch.stack([moments[s][0].mean_d for s in towards[name]]).mean(0)
            l_d = written_direction(to_d, h_cd[i], known_od[apart])
        except ContrastError as problem:
            raise ContrastError(f"{name!r}: {problem}") from None
        found[name] = Subspace(l_d[None].float(), inside=True, read_rd=h_cd[i][None].float())
    return found


def read_out_score(
    W_dec: Float[Tensor, "d_sae d"], subspace: Subspace
) -> Callable[[SetStatistics, SetStatistics], Float[Tensor, " d_sae"]]:
    """A score for `learn_concept`: (W_dec[i] · h_c) (μ(i, D_c) − μ(i, D_nc)), how much more a feature adds to the read-out.

    The sum over all features is what the SAE's reconstruction says of the difference of the read-out between the sets.
    """

    def read_out(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
        seen_f = (W_dec.detach().cpu().double() @ subspace.reader_rd.double().T).sum(1)
        return seen_f * (positives.mean_f - negatives.mean_f)

    return read_out
