"""Rivals that edit the same place without an SAE."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations import read_activations
from sauce_hooks.erasure import ProjectionEdit, attach, check_ran, detach
from sauce_hooks.hookpoint import HookPoint, TokenPolicy


def token_mean(
    model: nn.Module, images: Any, hook_point: HookPoint, tokens: TokenPolicy, processor: Any = None
) -> Float[Tensor, " d"]:
    """The mean activation over all tokens read of a set of images, in one streaming pass."""
    total, n = None, 0
    for rows in read_activations(model, images, hook_point, tokens=tokens.read, processor=processor):
        part = rows.double().sum(0)
        total, n = part if total is None else total + part, n + len(rows)
    assert total is not None  # reading no images raises
    return (total / n).float()


def difference_of_means(
    positive_mean_d: Float[Tensor, " d"], negative_mean_d: Float[Tensor, " d"], tokens: TokenPolicy
) -> ProjectionEdit:
    """Project every token off v = μ_c − μ_nc, keeping there what the negatives have: x′ = x − ((x − μ_nc)·v̂) v̂."""
    v = positive_mean_d - negative_mean_d
    return ProjectionEdit((v / v.norm())[None], negative_mean_d, tokens.edit)


@contextmanager
def erasing(model: nn.Module, hook_point: HookPoint, edits: Sequence[ProjectionEdit]) -> Generator[None]:
    """Edits in effect for the length of a `with`, attached and checked as `ConceptEraser` is."""
    attachments = [attach(model, hook_point, edit) for edit in edits]
    try:
        yield
    except BaseException:
        for attachment in attachments:
            detach(attachment)
        raise
    for attachment in attachments:
        detach(attachment)
    for attachment in attachments:
        check_ran(attachment)
