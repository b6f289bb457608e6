"""The comparison in the README: erasure on the bundled model, every concept, by several methods side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sauce_hooks.bank import write_text_atomically
from sauce_hooks.erasure import ConceptEraser, ProjectionEdit
from sauce_hooks.evaluation import Results, evaluate
from sauce_hooks.evaluation.baselines import difference_of_means, erasing, token_mean
from sauce_hooks.sae import VisionSAE
from sauce_hooks.scenes.bundled import competence, load
from sauce_hooks.scenes.learning import PAPER, contrast_sets, learn_bank, train_paper_sae
from sauce_hooks.scenes.probes import probes
from sauce_hooks.scenes.world import CONCEPTS, CONCRETE, DOMAINS

GROUPS: Mapping[str, tuple[str, ...]] = {
    "objects and sports": tuple(c for d in DOMAINS if d in CONCRETE for c in DOMAINS[d]),
    "colours, emotions, materials": tuple(c for d in DOMAINS if d not in CONCRETE for c in DOMAINS[d]),
}
"""The paper's two tasks."""
