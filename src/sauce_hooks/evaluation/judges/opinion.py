"""What a judge is, what it says when it cannot tell, and judges one behind the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from sauce_hooks.evaluation.probes import Judge

Verdict = bool | None
"""True: the description affirms that the image shows the concept. False: it does not. None: the judge can't tell."""


class UnsureJudge(ABC):
    """A judge that may say that it can't tell.

    Called, it takes what it can't tell for a mention: counted as forgotten, its own doubt would flatter every method.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Which judge, with its version."""

    @abstractmethod
    def verdicts(self, texts: Sequence[str], concept: str) -> Sequence[Verdict]:
        """For each text True, False, or None where the judge can't tell."""

    @property
    def note(self) -> str | None:
        """What must stand beside its figures: that it agrees with too few labels made by hand, if so. Measures it."""
        from sauce_hooks.evaluation.judges.agreement import agreement

        return agreement(self).warning

    def __call__(self, texts: Sequence[str], concept: str) -> list[bool]:
        """For each text, whether it affirms that the image shows the concept; unsure is yes."""
        return [verdict is not False for verdict in self.verdicts(texts, concept)]


def verdicts_of(judge: Judge, texts: Sequence[str], concept: str) -> list[Verdict]:
    """What any judge says; one that is never unsure has no `verdicts`."""
    said = judge.verdicts(texts, concept) if isinstance(judge, UnsureJudge) else judge(texts, concept)
    if len(said) != len(texts):
        raise ValueError(
            f"judge {judge.name!r} gave {len(said)} verdicts for {len(texts)} descriptions: it must give one each"
        )
    return list(said)


class Layered(UnsureJudge):
    """Cheap judges first, a dearer one only for what those before it could not tell.

    A judge with a method `known` (the lexicon) that does not know the concept is believed when it finds the name, and not
    when it finds nothing: the concept may be there in other words.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        """Stack judges.

        Args:
            judges: in the order they are asked.

        Raises:
            ValueError: no judges.
        """
        if not judges:
            raise ValueError("no judges: Layered needs at least one, for example Layered([Lexicon()])")
        self.judges = tuple(judges)

    @property
    def name(self) -> str:
        """The names of its judges, in order."""
        return " > ".join(judge.name for judge in self.judges)

    @property
    def note(self) -> str | None:
        """What its judges say."""
        return " ".join(note for judge in self.judges if (note := getattr(judge, "note", None))) or None

    def verdicts(self, texts: Sequence[str], concept: str) -> list[Verdict]:
        """For each text what the first judge says that can tell; what none can tell is None."""
        found: list[Verdict] = [None] * len(texts)
        open_: Sequence[int] = range(len(texts))
        for n, judge in enumerate(self.judges):
            if not open_:
                break
            last = n + 1 == len(self.judges)
            known: Callable[[str], bool] | None = getattr(judge, "known", None)
            blind = not last and known is not None and not known(concept)
            for i, verdict in zip(open_, verdicts_of(judge, [texts[i] for i in open_], concept), strict=True):
                found[i] = None if blind and verdict is False else verdict
            open_ = [i for i in open_ if found[i] is None]
        return found
