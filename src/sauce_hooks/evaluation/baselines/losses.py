"""The losses of weight-updating unlearning: pure functions of logits and answers.

x is a question about an image, y its answer, π_θ the model in training and π_0 the original one. Sums over answers run over
the answer's tokens alone. All of them are minimised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Said:
    """What a model gives at each token of some answers, all answers one after the other."""

    logits_av: Float[Tensor, "answer_tokens vocabulary"]
    tokens_a: Int[Tensor, " answer_tokens"]
    """The answers."""
    rows_a: Int[Tensor, " answer_tokens"]
    """Which answer each token is of, 0 to n − 1."""
    original_av: Float[Tensor, "answer_tokens vocabulary"] | None = None
    """The original model's logits there, for the losses that look at it."""


def cross_entropy(said: Said) -> Float[Tensor, ""]:
    """CE = −(1/#tokens) Σ log π_θ(y_t | x, y_<t), the mean over all tokens of all answers, as fine-tuning has it."""
    return F.cross_entropy(said.logits_av.float(), said.tokens_a)


def answer_log_probs(
    logits_av: Float[Tensor, "answer_tokens vocabulary"],
    tokens_a: Int[Tensor, " answer_tokens"],
    rows_a: Int[Tensor, " answer_tokens"],
) -> Float[Tensor, " answers"]:
    """Log π(y | x) = Σ_t log π(y_t | x, y_<t), one an answer."""
    chosen_a = logits_av.float().log_softmax(-1).gather(1, tokens_a[:, None])[:, 0]
    return chosen_a.new_zeros(int(rows_a.max()) + 1).index_add(0, rows_a, chosen_a)


def kl_divergence(said: Said) -> Float[Tensor, ""]:
    """KL(π_0 ‖ π_θ) = Σ_v π_0(v) (log π_0(v) − log π_θ(v)), the mean over the answers' tokens; 0 iff the logits agree."""
    assert said.original_av is not None
    now, original = (logits.float().log_softmax(-1) for logits in (said.logits_av, said.original_av))
    return F.kl_div(now, original, reduction="batchmean", log_target=True)


def gradient_ascent(forget: Said) -> Float[Tensor, ""]:
    """GA = −CE(forget): ascent on the usual loss.

    Yao, Xu and Liu, "Large Language Model Unlearning" (arXiv 2310.10683); Jang et al. (arXiv 2210.01504).
    """
    return -cross_entropy(forget)


def gradient_difference(forget: Said, retain: Said, *, weight: float = 1.0) -> Float[Tensor, ""]:
    """GD = −CE(forget) + λ CE(retain). Liu, Liu and Stone, "Continual Learning and Private Unlearning", arXiv 2203.12817."""
    return gradient_ascent(forget) + weight * cross_entropy(retain)


def kl_minimization(forget: Said, retain: Said, *, weight: float = 1.0) -> Float[Tensor, ""]:
    """KL = −CE(forget) + λ KL(π_0 ‖ π_θ)(retain). As TOFU has it (arXiv 2401.06121, Section 4), after Yao et al. 2024."""
    return gradient_ascent(forget) + weight * kl_divergence(retain)


def preference_optimization(refused: Said, retain: Said, *, weight: float = 1.0) -> Float[Tensor, ""]:
    """PO = CE(refused) + λ CE(retain), where `refused` has the forget set's questions with refusals for answers.

    Maini et al., "TOFU" (arXiv 2401.06121, Section 4): no preference is optimised, whatever the name says.
    """
    return cross_entropy(refused) + weight * cross_entropy(retain)


def negative_preference(forget: Said, *, beta: float = 0.1) -> Float[Tensor, ""]:
    """NPO = −(2/β) E[log σ(−β (log π_θ(y|x) − log π_0(y|x)))], the mean over answers.

    Its gradient is that of E[log π_θ(y|x)] (ascent, a whole answer at a time), each answer weighted with
    2 π_θ^β / (π_θ^β + π_0^β): 1 for all of them as β → 0, and falling to 0 for what is forgotten already.
    Zhang, Lin, Bai and Mei, "Negative Preference Optimization" (arXiv 2404.05868, Eq. 3).
    """
    assert forget.original_av is not None
    now_n, original_n = (
        answer_log_probs(logits, forget.tokens_a, forget.rows_a) for logits in (forget.logits_av, forget.original_av)
    )
    return -2 / beta * F.logsigmoid(-beta * (now_n - original_n)).mean()


def negative_preference_retaining(
    forget: Said, retain: Said, *, beta: float = 0.1, weight: float = 1.0
) -> Float[Tensor, ""]:
    """NPO-RT = NPO(forget) + λ CE(retain), the variant with a retain loss of the same paper (its Section 4.1)."""
    return negative_preference(forget, beta=beta) + weight * cross_entropy(retain)


@dataclass(frozen=True)
class Objective:
    """What one weight-updating method minimises, and what it has to be given for that."""

    loss: Callable[[Said, Said | None, float, float], Float[Tensor, ""]]
    """Of the forget set, the retain set, λ and β."""
    source: str
    answers: Literal["given", "refusals"] = "given"
    """What stands for answers in the forget set."""
    retains: bool = True
    """Whether it looks at the retain set."""
    original_on: Literal["forget", "retain"] | None = None
    """Where it looks at the original model."""


def _both(loss: Callable[..., Tensor]) -> Callable[[Said, Said | None, float, float], Tensor]:
    return lambda forget, retain, weight, beta: loss(forget, retain, weight=weight)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "GA": Objective(
            lambda forget, retain, weight, beta: gradient_ascent(forget), "Yao et al. 2023, arXiv 2310.10683", retains=False
        ),
        "GD": Objective(_both(gradient_difference), "Liu et al. 2022, arXiv 2203.12817"),
        "KL": Objective(_both(kl_minimization), "Maini et al. 2024, arXiv 2401.06121", original_on="retain"),
        "PO": Objective(_both(preference_optimization), "Maini et al. 2024, arXiv 2401.06121", answers="refusals"),
        "NPO": Objective(
            lambda forget, retain, weight, beta: negative_preference_retaining(
                forget, _given(retain), beta=beta, weight=weight
            ),
            "Zhang et al. 2024, arXiv 2404.05868",
            original_on="forget",
        ),
    }
)
"""The weight-updating methods by name, each with its source."""


def _given(retain: Said | None) -> Said:
    assert retain is not None
    return retain
