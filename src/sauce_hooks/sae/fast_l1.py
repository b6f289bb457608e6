"""One step of L1 training in five matrix products instead of SAE-Lens's six, four of them sparse where z is.

SAE-Lens's trainer still makes the step. This gives it the loss and the gradients of `StandardTrainingSAE`. With
xc = x − b_dec, B rows in a batch, n_f = ‖W_dec,f‖₂ and s_f = Σ_b z_bf, the forward is

    z = relu(xc W_enc + b_enc)      x̂ = z W_dec + b_dec      e = x̂ − x
    mse = Σ e² / B                  l1 = α Σ_f n_f s_f / B

and, with R = 2e/B, differentiating by hand gives

    ∂b_dec = Σ_b R_b − W_enc ∂b_enc              ∂W_dec,f = (zᵀR)_f + α/B · s_f · W_dec,f / n_f
    ∂b_enc = Σ_b g_b                             g        = 1[z > 0] ⊙ (R W_decᵀ + α/B · n)
    ∂W_enc = xcᵀ g

Autograd also makes the product g W_encᵀ, [B, d], only to sum its rows into ∂b_dec; here the rows of g are summed first.
What is [B, D] is kept feature-major, as [D, B]: the products are faster so on a CPU, and rows of z that are never active
cost nothing where z is held sparse.

Under autocast the products take the same rounded factors as SAE-Lens's: xc, both weights, z and R are cast once each. What
is [B, D] then stays in that precision, where SAE-Lens holds h, z and g in float32; sums over rows, losses, e, x̂ and all
gradients are in the weights' own.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import StandardTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor
from torch.autograd.function import once_differentiable

_REPLACED = ("encode_with_hidden_pre", "process_sae_in", "decode", "calculate_aux_loss", "get_activation_fn")
"""What of SAE-Lens's class the step stands for, so that a subclass must not have changed it."""
_FUSED = ("cpu", "cuda", "mps")
"""Devices with an Adam in one kernel."""
_SAMPLE = 16
"""One in so many features is looked at to see how sparse a batch is."""


def _affine(w_Dd: Float[Tensor, "D d"], r_Bd: Float[Tensor, "B d"], bias_D: Float[Tensor, " D"]) -> Float[Tensor, "D B"]:
    """W Rᵀ + bias, in the factors' precision; the bias is not rounded before it is added."""
    if bias_D.dtype == w_Dd.dtype:
        return torch.addmm(bias_D[:, None], w_Dd, r_Bd.T)
    return (w_Dd @ r_Bd.T).add_(bias_D[:, None])


class _Dense:
    """Either of z and its gradient g, [B, D]: all its entries."""

    def __init__(self, value_DB: Float[Tensor, "D B"]) -> None:
        self.value_DB = value_DB

    def sum_over_rows(self, dtype: torch.dtype) -> Float[Tensor, " D"]:
        return self.value_DB.sum(1, dtype=dtype)

    def times(self, w_Dd: Float[Tensor, "D d"]) -> Float[Tensor, "B d"]:
        return self.value_DB.T @ w_Dd

    def transposed_times(self, r_Bd: Float[Tensor, "B d"]) -> Float[Tensor, "D d"]:
        return self.value_DB @ r_Bd

    def where_active(self, r_Bd: Float[Tensor, "B d"], w_Dd: Float[Tensor, "D d"], bias_D: Float[Tensor, " D"]) -> _Dense:
        """1[z > 0] ⊙ (R Wᵀ + bias), from z."""
        g_DB = _affine(w_Dd, r_Bd, bias_D)
        return _Dense(torch.ops.aten.threshold_backward.grad_input(g_DB, self.value_DB, 0, grad_input=g_DB))


