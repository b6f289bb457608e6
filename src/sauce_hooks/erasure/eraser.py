"""`ConceptEraser`: concepts in, a changed forward out."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, get_args, overload

from sauce_hooks.bank import Concept, ConceptBank, Projection, expanded
from sauce_hooks.erasure.apply import edit_output
from sauce_hooks.erasure.attach import attach, attachments, check_ran, check_read, detach
from sauce_hooks.erasure.attachment import Attachment, Scope
from sauce_hooks.erasure.decorate import decorated
from sauce_hooks.erasure.merging import Edit, merge_edits
from sauce_hooks.erasure.rules import EDITS, Rules, merge_rules
from sauce_hooks.erasure.several import Erasers
from sauce_hooks.erasure.status import EraserStatus, status_of
from sauce_hooks.errors import EditError, EraserStateError, SAEMismatchError
from sauce_hooks.hookpoint import HookPoint, unwrap
from sauce_hooks.sae import VisionSAE

if TYPE_CHECKING:
    from sae_lens import SAE

PAPER_GAMMA = -0.5
"""The paper's γ (Section 4.1)."""
PROJECT = "project"
"""The edit that needs no feature: `Concept.projection`."""

ConceptLike = str | Concept | Sequence[int]

P = ParamSpec("P")
R = TypeVar("R")


