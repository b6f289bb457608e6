"""Room 2: reading a hook point. Images go in, rows `[n, d_in]` come out."""

from sauce_hooks.activations.cache import ActivationCache, CacheRecord, Chunk
from sauce_hooks.activations.images import Inputs, count_images, iter_images, iter_inputs
from sauce_hooks.activations.loader import BrokenImage, ImageBatch, ImageLoader
from sauce_hooks.activations.read import read_activations, read_batch, read_tokens
from sauce_hooks.activations.shuffle import ShuffleBuffer, shuffled_batches
from sauce_hooks.activations.stream import MemoryStore, RowStream, SharedStore, Store
from sauce_hooks.activations.world import World

__all__ = [
    "ActivationCache",
    "BrokenImage",
    "CacheRecord",
    "Chunk",
    "ImageBatch",
    "ImageLoader",
    "Inputs",
    "MemoryStore",
    "RowStream",
    "SharedStore",
    "ShuffleBuffer",
    "Store",
    "World",
    "count_images",
    "iter_images",
    "iter_inputs",
    "read_activations",
    "read_batch",
    "read_tokens",
    "shuffled_batches",
]