class _Sparse:
    """The same by the entries where z > 0, feature by feature: entry i is in row `rows[i]` of feature `features[i]`."""

    def __init__(
        self,
        start_D1: Int[Tensor, " D1"],
        features: Int[Tensor, " nnz"],
        rows: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        n_rows: int,
    ) -> None:
        self.start_D1, self.features, self.rows, self.values, self.n_rows = start_D1, features, rows, values, n_rows

    @classmethod
    def of(cls, z_DB: Float[Tensor, "D B"]) -> _Sparse:
        n_features, n_rows = z_DB.shape
        at = z_DB.view(-1).nonzero().view(-1)
        start = torch.searchsorted(at, torch.arange(n_features + 1) * n_rows, out_int32=True)
        features = at.div(n_rows, rounding_mode="floor")
        return cls(start, features, (at - features * n_rows).int(), z_DB.view(-1)[at], n_rows)

    @property
    def n_features(self) -> int:
        return len(self.start_D1) - 1

    def _matrix(self, make: Any, *shape: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse C")  # "... tensor support is in beta state"
            return make(self.start_D1, self.rows, self.values, shape, check_invariants=False)

    def _csr_DB(self) -> Tensor:
        return self._matrix(torch.sparse_csr_tensor, self.n_features, self.n_rows)

    def sum_over_rows(self, dtype: torch.dtype) -> Float[Tensor, " D"]:
        return self.values.new_zeros(self.n_features, dtype=dtype).index_add_(0, self.features, self.values)

    def times(self, w_Dd: Float[Tensor, "D d"]) -> Float[Tensor, "B d"]:
        return self._matrix(torch.sparse_csc_tensor, self.n_rows, self.n_features).to_sparse_csr() @ w_Dd

    def transposed_times(self, r_Bd: Float[Tensor, "B d"]) -> Float[Tensor, "D d"]:
        out_Dd = r_Bd.new_empty(self.n_features, r_Bd.shape[1])
        return torch.addmm(out_Dd, self._csr_DB(), r_Bd, beta=0, out=out_Dd)  # without `out`, a copy more

    def where_active(self, r_Bd: Float[Tensor, "B d"], w_Dd: Float[Tensor, "D d"], bias_D: Float[Tensor, " D"]) -> _Sparse:
        values = torch.sparse.sampled_addmm(self._csr_DB(), w_Dd, r_Bd.T, beta=0).values() + bias_D[self.features]
        return _Sparse(self.start_D1, self.features, self.rows, values, self.n_rows)


_Code = _Dense | _Sparse


class _L1Objective(torch.autograd.Function):
    """(mse, l1) and x̂ from z, with the gradients of the module's docstring; x̂ and z carry none."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Bd: Float[Tensor, "B d"],
        xc_Bd: Float[Tensor, "B d"],
        W_enc: Float[Tensor, "d D"],
        b_enc: Float[Tensor, " D"],
        W_dec: Float[Tensor, "D d"],
        b_dec: Float[Tensor, " d"],
        z: _Code,
        alpha: float,
        b_dec_in_xc: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor_Dd = W_dec.to(xc_Bd.dtype)
        x_hat_Bd = z.times(factor_Dd) + b_dec
        error_Bd = x_hat_Bd - x_Bd
        norm_D, sum_D = W_dec.norm(dim=1), z.sum_over_rows(W_dec.dtype)
        ctx.save_for_backward(xc_Bd, W_enc, W_dec, factor_Dd, error_Bd, norm_D, sum_D)
        ctx.z, ctx.weight, ctx.b_dec_in_xc = z, alpha / len(x_Bd), b_dec_in_xc
        ctx.mark_non_differentiable(x_hat_Bd)
        return error_Bd.pow(2).sum(1).mean(), ctx.weight * (norm_D * sum_D).sum(), x_hat_Bd

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients, for any weights of the two losses."""
        g_mse, g_l1 = grads[:2]
        xc_Bd, W_enc, W_dec, factor_Dd, error_Bd, norm_D, sum_D = ctx.saved_tensors
        z: _Code = ctx.z
        R_Bd = error_Bd * (2 / len(error_Bd) * g_mse)
        alpha_per_row = ctx.weight * g_l1

        with _without_autocast(W_enc.device.type):
            factor_Bd = R_Bd.to(xc_Bd.dtype)
            g = z.where_active(factor_Bd, factor_Dd, alpha_per_row * norm_D)
            db_enc = g.sum_over_rows(W_enc.dtype)
            db_dec = R_Bd.sum(0)
            if ctx.b_dec_in_xc:
                db_dec = db_dec - W_enc @ db_enc
            dW_enc = torch.empty_like(W_enc).copy_(g.transposed_times(xc_Bd).T)
            del g
            radial_D = alpha_per_row * sum_D / norm_D.clamp_min(torch.finfo(norm_D.dtype).tiny)
            dW_dec = z.transposed_times(factor_Bd).to(W_dec.dtype).addcmul_(W_dec, radial_D[:, None])
        return None, None, dW_enc, db_enc, dW_dec, db_dec, None, None, None


class FastL1TrainingSAE(StandardTrainingSAE):
    """SAE-Lens's `StandardTrainingSAE`, its step faster and equal to it within rounding.

    What the five products do not cover goes SAE-Lens's own way: another p-norm than 1, its normalisations within the SAE,
    an SAE-Lens hook that is in use, and a subclass that changes encoding, decoding or a loss.

    The sparse products are for CPUs. On other devices the step is dense and reads nothing back to the host.
    """

    sparse_below: float = 0.05
    """The share of active entries of a batch under which its products are sparse. Decided anew for every batch, from
    that batch alone, so that a resumed training takes the same way as an unbroken one."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The loss of SAE-Lens's own forward pass. Gradients come through `loss` and `losses` only."""
        if not self.is_covered(step_input):
            return super().training_forward_pass(step_input)
        x_Bd = step_input.sae_in.detach().to(self.dtype)
        product_dtype = _product_dtype(self.W_enc)
        with _without_autocast(self.W_enc.device.type):
            with torch.no_grad():
                xc_Bd = self.process_sae_in(x_Bd).to(product_dtype)
                pre_DB = _affine(self.W_enc.T.to(product_dtype), xc_Bd, self.b_enc)
                z_DB = pre_DB.clamp_min(0)
                z = _Sparse.of(z_DB) if self._is_sparse(z_DB) else _Dense(z_DB)
            mse, l1, x_hat_Bd = _L1Objective.apply(  # pyright: ignore[reportGeneralTypeIssues] - torch leaves `apply` untyped
                x_Bd,
                xc_Bd,
                self.W_enc,
                self.b_enc,
                self.W_dec,
                self.b_dec,
                z,
                step_input.coefficients["l1"],
                self.cfg.apply_b_dec_to_input,
            )
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=x_hat_Bd,
            feature_acts=z_DB.T,
            hidden_pre=pre_DB.T,
            loss=mse + l1,
            losses={"mse_loss": mse, "l1_loss": l1},
        )

    def is_covered(self, step_input: TrainStepInput) -> bool:
        """Whether the five products are this SAE's step."""
        return (
            all(getattr(type(self), name) is getattr(StandardTrainingSAE, name) for name in _REPLACED)
            and self.mse_loss_fn is mse_loss
            and self.cfg.lp_norm == 1
            and self.cfg.normalize_activations in ("none", "expected_average_only_in", "covariance_whitening")
            and step_input.sae_in.ndim == 2
            and not any(hook.has_hooks() for hook in self.hook_dict.values())
        )

    def _is_sparse(self, z_DB: Float[Tensor, "D B"]) -> bool:
        if z_DB.device.type != "cpu" or z_DB.dtype not in (torch.float32, torch.float64):
            return False
        if not torch.backends.mkl.is_available():
            return False
        sample = z_DB[::_SAMPLE]
        return int(sample.count_nonzero()) < self.sparse_below * sample.numel()


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What autocast would make of a product with this weight; float64 it leaves alone."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def use_fused_adam(trainer: Any) -> None:
    """Have SAE-Lens's `SAETrainer` make its Adam step in one kernel, where its device has one.

    Before the first step and before `load_trainer_state`, which brings back what was saved, this choice included.
    """
    for group in trainer.optimizer.param_groups:
        group["fused"] = all(parameter.device.type in _FUSED for parameter in group["params"]) or None
