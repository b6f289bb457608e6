"""Room 8: the bundled world and its small trained model. A seed goes in, images with known truth come out."""

from sauce_hooks.scenes.bundled import Competence, asset, competence, load, load_model
from sauce_hooks.scenes.language import HELD_OUT, describe_prompt, yes_no_prompt
from sauce_hooks.scenes.probes import probes, wording
from sauce_hooks.scenes.world import CONCEPTS, CONCRETE, DOMAINS, SIBLINGS, Scene, Thing, domain_of, sample

__all__ = [
    "CONCEPTS",
    "CONCRETE",
    "DOMAINS",
    "HELD_OUT",
    "SIBLINGS",
    "Competence",
    "Scene",
    "Thing",
    "asset",
    "competence",
    "describe_prompt",
    "domain_of",
    "load",
    "load_model",
    "probes",
    "sample",
    "wording",
    "yes_no_prompt",
]