class ConceptEraser:
    """Makes a vision-language model forget concepts while it is on; no weight ever changes.

    ```python
    with ConceptEraser(model, sae, ["red", "tiger"]):
        model.generate(**inputs)
    ```

    Also a decorator (of functions, generators and coroutines), and `.attach()` / `.detach()` for as long as one likes.
    Erasers stack and merge (`a | b`) in any order with one and the same result; a feature that several of them name is
    edited once.

    Args:
        model: the Hugging Face model, bare or wrapped (PEFT, nnsight, `TransformerBridge`, `torch.compile`, DDP).
        sae: a `VisionSAE`, or a bare `sae_lens.SAE` together with `hook_point`.
        concepts: names of concepts or groups in the bank, `Concept`s, or sequences of feature indices.
        gamma: the factor γ of Eq. 6 for every feature. None: each concept's own, and the paper's −0.5 where it has none.
        preserve_error: keep the SAE's reconstruction error, x′ = x + Σ (γ−1) z_i W_dec[i]. False is the paper to the
            letter, x′ = decode(C(z)), which puts the error of every token into the model.
        edit: how. "scale": z′ = γ z (Eq. 6). "gated": only where z is above its mean, by factors in proportion to what each
            feature does on the concept (SAeUron). "clamp": there z′ = γ μ_c (Dynamic SAE Guardrails). "replace": there the
            token becomes another one of its image (PER). "project": no feature, the concept's dense projection instead.
            None: each concept's own, and "scale" where it has none.
        scope: "model" erases whatever goes through the model while it is on, in every thread (so that `generate` in a thread
            of its own, as streaming has it, is erased too). "task" erases only what the thread or asyncio task that entered
            it runs, and what is started with its context (`asyncio.to_thread`, `contextvars.copy_context().run`).
        hook_point: where, for a bare SAE; must agree with the one a `VisionSAE` carries.
        bank: where names are looked up, for a bare SAE; a `VisionSAE` brings its own.
        allow_mismatch: erase although the SAE was trained on another tower (other weights, layer or resolution). What comes
            out is damaged, as the paper's Table 4 shows.
        allow_bypass: erase although the language side also reads what this edit does not reach: an earlier block, or a
            second vision tower. The erasure is then a partial one.

    Raises:
        UnknownConceptError: a name the bank does not hold; lists the known ones and the nearest.
        SAEMismatchError: the SAE does not fit the model, or was trained on another tower.
        HookPointError: the model has no vision tower.
        IneffectiveEraserError: on entering, in the first forward, or on leaving: the edit does not, or did not, take effect.
        EditError: there is no such edit or scope, or the concepts and the edit do not go together.
    """

    def __init__(
        self,
        model: Any,
        sae: VisionSAE | SAE[Any],
        concepts: Sequence[ConceptLike] | str,
        *,
        gamma: float | None = None,
        preserve_error: bool = True,
        edit: str | None = None,
        scope: Scope = "model",
        hook_point: HookPoint | None = None,
        bank: ConceptBank | None = None,
        allow_mismatch: bool = False,
        allow_bypass: bool = False,
    ) -> None:
        if edit not in (None, PROJECT, *EDITS):
            raise EditError(f"unknown edit {edit!r}; known: {', '.join(map(repr, (*EDITS, PROJECT)))}")
        if scope not in get_args(Scope):
            raise EditError(f"unknown scope {scope!r}; known: {', '.join(map(repr, get_args(Scope)))}")
        if not isinstance(sae, VisionSAE):
            if hook_point is None:
                raise SAEMismatchError(
                    "a bare SAE does not say where it belongs: give hook_point=sauce_hooks.find_hook_point(model), "
                    "or wrap it with VisionSAE.wrap(sae, hook_point)"
                )
            sae = VisionSAE.wrap(sae, hook_point)
        elif hook_point is not None and hook_point != sae.hook_point:
            raise SAEMismatchError(f"the SAE belongs to {sae.hook_point.path}, not to {hook_point.path}")
        self.model, self.sae = model, sae
        self.hook_point = sae.locate(model, allow_mismatch=allow_mismatch)
        self.scope: Scope = scope
        self.allow_bypass = allow_bypass
        if bank is not None and bank.sae is not None:
            bank.require(sae.record())
        self._bank = sae.concepts if bank is None else sae.concepts | bank
        self._gamma, self._preserve_error, self._kind = gamma, preserve_error, edit
        self.concepts = self._resolve([concepts] if isinstance(concepts, str) else concepts)
        self.edit = self._edit(self.concepts)
        self.rows: tuple[tuple[Concept, ...], ...] | None = None
        """The concepts of each row of a batch, if this is an eraser for rows."""
        self._row_edits: tuple[Edit, ...] | None = None
        self._sizes: tuple[int, ...] | None = None
        self._lock = threading.Lock()
        self._attachments: tuple[Attachment, ...] = ()
        self._astray = 0
        """How many were left in a context that had not entered them: a generator that somebody else closed."""

    @property
    def features(self) -> tuple[int, ...]:
        """Every feature that is edited, each once."""
        edits = (self.edit, *(self._row_edits or ()))
        return tuple(dict.fromkeys(feature for edit in edits for feature in edit.rules))

    @property
    def attached(self) -> bool:
        """Whether it is on."""
        return bool(self._attachments)

    def status(self) -> EraserStatus:
        """What is attached where, with which features, and whether it took effect so far. Prints as a small table."""
        return status_of(self)

    # On and off. ------------------------------------------------------------------------------------------------------

    def attach(self) -> ConceptEraser:
        """Turn it on until `detach`; the same as entering it. On twice needs off twice."""
        attachment = attach(
            self.model,
            self.hook_point,
            self.edit,
            rows=self._row_edits,
            sizes=self._sizes,
            scope=self.scope,
            allow_bypass=self.allow_bypass,
        )
        with self._lock:
            self._attachments = (*self._attachments, attachment)
        return self

    def detach(self) -> None:
        """Turn it off; `IneffectiveEraserError` if images went through the model meanwhile and the edit never ran."""
        released = self._release()
        if released is not None:
            check_ran(released)

    def _release(self) -> Attachment | None:
        with self._lock:
            if not self._attachments:
                raise EraserStateError(f"{self!r} is not attached")
            # One that this task has put on, if there is one: with scope="task" another task's must stay.
            mine = [a for a in self._attachments if a.is_of_this_task]
            if self.scope == "task" and not mine and len(self._attachments) > self._astray + 1:
                self._astray += 1  # which one is not to be known; it has no effect, and goes when the others have gone
                return None
            released = (mine or self._attachments)[-1]
            rest = tuple(a for a in self._attachments if a is not released)
            astray = rest if len(rest) <= self._astray else ()
            self._attachments, self._astray = ((), 0) if astray else (rest, self._astray)
        for attachment in (released, *astray):
            detach(attachment)
        return released

    def __enter__(self) -> ConceptEraser:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        attachment = self._release()
        if error is None and attachment is not None:  # an error of the block's own must not be hidden behind ours
            check_ran(attachment)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: on while the function runs; for generators and coroutines, while their body does."""
        return cast(Callable[P, R], functools.wraps(function)(decorated(self, function)))

    def intervene(self, traced: Any) -> None:
        """The same edit inside an nnsight trace, or in `nm.edit(inplace=True)` for all later ones; hooks play no part.

        ```python
        with nm.trace(**inputs):
            eraser.intervene(nm)
            logits = nm.output.logits.save()
        ```

        Raises:
            EraserStateError: an eraser is on at this place already, which would be edited twice.
            IneffectiveEraserError: the language side does not read this place.
        """
        block = traced.get(self.hook_point.path)
        attachment = Attachment(self.hook_point, self.edit, self._row_edits, self._sizes, allow_bypass=self.allow_bypass)
        check_read(attachment)
        if any(a.hook_point.path == self.hook_point.path for a in attachments(traced)):
            raise EraserStateError(
                f"an eraser is on at {self.hook_point.path}, and what it edits would be edited once more in the trace: use "
                "one way or the other"
            )
        block.output = edit_output([attachment], block.output)

    def bake(self, *, copy: bool = True, verify: Mapping[str, Any] | None = None) -> Any:
        """A model that carries this erasure as a part of itself, with no hook and nothing to turn off; see docs/lasting.md.

        Args:
            copy: a second model that shares the weights' memory; False: this model, for good.
            verify: model inputs with an image; the baked model must give what the eraser gives on them, or it is refused.

        Raises:
            EditError: an eraser for rows.
            IneffectiveEraserError: on `verify` the baked model gives something else.
        """
        from sauce_hooks.erasure.bake import bake

        return bake(self, copy=copy, verify=verify)

    # Combining. -------------------------------------------------------------------------------------------------------

    def for_rows(self, rows: Sequence[Sequence[ConceptLike] | str], *, sizes: Sequence[int] | None = None) -> ConceptEraser:
        """An eraser of this kind for a batch whose rows forget different concepts, `[["red"], [], ["tiger"]]`.

        The concepts of this eraser itself play no part: each row forgets what its entry says and nothing else. Beams and
        `num_return_sequences` repeat rows, and each repetition forgets what its row does.

        Args:
            rows: the concepts of each row of text, as `ConceptEraser` takes them.
            sizes: how many images each row has (counting tiles and frames, or patches where the tower packs them). None: as
                follows from the batch; where it does not, the forward raises `EditError` and nothing is generated.

        Raises:
            EditError: no rows, or sizes that are not one a row.
            UnknownConceptError: a name the bank does not hold.
        """
        if sizes is not None and (len(sizes) != len(rows) or any(size < 0 for size in sizes) or not any(sizes)):
            raise EditError(f"sizes {list(sizes)} are not those of {len(rows)} rows")
        if not rows:
            raise EditError("no rows: give the concepts of every row of the batch, [] for a row that forgets nothing")
        copied = self._copy()
        copied.rows = tuple(self._resolve([row] if isinstance(row, str) else row) for row in rows)
        copied._row_edits = tuple(self._edit(row) for row in copied.rows)
        copied._sizes = None if sizes is None else tuple(sizes)
        copied.concepts, copied.edit = (), self._edit(())
        return copied

    @overload
    def __or__(self, other: Erasers) -> Erasers: ...
    @overload
    def __or__(self, other: ConceptEraser) -> Any: ...  # a ConceptEraser if of the same SAE, else Erasers
    def __or__(self, other: ConceptEraser | Erasers) -> ConceptEraser | Erasers:
        """One eraser for both erasers' concepts; of two SAEs, `Erasers` that are on and off together."""
        if isinstance(other, Erasers) or self.sae is not other.sae:
            return Erasers((self, other))
        if unwrap(self.model) is not unwrap(other.model):
            raise EditError("erasers of different models cannot be merged; enter each for itself")
        if self._preserve_error != other._preserve_error:
            raise EditError("one eraser keeps the reconstruction error and the other drops it")
        if self.scope != other.scope:
            raise EditError(f"one eraser is for the {self.scope} and the other for the {other.scope}; stack them instead")
        if self.rows and other.rows and (len(self.rows) != len(other.rows) or self._sizes != other._sizes):
            raise EditError(
                f"erasers for {len(self.rows)} and {len(other.rows)} rows, or rows of other sizes, cannot be merged"
            )
        copied = self._copy()
        copied._bank = self._bank | other._bank
        copied.allow_bypass = self.allow_bypass and other.allow_bypass
        copied.concepts = tuple(dict.fromkeys((*self.concepts, *other.concepts)))
        copied.edit = merge_edits((self.edit, other.edit))
        if self.rows and other.rows:
            both = zip(self.rows, other.rows, strict=True)
            copied.rows = tuple(tuple(dict.fromkeys((*mine, *theirs))) for mine, theirs in both)
            edits = zip(self._row_edits or (), other._row_edits or (), strict=True)
            copied._row_edits = tuple(merge_edits(pair) for pair in edits)
        elif other.rows:
            copied.rows, copied._row_edits, copied._sizes = other.rows, other._row_edits, other._sizes
        return copied

    def _copy(self) -> ConceptEraser:
        return copy.copy(self)

    def _resolve(self, concepts: Sequence[ConceptLike]) -> tuple[Concept, ...]:
        return tuple(_resolve(concept, self._bank) for concept in expanded(concepts, self._bank.groups))

    def _edit(self, concepts: Iterable[Concept]) -> Edit:
        nothing = Edit(self.sae.tokens.edit, self.sae.sae, preserve_error=self._preserve_error)
        return merge_edits([nothing, *(self._edit_of(concept, nothing) for concept in concepts)])

    def _edit_of(self, concept: Concept, nothing: Edit) -> Edit:
        kind = self._kind or concept.edit or "scale"
        if kind == PROJECT:
            return replace(nothing, projections=(_projection(concept, self.sae.d_in),), keep_norm=concept.keep_norm)
        rules = _rules(concept, kind, self._gamma, self.sae.d_sae)
        mixed = self.hook_point.layout.shape == "packed" or self.hook_point.place == "language"
        if mixed and any(rule.share or rule.replace for of_feature in rules.values() for rule in of_feature):
            raise EditError(
                f"the edit {kind!r} of {concept.name!r} looks at all tokens of an image, but {self.hook_point.path} has "
                "more than one image, or text too, in a row, and cannot tell one from the next: use edit='scale'"
            )
        return replace(nothing, rules=rules, keep_norm=concept.keep_norm)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are off, whatever the original is."""
        edits = [replace(edit, sae=None) for edit in (self.edit, *(self._row_edits or ()))]  # the SAE pickles itself
        state = {key: value for key, value in vars(self).items() if key not in ("_lock", "edit", "_row_edits")}
        return {**state, "_attachments": (), "_astray": 0, "edits": edits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        edits = state.pop("edits")
        vars(self).update(state, _lock=threading.Lock())
        self.edit, *rows = (replace(edit, sae=self.sae.sae) for edit in edits)
        self._row_edits = None if self.rows is None else tuple(rows)

    def __repr__(self) -> str:
        names = ", ".join(concept.name for concept in self.concepts)
        if self.rows is not None:
            names += " for rows " + "; ".join(", ".join(c.name for c in row) or "-" for row in self.rows)
        state = "on" if self.attached else "off"
        return f"ConceptEraser([{names.strip()}], {len(self.features)} features at {self.hook_point.path}, {state})"


def _resolve(concept: ConceptLike, bank: ConceptBank) -> Concept:
    if isinstance(concept, str):
        return bank[concept]
    if isinstance(concept, Concept):
        return concept
    features = tuple(dict.fromkeys(int(feature) for feature in concept))
    return Concept(name=f"features {list(features)}", features=features)


def _rules(concept: Concept, kind: str, gamma: float | None, d_sae: int) -> Rules:
    """What an edit does to each feature of a concept."""
    outside = [feature for feature in concept.features if feature >= d_sae]
    if outside:
        raise EditError(
            f"{concept.name!r} names feature {outside[0]}, but this SAE has only {d_sae}: another SAE's concept?"
        )
    if kind not in EDITS:
        raise EditError(
            f"{concept.name!r} wants the edit {kind!r}, which this version does not know; it knows "
            f"{', '.join((*EDITS, PROJECT))}. A newer sauce_hooks may, or say edit='scale'."
        )
    if not concept.features and concept.projection is not None:
        raise EditError(
            f"{concept.name!r} has no features, only a projection: leave edit={kind!r} out, or say edit='project'"
        )
    factor = next(g for g in (gamma, concept.gamma, PAPER_GAMMA) if g is not None)
    rules = EDITS[kind](concept, factor)
    return merge_rules([{f: rule if gamma is None else replace(rule, stated=gamma) for f, rule in rules.items()}])


def _projection(concept: Concept, d_in: int) -> Projection:
    projection = concept.projection
    if projection is None:
        raise EditError(
            f"{concept.name!r} has no projection: learn one with sauce_hooks.learn_projection(model, sae, name, positives, "
            "negatives), or use another edit"
        )
    if projection.left_rd.shape[-1] != d_in:
        raise EditError(
            f"the projection of {concept.name!r} is {projection.left_rd.shape[-1]} wide, and the hook point {d_in}: another "
            "tower's concept?"
        )
    return projection


def merge(erasers: Iterable[ConceptEraser]) -> ConceptEraser | Erasers:
    """All erasers as one: `a | b | c`."""
    first, *rest = erasers
    joined: ConceptEraser | Erasers = first
    for other in rest:
        joined = joined | other
    return joined
