"""What happens to one activation: the paper's equations, as pure functions on tensors. No hooks in sight.

z = ReLU(W_enc (x − b_pre) + b_enc)                      Eq. 1
x̂ = W_dec z + b_pre                                      Eq. 2
C(z)_i = γ_i z_i  if i ∈ F_c,  z_i otherwise             Eq. 6

With the reconstruction error kept, x′ = x + (decode(C(z)) − decode(z)) = x + Σ_{i ∈ F_c} (γ_i − 1) z_i W_dec[i]: only the
columns of F_c are ever computed, and a token on which none of them fires comes out bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sauce_hooks.bank import Subspace

Change = Callable[[Float[Tensor, "*batch tokens k"]], Float[Tensor, "*batch tokens k"]]
"""What is to be added to the activations of some features."""


def scale_features(
    z: Float[Tensor, "*batch d_sae"], features_k: Int[Tensor, " k"], gamma_k: Float[Tensor, " k"]
) -> Float[Tensor, "*batch d_sae"]:
    """C(z): the chosen features times their factor, the others as they were. Eq. 6."""
    scaled = z.clone()
    scaled[..., features_k] = z[..., features_k] * gamma_k.to(z.dtype)
    return scaled


def scaled_change(gamma_k: Float[Tensor, " k"]) -> Change:
    """Δz = (γ − 1) z, as a function of z."""
    return lambda z: z * (gamma_k.to(z.dtype) - 1)


def gated_change(
    z: Float[Tensor, "*batch tokens k"],
    gamma_k: Float[Tensor, " k"],
    offset_k: Float[Tensor, " k"],
    gate_k: Float[Tensor, " k"],
    share_k: Float[Tensor, " k"],
) -> Float[Tensor, "*batch tokens k"]:
    """Δz of z′ = γ z + offset on tokens where |z| > gate, in images where that holds on more than `share` of the tokens."""
    change = (gamma_k - 1) * z + offset_k * z.sign()
    return torch.where(gates_open(z, gate_k, share_k), change, 0)


def gates_open(
    z: Float[Tensor, "*batch tokens k"], gate_k: Float[Tensor, " k"], share_k: Float[Tensor, " k"]
) -> Bool[Tensor, "*batch tokens k"]:
    """Where a feature is above its gate, in images where it is so on more than a share of the tokens."""
    above = z.abs() > gate_k
    return above & (above.float().mean(-2, keepdim=True) > share_k)


def decode_edit(
    x: Float[Tensor, "*batch tokens d"], sae: Any, features_k: Int[Tensor, " k"], change: Change
) -> Float[Tensor, "*batch tokens d"]:
    """x′ = decode(C(encode(x))): the paper to the letter. The reconstruction error of every token goes into the model."""
    z = sae.encode(x)
    edited = z.clone()
    edited[..., features_k] += change(z[..., features_k]).to(z.dtype)
    return sae.decode(edited)


def dense_delta(
    x: Float[Tensor, "*batch tokens d"], sae: Any, features_k: Int[Tensor, " k"], change: Change
) -> Float[Tensor, "*batch tokens d"]:
    """x′ − x = decode(C(z)) − decode(z), from the whole encoder and decoder: right for every architecture.

    z is computed anew for each decoding: an SAE that normalises at run time hands the scale from one to the other.
    """
    return decode_edit(x, sae, features_k, change) - sae.decode(sae.encode(x))


def confined(change: Float[Tensor, "*batch d"], subspace: Subspace | None) -> Float[Tensor, "*batch d"]:
    """What of a change may be written: (Δ Rᵀ) B inside a subspace, Δ − (Δ Rᵀ) B outside it; R Bᵀ = 1."""
    if subspace is None:
        return change
    along = (change @ subspace.reader_rd.to(change).T) @ subspace.basis_rd.to(change)
    return along if subspace.inside else change - along


def keep_norm(edited: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x′ ‖x‖ / ‖x′‖: every changed token gets its former norm back; one that was not changed stays bit-identical."""
    fine = torch.promote_types(x.dtype, torch.float32)
    before, after = (torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=fine) for t in (x, edited))
    factor = before / after.clamp_min(torch.finfo(fine).tiny)
    return torch.where((edited != x).any(-1, keepdim=True), (edited * factor).to(x.dtype), edited)


def sources(
    x: Float[Tensor, "*batch tokens d"], bare: Float[Tensor, "*batch tokens d"], flagged: Bool[Tensor, "*batch tokens"]
) -> Int[Tensor, "*batch tokens"]:
    """Which token of an image takes the place of each: itself, or for a flagged one the most similar that is not flagged.

    Args:
        x: the image's tokens.
        bare: the same without the features that flag: what a flagged token would be like without the concept.
        flagged: the tokens to be replaced.

    Returns:
        Positions; −1 for a flagged token of an image in which every token is flagged: there is nothing to take.
    """
    own = torch.arange(x.shape[-2], device=x.device).expand(flagged.shape)
    if not bool(flagged.any()):
        return own
    distance = torch.cdist(bare.float(), x.float())
    nearest = distance.masked_fill(flagged[..., None, :], torch.inf).argmin(-1)
    nearest = torch.where(flagged.all(-1, keepdim=True), -1, nearest)
    return torch.where(flagged, nearest, own)


