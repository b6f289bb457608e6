"""Room 2: reading a hook point. Images go in, rows `[n, d_in]` come out."""

from sauce_hooks.activations.images import Inputs, count_images, iter_images, iter_inputs
from sauce_hooks.activations.read import read_activations, read_tokens
from sauce_hooks.activations.shuffle import shuffled_batches

__all__ = [
    "Inputs",
    "count_images",
    "iter_images",
    "iter_inputs",
    "read_activations",
    "read_tokens",
    "shuffled_batches",
]
