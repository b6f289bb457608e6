"""`ConceptEraser`: concepts in, a changed forward out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import ContextDecorator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.erasure.attach import Attachment, attach, check_ran, detach
from sauce_hooks.erasure.merging import FeatureEdit, merge_gammas
from sauce_hooks.errors import EditError, EraserStateError, SAEMismatchError
from sauce_hooks.hookpoint import HookPoint, find_hook_point
from sauce_hooks.sae import VisionSAE

if TYPE_CHECKING:
    from sae_lens import SAE

PAPER_GAMMA = -0.5
"""The paper's γ (Section 4.1)."""

ConceptLike = str | Concept | Sequence[int]


class ConceptEraser(ContextDecorator):
    """Makes a vision-language model forget concepts while it is on; no weight ever changes.

    ```python
    with ConceptEraser(model, sae, ["red", "tiger"]):
        model.generate(**inputs)
    ```

    Also a decorator, and `.attach()` / `.detach()` for as long as one likes. Erasers stack and merge (`a | b`) in any
    order with one and the same result; a feature that several of them name is edited once.

    Args:
        model: the Hugging Face model.
        sae: a `VisionSAE`, or a bare `sae_lens.SAE` together with `hook_point`.
        concepts: names in the bank, `Concept`s, or sequences of feature indices.
        gamma: the factor γ of Eq. 6 for every feature. None: each concept's own, and the paper's −0.5 where it has none.
        preserve_error: keep the SAE's reconstruction error, x′ = x + Σ (γ−1) z_i W_dec[i]. False is the paper to the
            letter, x′ = decode(C(z)), which puts the error of every token into the model.
        edit: "scale" (Eq. 6).
        hook_point: where, for a bare SAE; must agree with the one a `VisionSAE` carries.
        bank: where names are looked up, for a bare SAE; a `VisionSAE` brings its own.

    Raises:
        UnknownConceptError: a name the bank does not hold; lists the known ones and the nearest.
        SAEMismatchError: the SAE does not fit the hook point or the model.
        IneffectiveEraserError: on entering, if the edit cannot reach the language side; on leaving, if images went
            through the model and the edit never ran.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: VisionSAE | SAE[Any],
        concepts: Sequence[ConceptLike] | str,
        *,
        gamma: float | None = None,
        preserve_error: bool = True,
        edit: Literal["scale"] = "scale",
        hook_point: HookPoint | None = None,
        bank: ConceptBank | None = None,
    ) -> None:
        if edit != "scale":
            raise EditError(f"unknown edit {edit!r}; known: 'scale'")
        if not isinstance(sae, VisionSAE):
            if hook_point is None:
                raise SAEMismatchError(
                    "a bare SAE does not say where it belongs: give hook_point=sauce_hooks.find_hook_point(model), "
                    "or wrap it with VisionSAE.wrap(sae, hook_point)"
                )
            sae = VisionSAE.wrap(sae, hook_point)
        elif hook_point is not None and hook_point != sae.hook_point:
            raise SAEMismatchError(f"the SAE belongs to {sae.hook_point.path}, not to {hook_point.path}")
        _check_fits(model, sae)
        self.model, self.sae = model, sae
        known = sae.concepts if bank is None else sae.concepts | bank
        self.concepts = tuple(
            _resolve(concept, known) for concept in ([concepts] if isinstance(concepts, str) else concepts)
        )
        self.edit = FeatureEdit(
            sae=sae.sae,
            gammas=merge_gammas(_gammas(concept, gamma, sae.d_sae) for concept in self.concepts),
            preserve_error=preserve_error,
            tokens=sae.tokens.edit,
        )
        self._lock = threading.Lock()
        self._depth = 0
        self._attachment: Attachment | None = None

    @property
    def features(self) -> tuple[int, ...]:
        """Every feature that is edited, each once."""
        return tuple(self.edit.gammas)

    @property
    def attached(self) -> bool:
        """Whether it is on."""
        return self._attachment is not None

    def attach(self) -> ConceptEraser:
        """Turn it on until `detach`; the same as entering it."""
        with self._lock:
            if self._attachment is None:
                self._attachment = attach(self.model, self.sae.hook_point, self.edit)
            self._depth += 1
        return self

    def detach(self) -> None:
        """Turn it off; `IneffectiveEraserError` if images went through the model meanwhile and the edit never ran."""
        check_ran(self._release())

    def _release(self) -> Attachment:
        with self._lock:
            attachment = self._attachment
            if attachment is None:
                raise EraserStateError(f"{self!r} is not attached")
            self._depth -= 1
            if self._depth == 0:
                detach(attachment)
                self._attachment = None
        return attachment

    def __enter__(self) -> ConceptEraser:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        attachment = self._release()
        if error is None:  # an error of the block's own must not be hidden behind ours
            check_ran(attachment)

    def __or__(self, other: ConceptEraser) -> ConceptEraser:
        """One eraser for both erasers' concepts; both must be of the same model and SAE and agree on every shared γ."""
        if self.model is not other.model or self.sae is not other.sae:
            raise EditError("erasers of different models or SAEs cannot be merged; stack them with two `with`s instead")
        if self.edit.preserve_error != other.edit.preserve_error:
            raise EditError("one eraser keeps the reconstruction error and the other drops it")
        merged = ConceptEraser(self.model, self.sae, (), preserve_error=self.edit.preserve_error)
        merged.concepts = tuple(dict.fromkeys((*self.concepts, *other.concepts)))
        merged.edit = FeatureEdit(
            self.edit.sae,
            merge_gammas((self.edit.gammas, other.edit.gammas)),
            self.edit.preserve_error,
            self.edit.tokens,
        )
        return merged

    def __repr__(self) -> str:
        names = ", ".join(concept.name for concept in self.concepts)
        state = "on" if self.attached else "off"
        return f"ConceptEraser([{names}], {len(self.features)} features at {self.sae.hook_point.path}, {state})"


def _resolve(concept: ConceptLike, bank: ConceptBank) -> Concept:
    if isinstance(concept, str):
        return bank[concept]
    if isinstance(concept, Concept):
        return concept
    features = tuple(dict.fromkeys(int(feature) for feature in concept))
    return Concept(name=f"features {list(features)}", features=features)


def _gammas(concept: Concept, gamma: float | None, d_sae: int) -> dict[int, float]:
    outside = [feature for feature in concept.features if feature >= d_sae]
    if outside:
        raise EditError(
            f"{concept.name!r} names feature {outside[0]}, but this SAE has only {d_sae}: another SAE's concept?"
        )
    factor = next(g for g in (gamma, concept.gamma, PAPER_GAMMA) if g is not None)
    return dict.fromkeys(concept.features, factor)


def _check_fits(model: nn.Module, sae: VisionSAE) -> None:
    here = find_hook_point(model, sae.hook_point.path)
    if here.d_in != sae.d_in:
        raise SAEMismatchError(
            f"the SAE reads vectors of width {sae.d_in}, but {here.path} of this model is {here.d_in} wide. "
            "It was trained for another tower: train one for this model with sauce_hooks.train_sae(model, images)."
        )


def merge(erasers: Iterable[ConceptEraser]) -> ConceptEraser:
    """All erasers as one: `a | b | c`."""
    first, *rest = erasers
    for other in rest:
        first = first | other
    return first
