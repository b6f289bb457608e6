"""A linear probe on what the language side still receives: whether a concept is deleted there, or only not said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sauce_hooks.activations.images import to_device
from sauce_hooks.bank import Rate
from sauce_hooks.errors import AttackError
from sauce_hooks.evaluation.answers import prepare
from sauce_hooks.evaluation.attacks.record import Leak
from sauce_hooks.evaluation.attacks.subject import Subject
from sauce_hooks.evaluation.metrics import auroc, rate
from sauce_hooks.evaluation.probes import Probe, Question
from sauce_hooks.hookpoint import BEHIND, HookPoint, as_tokens, evaluating, find_hook_point, unwrap

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties that are tried; the best on a fifth of the training images is taken."""
Score = Callable[[Float[Tensor, "m d"]], Float[Tensor, " m"]]
"""Of rows, how surely they hold the concept: above 0 for yes."""
FEWEST = 5
"""Training and test images that another concept must be in, and absent from, to have a probe."""


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on the projector's output, pooled over each image's tokens (mean and maximum).

    It is fitted anew on erased activations, as one who can read the model's inside would; an erasure that survives this
    has deleted the concept as far as a linear reader sees it, one that does not only keeps the model from saying it.
    """

    others: bool = True
    """Also probe for the other concepts of the same images: what an erasure ought to keep."""
    name: str = "linear probe"

    def __call__(self, subject: Subject) -> list[Leak]:
        """How well the concept can be read with the method on.

        Raises:
            AttackError: no training images, or too few.
        """
        if subject.training is None:
            raise AttackError("a probe is fitted on other images than those reported on: give training=ProbeSet(...)")
        concept, learn = subject.concept, subject.training
        fitted = (*learn.positives[concept], *learn.negatives[concept])
        tested = (*subject.positives, *subject.negatives)
        if min(len(learn.positives[concept]), len(learn.negatives[concept])) < FEWEST:
            raise AttackError(
                f"a probe for {concept!r} takes at least {FEWEST} training images with it and {FEWEST} without"
            )
        with subject.forget(), evaluating(subject.model):
            x_nd, x_md = (received(subject, probes) for probes in (fitted, tested))
        scores_m = _fit(x_nd, _holds(fitted, concept), x_md)
        truth_m = _holds(tested, concept)
        rates = {
            "probe accuracy": _balanced(scores_m, truth_m),
            "probe AUROC": auroc(scores_m[truth_m].tolist(), scores_m[~truth_m].tolist()),
        }
        if self.others:
            right: list[bool] = []
            for other in {c for names in subject.probes.domains.values() for c in names} - {concept}:
                y_n, y_m = _holds(fitted, other), _holds(tested, other)
                if min(int(y.sum()) for y in (y_n, ~y_n, y_m, ~y_m)) >= FEWEST:
                    found_m = _fit(x_nd, y_n, x_md) > 0
                    right += _even(found_m == y_m, y_m)
            rates["probe accuracy, others"] = rate(right)
        setting = f"projector's output, {len(fitted)} training images"
        return [Leak(self.name, setting, subject.method, concept, rates)]


@torch.no_grad()
def received(subject: Subject, probes: Sequence[Probe]) -> Float[Tensor, "images twice_d"]:
    """What the language side gets of each image: the mean and the maximum over its tokens, one after the other.

    Read by a hook that comes after an eraser's own, at the projector, or at the hooked block where the family's projector
    is not known.
    """
    wording, processor, model = subject.probes.wording, subject.processor, subject.model
    parameter = next(model.parameters())
    point, root = _place(model), unwrap(model)
    seen: list[Tensor] = []
    batches = prepare([Question(p, "yes_no", subject.concept) for p in probes], wording, processor, subject.batch_size)
    rows: list[Tensor] = []
    handle = point.module(root).register_forward_hook(lambda module, args, output: seen.append(as_tokens(output, point)))
    try:
        for batch in batches:
            seen.clear()
            model(**to_device(batch.inputs, parameter))
            acts_utd = torch.cat(seen).float()  # a tower may run once for each image
            n = len(batch.questions)
            if point.layout.shape != "batch" or len(acts_utd) % n:
                raise AttackError(f"which tokens at {point.path} are which image's cannot be told: no probe is fitted there")
            acts_btd = acts_utd.reshape(n, -1, acts_utd.shape[-1])
            rows.append(torch.cat([acts_btd.mean(1), acts_btd.amax(1)], dim=-1).cpu())
    finally:
        handle.remove()
    return torch.cat(rows)


def _place(model: Any) -> HookPoint:
    root = unwrap(model)
    behind = BEHIND.get(getattr(root.config, "model_type", ""))
    return find_hook_point(model, behind.projector) if behind is not None and behind.projector else find_hook_point(model)


def _holds(probes: Sequence[Probe], concept: str) -> Bool[Tensor, " n"]:
    return torch.tensor([concept in probe.concepts for probe in probes], dtype=torch.bool)


def _fit(x_nd: Float[Tensor, "n d"], y_n: Bool[Tensor, " n"], x_md: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Scores of the test images, above 0 for "holds it", by the penalty that does best on a fifth of the training images."""
    mean_d, std_d = x_nd.mean(0), x_nd.std(0).clamp_min(1e-6)
    x_nd, x_md = (x_nd - mean_d) / std_d, (x_md - mean_d) / std_d
    # Every fifth of each class: the images come sorted.
    held_n = torch.zeros_like(y_n)
    for of_class in (y_n, ~y_n):
        held_n[torch.nonzero(of_class)[::5, 0]] = True

    def loss(penalty: float) -> float:
        scores = logistic(x_nd[~held_n], y_n[~held_n], penalty)(x_nd[held_n])
        return float(_cross_entropy(scores, y_n[held_n]))

    return logistic(x_nd, y_n, min(PENALTIES, key=loss))(x_md)


def logistic(x_nd: Float[Tensor, "n d"], y_n: Bool[Tensor, " n"], penalty: float) -> Score:
    """Logistic regression, classes balanced: min mean cross-entropy + penalty/2 ‖w‖², by L-BFGS; gives the score of rows."""
    w_d, b = torch.zeros(x_nd.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([w_d, b], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = _cross_entropy(x_nd @ w_d + b, y_n) + penalty / 2 * w_d.square().sum()
            value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] - it takes a closure that gives a tensor
    fitted_d, offset = w_d.detach(), b.detach()

    def score(x_md: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        return x_md @ fitted_d + offset

    return score


def _cross_entropy(scores_n: Float[Tensor, " n"], y_n: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """The mean over both classes of the class's mean."""
    weight_n = torch.where(y_n, 0.5 / y_n.sum().clamp_min(1), 0.5 / (~y_n).sum().clamp_min(1))
    losses_n = torch.nn.functional.binary_cross_entropy_with_logits(scores_n, y_n.float(), reduction="none")
    return (weight_n * losses_n).sum()


def _even(right_m: Bool[Tensor, " m"], truth_m: Bool[Tensor, " m"]) -> list[bool]:
    """As many of one class as of the other, so that their mean is the balanced accuracy of those."""
    n = int(min(truth_m.sum(), (~truth_m).sum()))
    return [*right_m[truth_m][:n].tolist(), *right_m[~truth_m][:n].tolist()]


def _balanced(scores_m: Float[Tensor, " m"], truth_m: Bool[Tensor, " m"]) -> Rate:
    return rate(_even((scores_m > 0) == truth_m, truth_m))
