"""A preset's SAE before training and after it: SAE-Lens's training class, and from it SAE-Lens's inference class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.errors import PresetError
from sauce_hooks.sae.presets import Preset

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE

_DECIDED = frozenset({"d_in", "d_sae", "device", "normalize_activations", "reshape_activations", "metadata"})
"""Fields of an SAE-Lens config that the hook point, the preset's other fields or the model decide."""
_MATRYOSHKA_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""How much of d_sae each nested dictionary takes where a preset names no widths: those of Bussmann et al., arXiv
2503.17547, at their 65,536 features."""


def build(recipe: Preset, d_in: int) -> TrainingSAE[Any]:
    """The training SAE of a preset for rows of width `d_in`, freshly initialised from torch's global random state.

    Raises:
        PresetError: SAE-Lens has no such architecture, or that one no such option, or will not have its value.
    """
    sae_class, config_class = _training_classes(recipe.architecture)
    d_sae = d_in * recipe.expansion
    known = [field.name for field in fields(config_class) if field.name not in _DECIDED]
    unknown = sorted(set(recipe.options) - set(known))
    if unknown:
        raise PresetError(
            f"no option {', '.join(map(repr, unknown))} of the architecture {recipe.architecture!r}; its options: "
            f"{', '.join(known)}"
        )
    # SAE-Lens keeps a list that it is given, and appends to it.
    options = {**_defaults(recipe.architecture, d_sae), **copy.deepcopy(dict(recipe.options))}
    try:
        config = config_class(d_in=d_in, d_sae=d_sae, **options)
        sae = sae_class(config)
    except (ValueError, TypeError, AssertionError) as problem:
        raise PresetError(f"SAE-Lens refuses these options of {recipe.architecture!r}: {problem}") from problem
    if recipe.architecture == "topk" and config.use_sparse_activations and config.rescale_acts_by_decoder_norm:
        # torch has no gradient of SAE-Lens's product of sparse activations and norms; it would fail in the first step.
        raise PresetError(
            "use_sparse_activations of 'topk' can't be trained with rescale_acts_by_decoder_norm: set that to False"
        )
    k = getattr(config, "k", 1)
    if not 0 < k <= d_sae:
        raise PresetError(
            f"k={k} features of {d_sae} (expansion {recipe.expansion} of {d_in}) can't fire: choose 0 < k ≤ d_sae"
        )
    return sae


def _training_classes(architecture: str) -> tuple[type[Any], type[Any]]:
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAEConfig,
        StandardTrainingSAEConfig,
    )
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    from sauce_hooks.sae.batchtopk import FromFirstBatchTopKTrainingSAE, FromFirstMatryoshkaTrainingSAE
    from sauce_hooks.sae.fast_l1 import FastL1TrainingSAE
    from sauce_hooks.sae.objective import SauceTrainingSAE, SauceTrainingSAEConfig

    classes: Mapping[str, tuple[type[Any], type[Any]]] = {
        **SAE_TRAINING_CLASS_REGISTRY,
        "batchtopk": (FromFirstBatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "matryoshka_batchtopk": (FromFirstMatryoshkaTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
        "standard": (FastL1TrainingSAE, StandardTrainingSAEConfig),
        "sauce": (SauceTrainingSAE, SauceTrainingSAEConfig),
    }
    if architecture not in classes:
        raise PresetError(f"no architecture {architecture!r} to train; there are: {', '.join(sorted(classes))}")
    return classes[architecture]


def _defaults(architecture: str, d_sae: int) -> dict[str, Any]:
    """Options that SAE-Lens wants and gives no usable default for."""
    if architecture == "matching_pursuit":
        return {"decoder_init_norm": 1.0}  # any other is changed to this, with a warning
    if architecture == "matryoshka_batchtopk":
        return {"matryoshka_widths": sorted({max(1, round(share * d_sae)) for share in _MATRYOSHKA_SHARES})}
    return {}


@torch.no_grad()
def settle_threshold(trained: TrainingSAE[Any], read_rows: Callable[[], Float[Tensor, "n d_in"]], batch_size: int) -> None:
    """What BatchTopK's threshold is for the weights as they ended; training has averaged over those of the last 100 steps.

    Args:
        trained: an SAE of any architecture; one without such a threshold is left alone.
        read_rows: gives rows as it was trained on them, of many images; called only if they are needed. Less than a batch
            changes nothing.
        batch_size: rows of a batch.
    """
    from sauce_hooks.sae.batchtopk import FromFirstBatchTopKTrainingSAE

    if not isinstance(trained, FromFirstBatchTopKTrainingSAE):
        return
    rows_nd = read_rows()
    if len(rows_nd) < batch_size:
        return
    order = torch.randperm(len(rows_nd), generator=torch.Generator().manual_seed(0)).to(rows_nd.device)
    trained.topk_threshold.zero_()
    trained.n_threshold_updates.zero_()
    for rows_bd in rows_nd[order].split(batch_size)[: len(rows_nd) // batch_size]:
        trained.update_topk_threshold(trained.encode_with_hidden_pre(rows_bd.to(trained.dtype))[0])


@torch.no_grad()
def for_inference(trained: TrainingSAE[Any], scale: float) -> SAE[Any]:
    """SAE-Lens's inference class with the trained weights, for rows that are not scaled; the training SAE stays as it is.

    On x it does what the training SAE did on `scale` · x: the same features fire, and the reconstruction is `scale` times
    smaller. BatchTopK and its Matryoshka form become JumpReLU at their running threshold, as in SAE-Lens's own saving.
    Decoder rows come out at norm one wherever that leaves the SAE's function alone, so that activations are in the units
    of the residual stream.

    Args:
        trained: an SAE that `build` made.
        scale: what its rows were multiplied with in training.
    """
    from sae_lens import SAE

    weights = trained.state_dict()
    trained.process_state_dict_for_saving_inference(weights)
    # On "meta" nothing is drawn to initialise weights that are given, and the global random state stays as it was.
    sae: SAE[Any] = SAE.from_dict({**trained.cfg.get_inference_sae_cfg_dict(), "device": "meta"})
    sae.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    sae.to(device=trained.device, dtype=trained.dtype).eval()
    architecture = sae.cfg.architecture()
    if architecture == "jumprelu":
        # Training brings thresholds back to zero before each step; after the last one nothing has.
        sae.get_parameter("threshold").clamp_min_(0)
    # After the conversion: folded into a BatchTopK training SAE, older SAE-Lens rescales the weights but not the threshold.
    sae.fold_activation_norm_scaling_factor(scale)
    if architecture == "matching_pursuit":
        # W_enc is W_decᵀ, so the two foldings have cancelled, which is right: the pursuit scales with its input. But it
        # stops at a residual norm, which is in the units of the input. The newest SAE-Lens folds it too, others do not.
        sae.cfg.residual_threshold = trained.cfg.residual_threshold / scale
    elif architecture in ("topk", "abstopk"):
        if sae.cfg.rescale_acts_by_decoder_norm:
            sae.fold_W_dec_norm()
            sae.cfg.rescale_acts_by_decoder_norm = False  # by a norm that now is one
    else:
        sae.fold_W_dec_norm()
    return sae
