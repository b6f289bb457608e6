"""Erasers at several hook points as one: several blocks of a tower, the projector, language layers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from sauce_hooks.erasure.decorate import decorated
from sauce_hooks.erasure.status import EraserStatus
from sauce_hooks.errors import EditError
from sauce_hooks.hookpoint import unwrap

if TYPE_CHECKING:
    from sauce_hooks.erasure.eraser import ConceptEraser, ConceptLike

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class ErasersStatus:
    """A snapshot of erasers at several hook points."""

    each: tuple[EraserStatus, ...]

    @property
    def proven(self) -> bool:
        """Whether the language side was seen to read what each of them edits."""
        return all(status.proven for status in self.each)

    @property
    def problem(self) -> str | None:
        """Why one of them does not take effect, if that came out."""
        return next((status.problem for status in self.each if status.problem), None)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.each))


class Erasers:
    """Several `ConceptEraser`s of one model, on and off together; what `a | b` gives where their SAEs differ.

    ```python
    with ConceptEraser(model, tower_sae, ["red"]) | ConceptEraser(model, projector_sae, ["red"]):
        model.generate(**inputs)
    ```

    Erasers of one SAE are merged (a feature is edited once), those of different SAEs stand side by side. In which order they
    are named or entered plays no part. A block reads what the edits before it have left, as the model itself does: two
    edits of one concept at two blocks are more than either, and more than their changes added up.

    Args:
        erasers: the erasers; those of several are taken apart.

    Raises:
        EditError: they are of different models, or there is none.
    """

    def __init__(self, erasers: Iterable[ConceptEraser | Erasers]) -> None:
        flat = [one for some in erasers for one in (some if isinstance(some, Erasers) else (some,))]
        if not flat:
            raise EditError("no erasers: give at least one")
        if len({id(unwrap(eraser.model)) for eraser in flat}) > 1:
            raise EditError("erasers of different models cannot be one: enter each for itself")
        by_sae: dict[int, list[ConceptEraser]] = {}
        for eraser in flat:
            by_sae.setdefault(id(eraser.sae), []).append(eraser)
        merged = (functools.reduce(operator.or_, of_one) for of_one in by_sae.values())
        self.erasers: tuple[ConceptEraser, ...] = tuple(merged)
        """One for each SAE."""

    @property
    def model(self) -> Any:
        """The model that they erase in."""
        return self.erasers[0].model

    @property
    def attached(self) -> bool:
        """Whether all of them are on."""
        return all(eraser.attached for eraser in self.erasers)

    def status(self) -> ErasersStatus:
        """The status of each. Prints as their tables, one below the other."""
        return ErasersStatus(tuple(eraser.status() for eraser in self.erasers))

    def attach(self) -> Erasers:
        """Turn all of them on until `detach`; none, if one of them cannot be."""
        with ExitStack() as undo:
            for eraser in self.erasers:
                eraser.attach()
                undo.callback(eraser._release)  # pyright: ignore[reportPrivateUsage] - off, whether it ran or not
            undo.pop_all()
        return self

    def detach(self) -> None:
        """Turn all of them off, also if one of them raises that it never took effect."""
        with ExitStack() as stack:
            for eraser in self.erasers:
                stack.callback(eraser.detach)

    def __enter__(self) -> Erasers:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with ExitStack() as stack:
            for eraser in self.erasers:
                stack.callback(eraser.__exit__, kind, error, trace)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: on while the function runs; for generators and coroutines, while their body does."""
        return cast(Callable[P, R], functools.wraps(function)(decorated(self, function)))

    def intervene(self, traced: Any) -> None:
        """The same edits inside an nnsight trace, or in `nm.edit(inplace=True)`; in the order of the blocks."""
        order = {path: i for i, (path, _) in enumerate(unwrap(self.model).named_modules())}
        for eraser in sorted(self.erasers, key=lambda eraser: order[eraser.hook_point.path]):
            eraser.intervene(traced)

    def bake(self, *, copy: bool = True, verify: Mapping[str, Any] | None = None) -> Any:
        """A model that carries all of these erasures as a part of itself; as `ConceptEraser.bake`."""
        from sauce_hooks.erasure.bake import bake

        return bake(self, copy=copy, verify=verify)

    def for_rows(self, rows: Sequence[Sequence[ConceptLike] | str]) -> Erasers:
        """Erasers of this kind for a batch whose rows forget different concepts, at every one of the hook points.

        Args:
            rows: the names of each row's concepts, which every SAE's bank must hold. Features are an SAE's own, and `sizes`
                count other things at other places; for those join erasers for rows: `a.for_rows(...) | b.for_rows(...)`.

        Raises:
            EditError: features, or a concept made of them, in place of a name.
        """
        named = [[row] if isinstance(row, str) else list(row) for row in rows]
        own = [concept for row in named for concept in row if not isinstance(concept, str)]
        if own and len(self.erasers) > 1:
            raise EditError(
                f"{own[0]!r} is no name: features, and concepts made of them, are one SAE's own. Join erasers for rows "
                "instead: a.for_rows(...) | b.for_rows(...)"
            )
        return Erasers(eraser.for_rows(named) for eraser in self.erasers)

    def __or__(self, other: ConceptEraser | Erasers) -> Erasers:
        """These and others; erasers of one SAE are merged."""
        return Erasers((self, other))

    def __ror__(self, other: ConceptEraser) -> Erasers:
        return Erasers((other, self))

    def __iter__(self) -> Iterator[ConceptEraser]:
        return iter(self.erasers)

    def __len__(self) -> int:
        return len(self.erasers)

    def __repr__(self) -> str:
        return f"Erasers([{', '.join(map(repr, self.erasers))}])"
