"""sauce_hooks: make a vision-language model forget a named concept at inference, without touching its weights.

```python
with ConceptEraser(model, sae, ["red", "tiger"]):
    model.generate(**inputs)
```

Public names load when first used: importing the library imports neither torch's users (transformers, SAE-Lens,
TransformerLens, nnsight) nor anything that plots.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sauce_hooks import errors as errors
    from sauce_hooks import scenes as scenes
    from sauce_hooks.activations import read_activations as read_activations
    from sauce_hooks.bank import Concept as Concept
    from sauce_hooks.bank import ConceptBank as ConceptBank
    from sauce_hooks.bank import Projection as Projection
    from sauce_hooks.bank import Subspace as Subspace
    from sauce_hooks.concepts import Target as Target
    from sauce_hooks.concepts import Tuning as Tuning
    from sauce_hooks.concepts import difference as difference
    from sauce_hooks.concepts import keep_apart as keep_apart
    from sauce_hooks.concepts import label_features as label_features
    from sauce_hooks.concepts import labelled_statistics as labelled_statistics
    from sauce_hooks.concepts import learn_concept as learn_concept
    from sauce_hooks.concepts import learn_concept_from_word as learn_concept_from_word
    from sauce_hooks.concepts import learn_concepts as learn_concepts
    from sauce_hooks.concepts import learn_projection as learn_projection
    from sauce_hooks.concepts import overlap as overlap
    from sauce_hooks.erasure import ConceptEraser as ConceptEraser
    from sauce_hooks.erasure import Erasers as Erasers
    from sauce_hooks.evaluation import Eligibility as Eligibility
    from sauce_hooks.evaluation import LabelledImages as LabelledImages
    from sauce_hooks.evaluation import Results as Results
    from sauce_hooks.evaluation import describe_sae as describe_sae
    from sauce_hooks.evaluation import evaluate as evaluate
    from sauce_hooks.evaluation import loss_added as loss_added
    from sauce_hooks.evaluation import tune_concept as tune_concept
    from sauce_hooks.hookpoint import HookPoint as HookPoint
    from sauce_hooks.hookpoint import TokenPolicy as TokenPolicy
    from sauce_hooks.hookpoint import find_hook_point as find_hook_point
    from sauce_hooks.sae import VisionSAE as VisionSAE
    from sauce_hooks.sae import train_sae as train_sae

_HOMES = {
    "Concept": "sauce_hooks.bank",
    "ConceptBank": "sauce_hooks.bank",
    "ConceptEraser": "sauce_hooks.erasure",
    "Eligibility": "sauce_hooks.evaluation",
    "Erasers": "sauce_hooks.erasure",
    "HookPoint": "sauce_hooks.hookpoint",
    "LabelledImages": "sauce_hooks.evaluation",
    "Projection": "sauce_hooks.bank",
    "Results": "sauce_hooks.evaluation",
    "Subspace": "sauce_hooks.bank",
    "Target": "sauce_hooks.concepts",
    "TokenPolicy": "sauce_hooks.hookpoint",
    "Tuning": "sauce_hooks.concepts",
    "VisionSAE": "sauce_hooks.sae",
    "describe_sae": "sauce_hooks.evaluation",
    "difference": "sauce_hooks.concepts",
    "errors": "sauce_hooks",
    "evaluate": "sauce_hooks.evaluation",
    "find_hook_point": "sauce_hooks.hookpoint",
    "keep_apart": "sauce_hooks.concepts",
    "label_features": "sauce_hooks.concepts",
    "learn_concept_from_word": "sauce_hooks.concepts",
    "labelled_statistics": "sauce_hooks.concepts",
    "learn_concept": "sauce_hooks.concepts",
    "learn_concepts": "sauce_hooks.concepts",
    "learn_projection": "sauce_hooks.concepts",
    "loss_added": "sauce_hooks.evaluation",
    "overlap": "sauce_hooks.concepts",
    "read_activations": "sauce_hooks.activations",
    "scenes": "sauce_hooks",
    "train_sae": "sauce_hooks.sae",
    "tune_concept": "sauce_hooks.evaluation",
}

__all__ = [  # noqa: RUF022 - in the order of the flow
    "find_hook_point", "HookPoint", "TokenPolicy", "read_activations", "train_sae", "VisionSAE", "learn_concept",
    "learn_concepts", "labelled_statistics", "learn_concept_from_word", "label_features", "learn_projection", "keep_apart",
    "tune_concept", "Tuning", "Target",
    "Concept", "ConceptBank", "Subspace", "Projection", "overlap", "difference", "ConceptEraser", "Erasers", "evaluate",
    "LabelledImages", "Eligibility", "describe_sae", "loss_added", "Results", "scenes", "errors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sauce_hooks' has no attribute {name!r}")
    if home == "sauce_hooks":
        return importlib.import_module(f"sauce_hooks.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
