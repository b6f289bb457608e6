"""Room 3: training with SAE-Lens, loading and saving, feature statistics. Rows go in, a `VisionSAE` comes out."""

from sauce_hooks.sae.describe import describe_features
from sauce_hooks.sae.gallery import Gallery
from sauce_hooks.sae.presets import PRESETS, Preset
from sauce_hooks.sae.provenance import provenance_of
from sauce_hooks.sae.training import train_sae
from sauce_hooks.sae.vision_sae import FeatureStats, VisionSAE

__all__ = ["PRESETS", "FeatureStats", "Gallery", "Preset", "VisionSAE", "describe_features", "provenance_of", "train_sae"]
