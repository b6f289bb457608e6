"""Dead features brought back by giving them the inputs that the SAE explains worst.

As in Bricken et al., "Towards Monosemanticity" (Transformer Circuits, 2023), appendix "Neuron Resampling". For
architectures whose loss never reaches a dead feature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

_FEATURE_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "b_gate": 0, "b_mag": 0, "r_mag": 0}
"""Which axis of a parameter counts the features. An SAE has some of them; its b_dec belongs to no feature."""
_ENCODER_SHARE = 0.2
"""Length of a new encoder column, over the mean length of those alive: short, so that the others are not disturbed."""


def draw_inputs(
    x_nd: Float[Tensor, "n d"], errors_n: Float[Tensor, " n"], n_dead: int, generator: torch.Generator
) -> Float[Tensor, "m d"]:
    """Rows drawn without replacement, each with a probability proportional to its loss squared.

    Two features with one input would be one feature for ever, since their gradients would be equal too. So m is `n_dead`
    or, if fewer, the number of rows with any loss.

    Args:
        x_nd: the rows to draw from.
        errors_n: the loss of each, ‖x − x̂‖², not negative.
        n_dead: rows wanted.
        generator: decides the draw, on its own device: one on the CPU draws the same whatever device the rows are on.
    """
    weights_n = errors_n.to(generator.device, torch.float64)
    weights_n = (weights_n / weights_n.max().clamp_min(torch.finfo(torch.float64).tiny)).pow(2)
    m = min(n_dead, int(weights_n.count_nonzero()))
    if m == 0:
        return x_nd[:0]
    return x_nd[torch.multinomial(weights_n, m, generator=generator).to(x_nd.device)]


@torch.no_grad()
def resample_dead(
    sae: TrainingSAE[Any],
    optimizer: torch.optim.Optimizer,
    dead_f: Bool[Tensor, " d_sae"],
    x_nd: Float[Tensor, "n d_in"],
    generator: torch.Generator,
) -> int:
    """Restart dead features on the inputs of a batch that are explained worst; all else stays bit-identical.

    A restarted feature's decoder row is the unit vector along its input, as the encoder sees it (with b_dec taken off). Its
    encoder column is the same direction at 0.2 times the mean length of the columns of the features alive, measured as they
    would be over decoder rows of norm one; its biases are zero, so that it fires on that input. The optimiser forgets it.

    Args:
        sae: a training SAE of an architecture in `RESAMPLED`; changed in place.
        optimizer: its optimiser; the moments of restarted features become zero, whatever kind of Adam it is.
        dead_f: which features are dead.
        x_nd: a batch, scaled as in training.
        generator: decides which inputs are drawn.

    Returns:
        How many were restarted: the first of `dead_f`, in order; fewer than are dead if the batch has too few rows.
    """
    dead = dead_f.nonzero().flatten().to(sae.device)
    if len(dead) == 0:
        return 0
    x_nd = x_nd.to(sae.device, sae.dtype)
    center_d = sae.b_dec * sae.cfg.apply_b_dec_to_input
    errors_n = (x_nd - sae.decode(sae.encode(x_nd))).float().pow(2).sum(1)
    # A row that is the centre itself has no direction to give.
    lengths_n = (x_nd - center_d).float().norm(dim=1)
    drawn_md = draw_inputs(x_nd, errors_n * (lengths_n > 0), len(dead), generator) - center_d
    dead = dead[: len(drawn_md)]
    if len(dead) == 0:
        return 0
    directions_md = torch.nn.functional.normalize(drawn_md.float(), dim=1)
    W_enc_dm = _ENCODER_SHARE * _encoder_length(sae, ~dead_f.to(sae.device)) * directions_md.T
    values = {"W_dec": directions_md, "W_enc": W_enc_dm}
    for name, parameter in sae.named_parameters():
        if name not in _FEATURE_AXIS:
            continue
        axis = _FEATURE_AXIS[name]
        _fill(parameter, axis, dead, values.get(name, 0))
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                _fill(moment, axis, dead, 0)
    return len(dead)


def _encoder_length(sae: TrainingSAE[Any], alive_f: Bool[Tensor, " d_sae"]) -> Float[Tensor, ""]:
    """The mean length of the encoder's columns of features alive (of all, if none is), over unit decoder rows."""
    lengths_f = sae.W_enc.float().norm(dim=0) * sae.W_dec.float().norm(dim=1)
    return lengths_f[alive_f].mean() if alive_f.any() else lengths_f.mean()


def _fill(tensor: Tensor, axis: int, index: Tensor, value: Tensor | float) -> None:
    where = (slice(None),) * axis + (index,)
    tensor[where] = value.to(tensor.dtype) if isinstance(value, Tensor) else value
