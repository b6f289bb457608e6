"""Room 1: where in a model. `find_hook_point(model)` gives a `HookPoint`."""

from sauce_hooks.hookpoint.families import FAMILIES, Family, TokenLayout
from sauce_hooks.hookpoint.mode import evaluating, untouched
from sauce_hooks.hookpoint.resolve import HookPoint, find_hook_point
from sauce_hooks.hookpoint.tokens import EditTokens, ReadTokens, TokenPolicy, select, token_slice, tokens_per_image

__all__ = [
    "FAMILIES",
    "EditTokens",
    "Family",
    "HookPoint",
    "ReadTokens",
    "TokenLayout",
    "TokenPolicy",
    "evaluating",
    "find_hook_point",
    "select",
    "token_slice",
    "tokens_per_image",
    "untouched",
]
