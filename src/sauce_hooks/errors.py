"""Every error a user can meet. Each says what was wrong, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SauceHooksError(Exception):
    """The base of all errors of this library."""


class UnknownConceptError(SauceHooksError, KeyError):
    """A concept name that nobody has defined; names the known ones and the nearest match."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(known)
        near = difflib.get_close_matches(name, self.known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listing = ", ".join(self.known) or "none yet: learn one with sauce_hooks.learn_concept(...)"
        super().__init__(f"unknown concept {name!r}.{hint} Known concepts: {listing}.")

    def __str__(self) -> str:  # KeyError would show the repr, quotes and all
        return str(self.args[0])


class HookPointError(SauceHooksError):
    """No such place in this model; lists the places there are."""


class UnlistedFamilyWarning(UserWarning):
    """A vision tower was found by structure: what the language side reads of it is a guess."""


class TokenPolicyError(SauceHooksError, ValueError):
    """A choice of tokens that does not exist, or not in this tower."""


class PresetError(SauceHooksError, ValueError):
    """A training preset that does not exist; lists those that do."""


class ImagesError(SauceHooksError, ValueError):
    """Nothing usable among the images given: none at all, all unreadable, or of a kind nobody can read."""


class UnreadableImageWarning(UserWarning):
    """Some images could not be read and were skipped; counts and names them."""


class ActivationCacheError(SauceHooksError, ValueError):
    """Stored activations that are damaged, or were made with another model, place, choice of tokens or data; says which."""


class ResumeError(SauceHooksError, ValueError):
    """A training that cannot be gone on with: its settings, model or data have changed since; says which."""


class DivergedError(SauceHooksError, ArithmeticError):
    """The loss is NaN or infinite; names the step and the last good checkpoint."""


class NonFiniteActivationsError(SauceHooksError, ValueError):
    """NaN or infinity in the activations; names the hook point and how many rows."""


class SAEMismatchError(SauceHooksError, ValueError):
    """An SAE that does not fit this place: another width, another layer, another tower."""


class SAEFileError(SauceHooksError, ValueError):
    """A folder that is no saved VisionSAE, or a damaged one; says what is missing or wrong."""


class ContrastError(SauceHooksError, ValueError):
    """Contrast sets that can't tell a concept apart: an empty one, or both the same."""


class EditError(SauceHooksError, ValueError):
    """An edit that can't be: features out of range, contradicting factors, an unknown kind."""


class IneffectiveEraserError(SauceHooksError, RuntimeError):
    """An erasure that can't take effect, or did not: nothing was erased and the user must know."""


class EraserStateError(SauceHooksError, RuntimeError):
    """An eraser entered twice, detached while not attached, or left out of order."""


class ModelBelowGateError(SauceHooksError, RuntimeError):
    """The original model does not know enough for its forgetting to mean anything."""


class AttackError(SauceHooksError, ValueError):
    """An attack that can't be carried out: nothing to ask with, images it cannot change, weights it cannot reach."""


class ProbeError(SauceHooksError, ValueError):
    """A set of probes, or its labels, that cannot answer what is asked of it; says what is missing."""


class EvaluationError(SauceHooksError, RuntimeError):
    """An evaluation of which nothing is left: every erasure failed."""


class EvaluationWarning(UserWarning):
    """An evaluation that is not whole: some erasures failed and are left out; names them."""


class JudgeError(SauceHooksError, RuntimeError):
    """A judge that can't judge: an endpoint that isn't there or refuses, a model without an entailment label."""


class JudgeBudgetError(JudgeError):
    """A judge has spent what it may; says what it spent, and where the verdicts are that it has."""


class JudgeFileError(SauceHooksError, ValueError):
    """A file or mapping for a judge that can't be used: words, labels, a cache; says what is wrong in it."""


class UnjudgedAnswersWarning(UserWarning):
    """A judge can't tell for some descriptions; counts them and says why. They count as mentions."""


class LmmsEvalError(SauceHooksError, ValueError):
    """A model for lmms-eval that can't be: arguments, a task it does not do, or no lmms-eval; says which."""


class ConfigError(SauceHooksError, ValueError):
    """A configuration of an experiment that cannot be: an unknown key, a wrong value, a file that is not there."""
