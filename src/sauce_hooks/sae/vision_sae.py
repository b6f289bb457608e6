"""An SAE together with the place it belongs to and the concepts found in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sauce_hooks.bank import ConceptBank, SAERecord, hub
from sauce_hooks.bank.card import BANK_CARD
from sauce_hooks.bank.format import BANK_FILE, is_tensors_file
from sauce_hooks.errors import EditError, HookPointError, SAEFileError, SAEMismatchError
from sauce_hooks.hookpoint import (
    HookPoint,
    TokenPolicy,
    TowerRecord,
    default_policy,
    difference,
    find_hook_point,
    find_towers,
    unwrap,
)
from sauce_hooks.sae.card import SAE_CARD, sae_card
from sauce_hooks.sae.gallery import Gallery
from sauce_hooks.sae.provenance import record_sae

if TYPE_CHECKING:
    from sae_lens import SAE

FORMAT = 2
_RECORD, _STATS, _GALLERY = "vision_sae.json", "feature_stats.safetensors", "gallery.safetensors"
_OURS = frozenset({_RECORD, BANK_FILE, _STATS, _GALLERY, "cfg.json", "sae_weights.safetensors"})


DENSE_ABOVE = 0.1
"""A feature that fires on a larger share of the rows than this is dense: it hardly tells one row from another."""


@dataclass(frozen=True)
class LossAdded:
    """What the language model loses when the SAE's reconstructions take the place of activations.

    Losses are mean cross-entropies of an answer's token, in nats; intervals are 95%, from resampling the images.
    """

    original: float
    """Of the model as it is."""
    reconstructed: float
    """With reconstructions x̂ on the tokens that an eraser edits."""
    ablated: float
    """With the mean activation on all of these tokens: what a picture that says nothing costs."""
    added_low: float
    added_high: float
    recovered_low: float
    recovered_high: float
    n_images: int
    n_tokens: int
    """Tokens of all answers."""
    answers: str
    """Whose answers, in words; losses on different answers must not be compared."""

    @property
    def added(self) -> float:
        """Reconstructed − original."""
        return self.reconstructed - self.original

    @property
    def recovered(self) -> float:
        """Share of the loss of ablation that reconstructions save: 1 is as good as the activations themselves."""
        gap = self.ablated - self.original
        return (self.ablated - self.reconstructed) / gap if gap else float("nan")


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """How an SAE's features behave on rows: FS (Eq. 7) and FMAV (Eq. 8) of the paper's Section 4.2."""

    frequency_f: Float[Tensor, " d_sae"] = field(repr=False)
    """Feature sparsity FS, Eq. 7: the share of rows on which each feature fires (z ≠ 0)."""
    mean_when_active_f: Float[Tensor, " d_sae"] = field(repr=False)
    """FMAV, Eq. 8: each feature's mean activation over the rows on which it fires; 0 if it never does."""
    explained_variance: float
    """1 − ‖x − x̂‖² / ‖x − mean‖², over all rows."""
    l0: float
    """Mean number of features that fire on a row."""
    n_rows: int
    largest_f: Float[Tensor, " d_sae"] | None = field(default=None, repr=False)
    """Each feature's largest activation, max |z|; None in files that do not hold it."""
    loss_added: LossAdded | None = None
    """None if it was not measured."""

    @property
    def dead_share(self) -> float:
        """Share of the features that never fired."""
        return float((self.frequency_f == 0).float().mean())

    @property
    def dense_share(self) -> float:
        """Share of the features that fire on more than `DENSE_ABOVE` of the rows."""
        return float((self.frequency_f > DENSE_ABOVE).float().mean())


