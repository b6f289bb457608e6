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
    from sauce_hooks.concepts import learn_concept as learn_concept
    from sauce_hooks.erasure import ConceptEraser as ConceptEraser
    from sauce_hooks.evaluation import Results as Results
    from sauce_hooks.evaluation import describe_sae as describe_sae
    from sauce_hooks.evaluation import evaluate as evaluate
    from sauce_hooks.evaluation import loss_added as loss_added
    from sauce_hooks.hookpoint import HookPoint as HookPoint
    from sauce_hooks.hookpoint import TokenPolicy as TokenPolicy
    from sauce_hooks.hookpoint import find_hook_point as find_hook_point
    from sauce_hooks.sae import VisionSAE as VisionSAE
    from sauce_hooks.sae import train_sae as train_sae

_HOMES = {
    "Concept": "sauce_hooks.bank",
    "ConceptBank": "sauce_hooks.bank",
    "ConceptEraser": "sauce_hooks.erasure",
    "HookPoint": "sauce_hooks.hookpoint",
    "Results": "sauce_hooks.evaluation",
    "TokenPolicy": "sauce_hooks.hookpoint",
    "VisionSAE": "sauce_hooks.sae",
    "describe_sae": "sauce_hooks.evaluation",
    "errors": "sauce_hooks",
    "evaluate": "sauce_hooks.evaluation",
    "find_hook_point": "sauce_hooks.hookpoint",
    "learn_concept": "sauce_hooks.concepts",
    "loss_added": "sauce_hooks.evaluation",
    "read_activations": "sauce_hooks.activations",
    "scenes": "sauce_hooks",
    "train_sae": "sauce_hooks.sae",
}

__all__ = [  # noqa: RUF022 - in the order of the flow
    "find_hook_point", "HookPoint", "TokenPolicy", "read_activations", "train_sae", "VisionSAE", "learn_concept",
    "Concept", "ConceptBank", "ConceptEraser", "evaluate", "describe_sae", "loss_added", "Results", "scenes", "errors",
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
