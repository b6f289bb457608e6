"""From the bundled model to its SAE and concept bank, and to the paper-literal ones it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.concepts import SetStatistics, learn_concept, set_statistics
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.evaluation import ProbeSet, ask, prepare
from sauce_hooks.evaluation.metrics import Rate, score
from sauce_hooks.evaluation.run import own_questions, other_questions
from sauce_hooks.sae import VisionSAE, train_sae
from sauce_hooks.scenes.world import CONCEPTS, Scene, sample

N_CONTRAST = 200
"""Images in each contrast set, as in the paper."""