@dataclass
class VisionSAE:
    """A sparse autoencoder of one hook point.

    Raises:
        SAEMismatchError: the SAE reads vectors of another width than the hook point's.
    """

    sae: SAE[Any]
    """SAE-Lens's own object, for inference."""
    hook_point: HookPoint
    tokens: TokenPolicy = field(default_factory=TokenPolicy)
    """Which tokens it was trained on and which an eraser edits."""
    concepts: ConceptBank = field(default_factory=ConceptBank)
    stats: FeatureStats | None = None
    tower: TowerRecord | None = None
    """The tower it was trained on, by which a wrong one is refused; None if nobody recorded it."""
    gallery: Gallery | None = None
    """The images that make its features fire most, as `describe_features` finds them. Saved and uploaded with the rest:
    set it to None to keep the pictures to yourself."""

    def __post_init__(self) -> None:
        if self.d_in != self.hook_point.d_in:
            raise SAEMismatchError(
                f"the SAE reads vectors of width {self.d_in}, but {self.hook_point.path} is {self.hook_point.d_in} wide. "
                "It was trained for another tower: train one for this model with sauce_hooks.train_sae(model, images)."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "concepts" and isinstance(value, ConceptBank) and value.sae is not None:
            value.require(self.record())
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: an SAE-Lens SAE holds functions that cannot be pickled, its settings and weights can."""
        return {**vars(self), "sae": (self.sae.cfg.to_dict(), self.sae.state_dict(), self.sae.training)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from sae_lens import SAE

        config, weights, training = state.pop("sae")
        sae = SAE.from_dict(config)
        sae.load_state_dict(weights)
        vars(self).update(state, sae=sae.train(training))

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return int(self.sae.cfg.d_in)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.sae.cfg.d_sae)

    def record(self) -> SAERecord:
        """What is remembered of this SAE in a bank of its concepts, to refuse that bank beside another SAE."""
        return record_sae(self.sae, self.hook_point, self.tower)

    @classmethod
    def wrap(
        cls, sae: SAE[Any], hook_point: HookPoint, tokens: TokenPolicy | None = None, *, model: Any = None
    ) -> VisionSAE:
        """An SAE trained elsewhere, at a hook point; `SAEMismatchError` if the widths differ.

        With the `model` it was trained on at hand, its tower is remembered and other towers are refused later.
        """
        record = None if model is None else hook_point.record(model)
        return cls(sae, hook_point, tokens or default_policy(hook_point), tower=record)

    def locate(self, model: Any, *, allow_mismatch: bool = False) -> HookPoint:
        """The place in a model that this SAE belongs to; also in another model around the same tower.

        Args:
            model: any model with a vision tower.
            allow_mismatch: take the place even if the tower is another one, as long as it is as wide.

        Raises:
            SAEMismatchError: the tower's weights, layer, resolution or token layout are not those it was trained on.
            HookPointError: the model has no vision tower.
        """
        candidates = self._candidates(model)
        problems = [self._mismatch(model, place) for place in candidates]
        fits = problems.index(None) if None in problems else 0
        here, problem = candidates[fits], problems[fits]
        if here.d_in != self.d_in or (problem and not allow_mismatch):
            raise SAEMismatchError(
                f"this SAE does not belong to {here.path} of {type(unwrap(model)).__name__}: {problem}. Used there it would "
                "damage whatever the model sees. Train one for this model with sauce_hooks.train_sae(model, images)"
                + ("." if here.d_in != self.d_in else ", or say allow_mismatch=True.")
            )
        return here

    def _candidates(self, model: Any) -> list[HookPoint]:
        """Its own place; or, in a model that has no such path, the same block of each tower: it may stand elsewhere."""
        try:
            return [find_hook_point(model, self.hook_point.path)]
        except HookPointError:
            layer = self.hook_point.layer
            paths = [tower.blocks[layer][0] for tower in find_towers(unwrap(model)) if layer < len(tower.blocks)]
            if not paths:
                raise
            return [find_hook_point(model, path) for path in paths]

    def _mismatch(self, model: Any, here: HookPoint) -> str | None:
        if here.d_in != self.d_in:
            return f"it reads vectors of width {self.d_in}, and they are {here.d_in} wide"
        then, now = self.hook_point.layout, here.layout
        if (then.class_token, then.registers) != (now.class_token, now.registers):
            class_tokens = [f"{layout.class_token} with {layout.registers} registers" for layout in (now, then)]
            return f"the class token is {class_tokens[0]}, not {class_tokens[1]}"
        if self.tower is not None:
            return difference(self.tower, here.record(model))
        if here.path != self.hook_point.path:
            return f"its place is {self.hook_point.path}, and no record of its tower says that this is the same"
        return None

    @torch.no_grad()
    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations z (Eq. 1), in the SAE's dtype."""
        return self.sae.encode(acts.to(self.sae.device, self.sae.dtype))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction x̂ (Eq. 2)."""
        return self.sae.decode(z)

    def save(self, folder: str | Path) -> None:
        """Write a folder that `VisionSAE.load` and `sae_lens.SAE.load_from_disk` both read; whole or not at all.

        Raises:
            SAEMismatchError: the concepts were found in another SAE.
            EditError: a concept cannot be saved; says which and why.
        """
        concepts = self.concepts.of(self.record())
        folder = Path(folder).resolve()  # a link stays one, and what it leads to is replaced
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            self.sae.save_model(building)
            record: dict[str, Any] = {
                "format": FORMAT,
                "hook_point": self.hook_point.to_dict(),
                "tokens": asdict(self.tokens),
                "tower": None if self.tower is None else self.tower.to_dict(),
            }
            if self.stats is not None:
                record["stats"] = _save_stats(self.stats, building / _STATS)
            if self.gallery is not None:
                self.gallery.save(building / _GALLERY)
            (building / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
            concepts.save(building)
            for file in building.iterdir():
                file.chmod(0o644)  # safetensors' are for their owner alone, and an SAE is trained once for many
            _replace_folder(building, folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        hook_point: HookPoint | None = None,
        tokens: TokenPolicy | None = None,
        allow_pickle: bool = False,
    ) -> VisionSAE:
        """Read a folder that `save` wrote, or download one from the Hugging Face hub by its id.

        Also reads what other packages save (`sae.foreign` lists them), which does not say where it belongs.

        Args:
            source: a folder, a file of another package, or an id on the hub.
            hook_point: where the SAE of another package belongs.
            tokens: the tokens that one was trained on and an eraser edits.
            allow_pickle: also read pickled modules; their code is never run.

        Raises:
            SAEFileError: it is damaged, or of no known format; says what is wrong.
            SAEMismatchError: its concepts were found in another SAE.
        """
        folder = Path(source)
        if not folder.exists():
            folder = hub.download(str(source), ["*.json", "*.safetensors", "*.pt"])
        if not (folder / _RECORD).is_file():
            return cls._load_foreign(folder, hook_point, tokens, allow_pickle)
        if hook_point is not None or tokens is not None:
            raise SAEFileError(
                f"{folder} says itself where it belongs and which tokens it is for: leave hook_point and tokens out"
            )
        for name in (_RECORD, BANK_FILE, "cfg.json", "sae_weights.safetensors"):
            if not (folder / name).is_file():
                raise SAEFileError(f"{folder} is no saved VisionSAE: it has no {name}")
        from sae_lens import SAE

        try:
            record = cast(dict[str, Any], json.loads((folder / _RECORD).read_text()))
            if record["format"] != FORMAT:
                raise SAEFileError(f"{folder} is of format {record['format']}; this version reads {FORMAT}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sae = SAE.load_from_disk(folder)
            stats = _load_stats(record["stats"], folder / _STATS, int(sae.cfg.d_sae)) if "stats" in record else None
            gallery = Gallery.load(folder / _GALLERY, int(sae.cfg.d_sae)) if (folder / _GALLERY).is_file() else None
            hook_point = HookPoint.from_dict(record["hook_point"])
            tokens = TokenPolicy(**record["tokens"])
            tower = None if record["tower"] is None else TowerRecord.from_dict(record["tower"])
        except (SafetensorError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError, OSError) as problem:
            if isinstance(problem, SAEFileError):
                raise
            raise SAEFileError(f"{folder} is damaged or foreign: {problem!r}") from problem
        loaded = cls(sae.eval(), hook_point, tokens, stats=stats, tower=tower, gallery=gallery)
        try:
            loaded.concepts = ConceptBank.load(folder / BANK_FILE).of(loaded.record())
        except EditError as problem:
            raise SAEFileError(f"{folder / BANK_FILE} does not belong to this SAE: {problem}") from problem
        return loaded

    @classmethod
    def _load_foreign(
        cls, path: Path, hook_point: HookPoint | None, tokens: TokenPolicy | None, allow_pickle: bool
    ) -> VisionSAE:
        from sauce_hooks.sae.foreign import format_of, read_foreign

        sae = read_foreign(path, allow_pickle=allow_pickle)
        if hook_point is None:
            raise SAEFileError(
                f"{path} is no saved VisionSAE but of the format {format_of(path)!r}, which does not say where it "
                "belongs: give hook_point=sauce_hooks.find_hook_point(model)"
            )
        if sae.cfg.metadata.transcoder:
            raise SAEMismatchError(f"{path} is a transcoder: it reads one place and predicts another; it cannot edit")
        return cls.wrap(sae.eval(), hook_point, tokens)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, private: bool = False) -> str:
        """Upload to the Hugging Face hub with a model card; returns the address. `VisionSAE.load(repo_id)` reads it back.

        Args:
            repo_id: as on the hub, "name/of-it". A README.md there that was not written here stays.
            license: as the hub calls it, such as "mit"; yours to choose.
            private: if the repository has yet to be made.
        """
        card = sae_card(self, repo_id, license=license)
        return hub.upload(repo_id, self.save, card, replaces=(SAE_CARD, BANK_CARD), private=private)


def _save_stats(stats: FeatureStats, path: Path) -> dict[str, Any]:
    """Write the tensors; what remains is returned for the record."""
    tensors = {"frequency": stats.frequency_f, "mean_when_active": stats.mean_when_active_f}
    if stats.largest_f is not None:
        tensors["largest"] = stats.largest_f
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)
    record: dict[str, Any] = {k: getattr(stats, k) for k in ("explained_variance", "l0", "n_rows")}
    if stats.loss_added is not None:
        record["loss_added"] = asdict(stats.loss_added)
    return record


def _load_stats(record: dict[str, Any], path: Path, d_sae: int) -> FeatureStats:
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.shape != (d_sae,):
            raise SAEFileError(f"{path}: {name} has shape {tuple(tensor.shape)}, and the SAE has {d_sae} features")
    loss = record.get("loss_added")
    return FeatureStats(
        frequency_f=tensors["frequency"],
        mean_when_active_f=tensors["mean_when_active"],
        largest_f=tensors.get("largest"),
        explained_variance=float(record["explained_variance"]),
        l0=float(record["l0"]),
        n_rows=int(record["n_rows"]),
        loss_added=None if loss is None else LossAdded(**{f.name: _KINDS[f.type](loss[f.name]) for f in fields(LossAdded)}),
    )


_KINDS: dict[Any, Any] = {"float": float, "int": int, "str": str}


def _replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an old one."""
    new.chmod(0o755)
    if not target.exists():
        new.rename(target)
        return
    if any(target.iterdir()) and not (target / _RECORD).exists() and not (target / "training").exists():
        raise SAEFileError(f"{target} exists and is no VisionSAE; refusing to replace it")
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    aside = scratch / target.name
    try:
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(aside, target)
            raise
        for item in aside.iterdir():  # what else lies there stays: a model card, checkpoints of an unfinished training
            if item.name not in _OURS and not is_tensors_file(item.name):
                shutil.move(item, target / item.name)
    finally:
        if target.exists():  # else the old folder is in there, and the only one there is
            shutil.rmtree(scratch)
