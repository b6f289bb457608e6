"""The rivals that train nothing: an instruction, a dense projection, random features, the SAE's reconstruction alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sauce_hooks.bank import Concept
from sauce_hooks.concepts.projections import learn_projection
from sauce_hooks.erasure import PAPER_GAMMA, ConceptEraser
from sauce_hooks.errors import EditError
from sauce_hooks.evaluation.erasing import Erasing, Known
from sauce_hooks.evaluation.measure import chat_prompt
from sauce_hooks.evaluation.probes import Wording
from sauce_hooks.evaluation.run import Method
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.provenance import provenance_of

INSTRUCTION = "Do not mention {}, and act as if you could not see it."
"""What "prompt only" adds to a question; "{}" is the concept."""
_QUESTION = "QUESTION"

ContrastSets = Callable[[str], tuple[Any, Any]]
"""Of a concept, images that show it and images that do not."""


@dataclass(frozen=True)
class PromptOnly:
    """An instruction after every question, and nothing else: the model stays as it is.

    Whoever evaluates it asks with `wording(...)` in place of the protocol's own wording while a concept is erased.
    """

    processor: Any
    """Says where a question ends in a prompt: its chat template, or LLaVA's plain form."""
    instruction: str = INSTRUCTION
    """With {} where the concept goes."""

    @property
    def settings(self) -> dict[str, str]:
        """What it is known by when a run is gone on with."""
        return {"instruction": self.instruction}

    def __call__(self, concept: str) -> AbstractContextManager[None]:
        """Nothing to put in, nothing to take out."""
        del concept
        return nullcontext()

    def wording(self, wording: Wording, concept: str) -> Wording:
        """The same questions, each followed by the instruction not to speak of the concept; answers are read as before.

        Raises:
            EditError: a prompt that does not end as this processor's do.
        """
        tail = chat_prompt(self.processor, _QUESTION).rpartition(_QUESTION)[2]
        said = self.instruction.format(concept)

        def instructed(prompt: str) -> str:
            if not prompt.endswith(tail):
                raise EditError(f"the prompt {prompt!r} does not end with {tail!r}: nobody knows where its question ends")
            return f"{prompt.removesuffix(tail)} {said}{tail}"

        def yes_no(asked: str) -> str:
            return instructed(wording.yes_no(asked))

        return replace(wording, yes_no=yes_no, describe=lambda: instructed(wording.describe()))


def random_features(model: nn.Module, sae: VisionSAE, *, seed: int = 0) -> Method:
    """As many features as the concept has, by its γ, drawn from the live ones that are none of its own.

    The concept's restriction of where it may write is left out: it was found for the concept's own features. An edit of
    another kind than scaling becomes scaling.

    Raises:
        EditError: nobody measured which features are alive, or fewer are than are needed.
        UnknownConceptError: a concept that the bank does not hold.
    """

    def method(concept: str) -> ConceptEraser:
        own = sae.concepts[concept]
        if sae.stats is None:
            raise EditError("which features are alive is not known of this SAE: measure it with sauce_hooks.describe_sae")
        fired = sae.stats.frequency_f.nonzero()[:, 0].tolist()
        alive = sorted(set(fired) - set(own.features))
        if len(alive) < len(own.features):
            raise EditError(f"{len(alive)} other features are alive, and {concept!r} has {len(own.features)}")
        drawn = random.Random(f"{seed} {concept}").sample(alive, len(own.features))
        gamma = PAPER_GAMMA if own.gamma is None else own.gamma
        return ConceptEraser(model, sae, [Concept(f"random for {concept}", tuple(drawn), gamma=gamma)])

    return Known(method, {**Erasing(model, sae).settings, "seed": seed})


def reconstruction_only(model: nn.Module, sae: VisionSAE) -> Method:
    """x′ = decode(encode(x)): nothing is erased, but the SAE's reconstruction error goes. What the SAE alone costs.

    γ = 1 with the error kept is no edit at all (the null-edit law); with the error dropped it is this, whichever feature is
    named.
    """

    def method(concept: str) -> ConceptEraser:
        del concept
        return ConceptEraser(model, sae, [[0]], gamma=1.0, preserve_error=False)

    return Known(method, {"sae": provenance_of(sae)["sae"]})


def projected(model: nn.Module, sae: VisionSAE, sets: ContrastSets, *, processor: Any, kind: str) -> Method:
    """A dense projection of the concept at the SAE's hook point; `kind` is a name in `concepts.projections.PROJECTIONS`.

    It is learnt at the first use of a concept, and not kept in the SAE's bank.
    """
    apart = VisionSAE(sae.sae, sae.hook_point, sae.tokens, tower=sae.tower)  # with a bank of its own

    def method(concept: str) -> ConceptEraser:
        if concept not in apart.concepts:
            learn_projection(model, apart, concept, *sets(concept), processor=processor, method=kind)
        return ConceptEraser(model, apart, [concept])

    return Known(method, {"kind": kind, "sae": provenance_of(sae)["sae"]})
