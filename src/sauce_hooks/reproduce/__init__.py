"""The paper's tables and figures, each by one command, and whether what the paper claims of them holds here."""

from sauce_hooks.reproduce.bundled import bundled_study
from sauce_hooks.reproduce.finding import Claim, Finding
from sauce_hooks.reproduce.run import EXPERIMENTS, Experiment, reproduce
from sauce_hooks.reproduce.study import OURS, Relative, Size, Study

__all__ = [
    "EXPERIMENTS",
    "OURS",
    "Claim",
    "Experiment",
    "Finding",
    "Relative",
    "Size",
    "Study",
    "bundled_study",
    "reproduce",
]
