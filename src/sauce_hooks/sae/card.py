"""The model card of an SAE on the hub, from what is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sauce_hooks.bank.card import closing, code, concepts_section, escaped, front_matter, in_code, table

if TYPE_CHECKING:
    from sauce_hooks.sae.vision_sae import FeatureStats, VisionSAE

SAE_CARD = "<!-- sauce_hooks: card of an SAE -->"
_HEAD = ("what", "value")


def sae_card(sae: VisionSAE, repo_id: str, *, license: str | None = None) -> str:
    """README.md of a repository with an SAE and its bank.

    Args:
        sae: the SAE.
        repo_id: where it will lie.
        license: as the hub calls it; left out if nobody said.
    """
    some = next(iter(sae.concepts), None)
    use = ["import sauce_hooks", "", f"sae = sauce_hooks.VisionSAE.load({repo_id!r})"]
    if some is not None:
        use += [f"with sauce_hooks.ConceptEraser(model, sae, [{some!a}]):", "    model.generate(**inputs)"]
    parts = [
        front_matter(license, ["concept-erasure"]),
        SAE_CARD,
        "# Sparse autoencoder of a vision tower",
        "A sparse autoencoder (SAE) of one place in the vision encoder of a vision-language model, to erase named concepts "
        "from what the model sees.",
        "## What it is",
        table(_HEAD, list(_facts(sae))),
        "## Use",
        code(*use),
    ]
    if sae.stats is not None:
        parts += ["## Measured", table(_HEAD, list(_measured(sae.stats)))]
    return "\n\n".join([*parts, concepts_section(tuple(sae.concepts.values())), closing()]) + "\n"


def _facts(sae: VisionSAE) -> Iterator[tuple[str, str]]:
    place, tower = sae.hook_point, sae.tower
    yield "architecture", escaped(str(sae.sae.cfg.architecture()))
    yield "width of the residual stream (d_in)", f"{sae.d_in:,}"
    yield "features (d_sae)", f"{sae.d_sae:,}"
    yield "hook point", f"`{in_code(place.path)}`"
    yield "block", f"{place.layer} of 0 to {place.n_layers - 1}"
    yield "model family", escaped(place.family)
    yield "trained on tokens", escaped(str(sae.tokens.read))
    yield "edits tokens", escaped(str(sae.tokens.edit))
    for name in ("image_size", "patch_size"):
        size = getattr(tower, name, None)
        if size is not None:
            yield (
                f"tower's {name.replace('_', ' ')} (pixels)",
                " × ".join(map(str, size if isinstance(size, tuple) else (size,) * 2)),
            )
    record = sae.record()
    if record.tower is not None:
        yield "digest of the tower's record", f"`{record.tower}`"


def _measured(stats: FeatureStats) -> Iterator[tuple[str, str]]:
    yield "rows measured on", f"{stats.n_rows:,}"
    yield "explained variance", f"{stats.explained_variance:.4f}"
    yield "L0, mean features that fire on a row", f"{stats.l0:.2f}"
    yield "dead features", f"{stats.dead_share:.2%}"
    yield "dense features", f"{stats.dense_share:.2%}"
    loss = stats.loss_added
    if loss is not None:
        interval = f"({loss.added_low:.4f} to {loss.added_high:.4f})"
        yield "loss added by reconstructions (nats a token, 95% interval)", f"{loss.added:.4f} {interval}"
        recovered = f"({loss.recovered_low:.2%} to {loss.recovered_high:.2%})"
        yield "loss recovered (95% interval)", f"{loss.recovered:.2%} {recovered}"
        yield "loss measured on", f"{loss.n_images:,} images; answers: {escaped(loss.answers)}"
