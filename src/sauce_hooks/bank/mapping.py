"""Concepts by name: a mapping that is saved, loaded, merged and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from sauce_hooks.bank import hub
from sauce_hooks.bank.card import BANK_CARD, bank_card
from sauce_hooks.bank.comparison import BankDiff, compare
from sauce_hooks.bank.format import BANK_FILE, TENSORS_FILES, Content, bank_path, check, read_bank, write_bank
from sauce_hooks.bank.records import Concept, SAERecord
from sauce_hooks.errors import EditError, SAEFileError, SAEMismatchError, UnknownConceptError

Item = TypeVar("Item")


class ConceptBank(Mapping[str, Concept]):
    """Concepts by name. A mapping that saves, loads and merges; unknown names are answered with the nearest known one.

    Features are numbers of one SAE's. A bank that was saved or loaded with an SAE, or filled by `learn_concept`, knows
    which, and is refused elsewhere. One that was made by hand knows nothing, and is taken anywhere; so
    `ConceptBank(bank.values())` is a way to say that you know better.
    """

    def __init__(
        self,
        concepts: Iterable[Concept] = (),
        *,
        sae: SAERecord | None = None,
        groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._concepts = {concept.name: concept for concept in concepts}
        self._sae = sae
        self._groups = self._checked(groups)

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Names that stand for several concepts, or groups: erasing one is erasing its members."""
        return MappingProxyType(self._groups)

    def group(self, name: str, names: Sequence[str]) -> None:
        """Let a name stand for others: `bank.group("colours", ["red", "blue"])`, `ConceptEraser(model, sae, ["colours"])`.

        Raises:
            EditError: a concept has that name, or the group would hold itself.
            UnknownConceptError: a name that is neither a concept nor a group.
        """
        self._groups = self._checked({**self._groups, name: names})

    def _checked(self, groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        for name, names in groups.items():
            if name in self._concepts:
                raise EditError(f"{name!r} is a concept: a group must be called something else")
            for member in names:
                if member not in self._concepts and member not in groups:
                    raise UnknownConceptError(member, [*self._concepts, *groups])
            expanded([name], groups)
        return {name: tuple(dict.fromkeys(names)) for name, names in groups.items()}

    @property
    def sae(self) -> SAERecord | None:
        """The SAE that the features are of; None if nobody said, or there are none."""
        return self._sae if self._concepts else None

    def __getitem__(self, name: str) -> Concept:
        try:
            return self._concepts[name]
        except KeyError:
            raise UnknownConceptError(name, self._concepts) from None

    def __contains__(self, name: object) -> bool:
        return name in self._concepts

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __len__(self) -> int:
        return len(self._concepts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConceptBank):
            return False
        return self._concepts == other._concepts and self._groups == other._groups

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"ConceptBank({', '.join(self._concepts)})"

    def add(self, concept: Concept, *, sae: SAERecord | None = None) -> None:
        """Store a concept under its name, replacing an older one of that name.

        Args:
            concept: the concept.
            sae: the SAE it was found in, if that is known: `VisionSAE.record()`.

        Raises:
            SAEMismatchError: the bank is another SAE's.
            EditError: a group has that name.
        """
        if sae is not None:
            self.require(sae)
            self._sae = sae
        if concept.name in self._groups:
            raise EditError(f"{concept.name!r} is a group of this bank: a concept must be called something else")
        self._concepts[concept.name] = concept

    def __delitem__(self, name: str) -> None:
        """Remove a concept, from its groups too; `UnknownConceptError` if there is none of that name."""
        del self._concepts[self[name].name]
        self._groups = {group: tuple(n for n in names if n != name) for group, names in self._groups.items()}

    def __or__(self, other: ConceptBank) -> ConceptBank:
        """Both banks' concepts; where both know a name, the right one's. `SAEMismatchError` if they are two SAEs'."""
        if other.sae is not None:
            self.require(other.sae)
        concepts = [*self._concepts.values(), *other._concepts.values()]
        return ConceptBank(concepts, sae=other.sae or self.sae, groups=self._groups | other._groups)

    def diff(self, other: ConceptBank) -> BankDiff:
        """What must happen to this bank to make it the other one. Prints; is false if nothing must."""
        both = {**self._groups, **other._groups}
        return replace(compare(self, other), groups=tuple(g for g in both if self._groups.get(g) != other._groups.get(g)))

    def require(self, sae: SAERecord) -> None:
        """See that this bank's features are those of an SAE. A bank that is empty, or knows no SAE, is any one's.

        Raises:
            SAEMismatchError: they are another's.
        """
        difference = None if self.sae is None else self.sae.difference(sae)
        if difference:
            raise SAEMismatchError(
                f"the concepts of this bank ({', '.join(self)!r:.99}) were found in another SAE: {difference}. Their "
                "feature numbers mean nothing in this one. Learn them anew with sauce_hooks.learn_concept(...), or load "
                "the SAE they belong to."
            )

    def of(self, sae: SAERecord) -> ConceptBank:
        """The same concepts, as those of an SAE.

        Raises:
            SAEMismatchError: they are another's.
            EditError: they name features that it does not have, or directions of another width.
        """
        self.require(sae)
        for concept in self.values():
            try:
                check(concept, sae)
            except ValueError as problem:
                raise EditError(f"the concept {concept.name!r:.99}: {problem}") from problem
        return ConceptBank(self.values(), sae=sae, groups=self._groups)

    def save(self, path: str | Path) -> None:
        """Write JSON, and beside it safetensors where concepts have tensors, as docs/bank.md says; whole or not at all.

        Args:
            path: a folder, in which `concepts.json` is written, or the path of a .json file.

        Raises:
            EditError: a concept cannot be saved; says which and why.
        """
        file = bank_path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bank(file, Content(tuple(self.values()), self.sae, dict(self._groups)))

    @classmethod
    def load(cls, source: str | Path) -> ConceptBank:
        """Read what `save` wrote, or download it from the Hugging Face hub.

        Args:
            source: a folder, the path of a .json file, or an id on the hub; of an SAE's repository only the bank is
                downloaded.

        Raises:
            SAEFileError: it is anything else.
        """
        file = bank_path(source)
        if not Path(source).exists() and file != Path(source):
            file = bank_path(hub.download(str(source), [BANK_FILE, TENSORS_FILES]))
        concepts, sae, groups = read_bank(file)
        try:
            return cls(concepts, sae=sae, groups=groups)
        except (EditError, UnknownConceptError) as problem:
            raise SAEFileError(f"{file} has groups that cannot be: {problem}") from problem

    def push_to_hub(self, repo_id: str, *, sae: str | None = None, license: str | None = None, private: bool = False) -> str:
        """Upload this bank, without an SAE, to the Hugging Face hub; returns the address. `load(repo_id)` reads it back.

        Args:
            repo_id: a repository of its own, or that of the SAE. Only a card that was written here for a bank is replaced.
            sae: the repository of the SAE that it belongs to, for the card.
            license: as the hub calls it, such as "mit".
            private: if the repository has yet to be made.

        Raises:
            SAEMismatchError: the repository has a bank of another SAE.
        """
        if hub.has(repo_id, BANK_FILE) and (there := ConceptBank.load(repo_id)).sae is not None and self.sae is not None:
            there.require(self.sae)
        card = bank_card(tuple(self.values()), self.sae, repo_id, sae_id=sae, license=license)
        return hub.upload(repo_id, self.save, card, replaces=(BANK_CARD,), private=private)


def expanded(items: Iterable[Item], groups: Mapping[str, Sequence[Item]]) -> tuple[Item, ...]:
    """What is named, with each group's members in place of its name; everything once, in the order of its first mention.

    Erasing a group is erasing its members: where they share a feature it is edited once, like everywhere.

    Args:
        items: names of concepts or groups, or whatever else an eraser takes.
        groups: the members of each group by its name; these may be groups, too.

    Raises:
        EditError: a group is a member of itself.
    """
    found: list[Item] = []

    def expand(item: Item, within: tuple[str, ...]) -> None:
        if isinstance(item, str) and item in groups:
            if item in within:
                raise EditError(f"the group {item!r} is a member of itself: {' → '.join((*within, item))}")
            for member in groups[item]:
                expand(member, (*within, item))
        elif item not in found:
            found.append(item)

    for item in items:
        expand(item, ())
    return tuple(found)
