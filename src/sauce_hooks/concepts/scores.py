"""How much a feature speaks for a concept: one pure function of two sets' statistics each, higher for more, 0 for nothing.

μ is a feature's mean activation over the images of a set, p the share of images on which it fires, σ² its variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.concepts.statistics import SetStatistics
from sauce_hooks.errors import ContrastError

Scorer = Callable[[SetStatistics, SetStatistics], Float[Tensor, " d_sae"]]
"""A function of the images with the concept and of those without it. Features that score above 0 can be selected."""


def sauce_score(positives: SetStatistics, negatives: SetStatistics, delta: float = 1e-8) -> Float[Tensor, " d_sae"]:
    """S(i, c, D) = μ(i, D_c) / (Σ_j μ(j, D_c) + δ) − μ(i, D_nc) / (Σ_j μ(j, D_nc) + δ). Eq. 4 of the paper.

    SAeUron's score (arXiv 2501.18052, Eq. 4), too.
    """
    mu_c, mu_nc = positives.mean_f, negatives.mean_f
    return torch.as_tensor(mu_c / (mu_c.sum() + delta) - mu_nc / (mu_nc.sum() + delta))


def saeuron_score(positives: SetStatistics, negatives: SetStatistics, percentile: float = 99.0) -> Float[Tensor, " d_sae"]:
    """S_i − Q, and nothing for S_i ≤ max(Q, 0), with S of Eq. 4 and Q its percentile over the features.

    SAeUron (arXiv 2501.18052, Section 4.2) takes every feature above a percentile instead of the k best.
    """
    score_f = sauce_score(positives, negatives)
    quantile = torch.quantile(score_f, percentile / 100)
    return torch.where((score_f > quantile) & (score_f > 0), score_f - quantile, 0)


def difference_score(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
    """μ_c − μ_nc, in units of the activation."""
    return positives.mean_f - negatives.mean_f


def cohens_d_score(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
    """(μ_c − μ_nc) / s with s² the pooled variance ((n_c − 1) s_c² + (n_nc − 1) s_nc²) / (n_c + n_nc − 2). Cohen 1988."""
    n, m = positives.n, negatives.n
    pooled_f = (n * positives.variance_f + m * negatives.variance_f) / max(1, n + m - 2)
    return _ratio(difference_score(positives, negatives), pooled_f.sqrt())


def fisher_score(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
    """(μ_c − μ_nc)² / (σ_c² + σ_nc²), with the sign of μ_c − μ_nc. Fisher's criterion of one dimension (1936)."""
    difference_f = difference_score(positives, negatives)
    return _ratio(difference_f * difference_f.abs(), positives.variance_f + negatives.variance_f)


def auroc_score(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
    """P(z_c > z_nc) + P(z_c = z_nc) / 2 − 1/2: the area under the ROC curve of the activation as a detector, above chance.

    From activations rounded down to a quarter of an octave (`SetStatistics.histogram_bf`), so that any number of images
    fits in memory: two activations that differ by less than a fifth may count as equal.

    Raises:
        ContrastError: the statistics hold no histogram.
    """
    if positives.histogram_bf is None or negatives.histogram_bf is None:
        raise ContrastError(
            "this score needs histograms, which these statistics do not hold: read them with "
            "labelled_statistics(..., histograms=True), or every set alone with set_statistics(...)"
        )
    p_bf, q_bf = positives.histogram_bf.double() / positives.n, negatives.histogram_bf.double() / negatives.n
    below_bf = q_bf.cumsum(0) - q_bf
    return (p_bf * (below_bf + q_bf / 2)).sum(0) - 0.5


def firing_score(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
    """p_c − p_nc: how much more often it fires."""
    return positives.frequency_f - negatives.frequency_f


def log_odds_score(positives: SetStatistics, negatives: SetStatistics) -> Float[Tensor, " d_sae"]:
    """The log of the odds ratio of firing, half an image added to each count (Haldane 1956, Anscombe 1956).

    log (f_c + ½)/(n_c − f_c + ½) − log (f_nc + ½)/(n_nc − f_nc + ½), with f the number of images on which it fires.
    """

    def log_odds(s: SetStatistics) -> Float[Tensor, " d_sae"]:
        return torch.log(s.fired_f + 0.5) - torch.log(s.n - s.fired_f + 0.5)

    return log_odds(positives) - log_odds(negatives)


def crisp_score(positives: SetStatistics, negatives: SetStatistics, candidates: int = 128) -> Float[Tensor, " d_sae"]:
    """The log of μ_c / μ_nc for the features with the largest p_c − p_nc > 0, nothing for the others.

    CRISP (arXiv 2508.13650, Section 3.1) first takes the features that fire more often on the target by the largest margin,
    then those of them whose activation there is the larger by ratio. Means get δ = 1% of the mean over all, against 0/0.
    """
    margin_f = firing_score(positives, negatives)
    chosen = margin_f.topk(min(candidates, len(margin_f))).indices
    delta = 0.01 * (positives.mean_f.mean() + negatives.mean_f.mean()) / 2 + torch.finfo(torch.float64).tiny
    ratio_f = torch.log((positives.mean_f + delta) / (negatives.mean_f + delta))
    kept = torch.zeros_like(margin_f, dtype=torch.bool)
    kept[chosen] = True
    return torch.where(kept & (margin_f > 0), ratio_f, 0)


def _ratio(over_f: Float[Tensor, " d_sae"], under_f: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """0/0 = 0: a feature that never moves says nothing. One that moves only between the sets gets a million, not ∞."""
    return torch.where(over_f == 0, 0, over_f / under_f.clamp_min(1e-6 * over_f.abs()))


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "sauce": sauce_score,
        "saeuron": saeuron_score,
        "crisp": crisp_score,
        "difference": difference_score,
        "cohens_d": cohens_d_score,
        "auroc": auroc_score,
        "firing": firing_score,
        "fisher": fisher_score,
        "log_odds": log_odds_score,
    }
)
"""Scores by name; `learn_concept` also takes a function of the same kind. "sauce" is the paper's Eq. 4; each
function names its source."""