@dataclass(frozen=True, eq=False)
class Columns:
    """The encoder columns and decoder rows of a few features of an element-wise SAE."""

    W_enc_dk: Float[Tensor, "d k"]
    b_enc_k: Float[Tensor, " k"]
    """The encoder's bias with b_pre folded in: b_enc − b_pre W_enc."""
    threshold_k: Float[Tensor, " k"] | None
    """JumpReLU's threshold; None for ReLU."""
    W_dec_kd: Float[Tensor, "k d"]

    @classmethod
    def of(cls, sae: Any, features_k: Int[Tensor, " k"]) -> Columns | None:
        """None where a feature's activation depends on the others (TopK, ...) or the input is normalised at run time."""
        if sae.cfg.architecture() not in ("standard", "jumprelu") or sae.cfg.normalize_activations in (
            "layer_norm",
            "constant_norm_rescale",
        ):
            return None
        W_enc_dk = sae.W_enc.index_select(1, features_k)
        b_enc_k = sae.b_enc[features_k]
        if sae.cfg.apply_b_dec_to_input:
            b_enc_k = b_enc_k - sae.b_dec @ W_enc_dk
        threshold = getattr(sae, "threshold", None)
        threshold_k = None if threshold is None else threshold[features_k].detach().clamp_min(0)
        return cls(W_enc_dk.detach().contiguous(), b_enc_k.detach(), threshold_k, sae.W_dec[features_k].detach())

    def parts(self, size: int) -> list[tuple[slice, Columns]]:
        """The columns a few at a time, and which ones they are."""
        slices = [slice(start, start + size) for start in range(0, len(self.W_dec_kd), size)]
        return [
            (
                part,
                Columns(
                    self.W_enc_dk[:, part].contiguous(),
                    self.b_enc_k[part],
                    None if self.threshold_k is None else self.threshold_k[part],
                    self.W_dec_kd[part],
                ),
            )
            for part in slices
        ]

    def to(self, device: torch.device, dtype: torch.dtype) -> Columns:
        """The same on another device, in another dtype."""
        threshold_k = None if self.threshold_k is None else self.threshold_k.to(device, dtype)
        W_enc_dk, b_enc_k, W_dec_kd = (t.to(device, dtype) for t in (self.W_enc_dk, self.b_enc_k, self.W_dec_kd))
        return Columns(W_enc_dk, b_enc_k, threshold_k, W_dec_kd)

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Activations of these features alone: Eq. 1, with JumpReLU's threshold where there is one."""
        pre = torch.addmm(self.b_enc_k, x.reshape(-1, x.shape[-1]), self.W_enc_dk)
        pre = pre.view(*x.shape[:-1], self.W_enc_dk.shape[1])
        return pre.relu_() if self.threshold_k is None else pre.mul_(pre > self.threshold_k)


def sparse_delta_edit(
    x: Float[Tensor, "*batch d"], columns: Columns, gamma_k: Float[Tensor, " k"]
) -> Float[Tensor, "*batch d"]:
    """X + `dense_delta` of `scaled_change` from the chosen columns alone: O(k d) a token instead of O(d_sae d)."""
    return x + (columns.encode(x) * (gamma_k - 1)) @ columns.W_dec_kd


def add_sparse_delta_(
    out: Float[Tensor, "*batch d"],
    x: Float[Tensor, "*batch d"],
    parts: Sequence[tuple[Columns, Float[Tensor, "_ d"]]],
    kept: Float[Tensor, " n"] | None = None,
) -> None:
    """Add Σ_i z_i(x) written[i] to `out`, in place: `sparse_delta_edit` as it runs, with written[i] = (γ_i − 1) W_dec[i].

    The features come in parts, so that what is allocated besides `out` stays under the size of `x` however many they are.
    `kept` is 1 for a token that is edited and 0 for one that stays as it is.
    """
    x_nd, out_nd = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    for columns, written_kd in parts:
        z_nk = columns.encode(x_nd)
        if kept is not None:
            # Where a gradient is wanted, ReLU has kept z for it.
            z_nk = z_nk * kept[:, None] if z_nk.requires_grad else z_nk.mul_(kept[:, None])
        out_nd.addmm_(z_nk, written_kd)


def project_out(
    x: Float[Tensor, "*batch d"],
    left_rd: Float[Tensor, "r d"],
    right_rd: Float[Tensor, "r d"],
    target_r: Float[Tensor, " r"],
) -> Float[Tensor, "*batch d"]:
    """x′ = x − (x Rᵀ − t) L with R Lᵀ = 1: what R reads of a token is set to t, and only L is written. No SAE.

    With L = R = v̂ᵀ, the normed difference of means, and t = v̂ · μ_nc: the projection off it. With those of LEACE (arXiv
    2306.03819) no linear classifier finds the concept.
    """
    return x - (x @ right_rd.T - target_r) @ left_rd
