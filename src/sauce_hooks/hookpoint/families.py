"""What is known of each model family, as data: where its vision blocks are, how their tokens lie, which ones are read.

A new family is a new row. Nothing else in the library knows a family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

PIXELS = ("pixel_values", "flattened_patches", "image_pixel_values", "pixel_values_images", "high_res_pixel_values")
"""What the arguments of a model call its images."""

VIDEOS = ("pixel_values_videos",)
"""The same of videos."""

HANDED_IN = (
    "image_embeds", "image_embeddings", "image_features", "mm_encoder_outputs", "encoder_outputs", "cross_attention_states",
    "image_encoder_embeddings", "perceiver_embeddings", "image_hidden_states", "video_embeds", "inputs_embeds",
)  # fmt: skip
"""Arguments that hand a model the image without the tower seeing it."""

FEATURES = frozenset(
    ("image_embeds", "image_embeddings", "image_features", "mm_encoder_outputs", "video_embeds", "image_hidden_states",
     "encoder_outputs")
)  # fmt: skip
"""Those of them that are, as they come, what a tower, an encoder around it or `get_image_features` gave."""

PLACEHOLDERS = ("image_token_id", "image_token_index", "image_patch_id")
"""What configs call the token that stands for an image in the text."""

VIDEO_PLACEHOLDERS = ("video_token_id", "video_token_index")
"""The same of videos."""

HOW_IT_READS = ("vision_feature_layer", "vision_feature_select_strategy")
"""Arguments and config attributes that change what the language side reads from one call to the next."""

Shape = Literal["batch", "packed", "grid", "maps"]
"""What a block writes. `batch`: [images or tiles, tokens, d]. `packed`: [tokens of all images, d], or the same with a
leading 1. `grid`: [images, rows, columns, d]. `maps`: [images, d, rows, columns], a stage of a CNN."""


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of an image lie in what a block writes."""

    class_token: Literal["first", "last", "none"] = "none"
    """Where the class token is."""
    registers: int = 0
    """Register tokens, behind the class token."""
    shape: Shape = "batch"
    tiles_in_row: tuple[int, int] | None = None
    """Mllama: the tiles of an image stand one after another in its row of tokens; (tokens of a tile, tokens of a tile with
    its padding)."""
    fixed: bool = True
    """Every image is one entry of the batch with the same number of tokens; False where an image may be several tiles or
    any number of patches."""
    class_read: bool = True
    """The language side (or whoever else, of a bare tower) reads the class token and the registers, where there are any."""
    even: bool = True
    """Each entry of the batch (each patch, where they are packed) gives the language model as many tokens as any other."""


@dataclass(frozen=True)
class Tower:
    """One row of the table of towers, by the `model_type` of the tower's own config."""

    blocks: str
    """The blocks, relative to the tower; `*` stands for every child."""
    class_token: Literal["first", "last", "none"] = "none"
    registers: str | int = 0
    """The register tokens, or the config attribute that counts them."""
    class_parameter: str | None = None
    """Where the class token's parameter is, if only some towers of the kind have one."""
    shape: Shape = "batch"
    tile_padding: int | None = None
    """Tiles stand in one row of tokens, each padded to a multiple of this."""
    fixed: bool = True


@dataclass(frozen=True)
class Reads:
    """Which blocks the language side reads, named by the model's config; the default is the last block alone."""

    attribute: str | None = None
    """The config attribute, dotted: an index, a list of them, or a list of (index, ...) tuples; None: the last block."""
    counts: Literal["hidden_states", "blocks"] = "hidden_states"
    """An index i is `hidden_states[i]`, the output of block i−1, or the output of block i itself."""
    and_last: bool = False
    """The last block is read besides."""
    also: str | None = None
    """A second attribute of the same kind."""
    last: int = 1
    """How many blocks are read at the end of the tower, where that is read."""


@dataclass(frozen=True)
class TowerPlace:
    """A vision tower in a family."""

    path: str
    """From the model that `from_pretrained` returns."""
    reads: Reads = field(default_factory=Reads)
    drops_class: tuple[str, Any] | bool = False
    """Whether the language side drops the class token; or the config attribute that says so, and when it does."""
    fixed: bool = True
    """False where what it sees are frames of a video."""
    tower: Tower | None = None
    """For towers that their own `model_type` does not tell (timm's)."""


@dataclass(frozen=True)
class Family:
    """One row of the table of families: its vision towers, the one that images go through first."""

    towers: tuple[TowerPlace, ...] = ()
    refused: str | None = None
    """Why there is nothing to hook, where there is nothing."""
    fixed: bool = True
    """False where an image is cut into tiles, or frames are stacked, so that one image is several entries of the batch."""
    even: bool = True
    """False where tiles, or patches, give the language model different numbers of tokens (cut-off padding, new lines)."""


@dataclass(frozen=True)
class Behind:
    """One row of the table of what stands behind a family's towers: the way of an image into the text.

    Listed is only what every image goes through, and nothing else of it: a family that also hands features of earlier blocks
    to the language model (qwen3_vl, granite4_vision) or reads them by cross-attention (mllama) has no such place.
    """

    layers: str
    """The decoder layers of the language model, from the model that `from_pretrained` returns."""
    projector: str | None = None
    """What makes a vision tower's tokens as wide as the text's; called once in a forward. None: no such module."""
    shape: Shape | None = None
    """What the projector writes; None: packed as the tower's blocks do, or else `batch`."""


_CLASS_FIRST = Tower("encoder.layers", class_token="first")
_PATCHES = Tower("encoder.layers")
_PACKED_BLOCKS = Tower("blocks", shape="packed", fixed=False)
_PIXTRAL = Tower("transformer.layers", shape="packed", fixed=False)

TOWERS: Mapping[str, Tower] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "clip_vision_model", "blip_vision_model", "blip_2_vision_model", "instructblip_vision_model",
                "instructblipvideo_vision_model", "idefics_vision", "altclip_vision_model", "chinese_clip_vision_model",
                "metaclip_2_vision_model", "clipseg_vision_model", "owlvit_vision_model", "owlv2_vision_model",
                "xclip_vision_model", "groupvit_vision_model",
            ),
            _CLASS_FIRST,
        ),
        **dict.fromkeys(
            (
                "siglip_vision_model", "siglip2_vision_model", "janus_vision_model", "idefics2_vision", "idefics3_vision",
                "smolvlm_vision", "phi4_multimodal_vision", "aimv2_vision_model",
            ),
            _PATCHES,
        ),
        **dict.fromkeys(
            ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision",
             "qwen3_5_moe_vision", "glm4v_vision", "glm4v_moe_vision", "glm_ocr_vision"),
            _PACKED_BLOCKS,
        ),
        "pixtral": _PIXTRAL,
        "gemma4_vision": Tower("encoder.layers", fixed=False),
        "kimi_k25_vision": Tower("layers", shape="packed", fixed=False),
        "video_llama_3_vision": Tower("encoder.layers", shape="packed", fixed=False),
        "paddleocr_vl_vision": Tower("vision_model.encoder.layers", shape="packed", fixed=False),
        "minicpmv4_6_vision": Tower("encoder.layers", shape="packed", fixed=False),
        "molmo2_vision": Tower("layers", fixed=False),
        "internvl_vision": Tower("encoder.layer", class_token="first"),
        "ovis2_vision": Tower("transformer.encoder.layers"),
        "llama4_vision_model": Tower("model.layers", class_token="last", fixed=False),
        "mllama_vision_model": Tower("transformer.layers", class_token="first", tile_padding=8, fixed=False),
        "got_ocr2_vision": Tower("layers", shape="grid"),
        "sam_vision_model": Tower("vision_encoder.layers", shape="grid"),
        "kosmos_2_vision_model": Tower("model.encoder.layers", class_token="first"),
        "kosmos_2_5_vision_model": Tower("encoder.layer", fixed=False),
        "pix2struct_vision_model": Tower("encoder.layer", fixed=False),
        "git_vision_model": Tower("vision_model.encoder.layers", class_token="first"),
        "vit": Tower("layers", class_token="first"),
        "deit": Tower("layers", class_token="first", registers=1),  # the distillation token
        "dinov2": Tower("encoder.layer", class_token="first"),
        "dinov2_with_registers": Tower("encoder.layer", class_token="first", registers="num_register_tokens"),
        "dinov3_vit": Tower("model.layer", class_token="first", registers="num_register_tokens"),
        "tipsv2_vision_model": Tower("encoder.layer", class_token="first", registers="num_register_tokens"),
        "align_vision_model": Tower("encoder.blocks", shape="maps"),
        "florence_vision": Tower("blocks.*.*", shape="maps"),
    }
)  # fmt: skip
"""Vision towers. The same tower stands in several families."""

_VISION_TOWER, _VISION_MODEL, _VISUAL = (TowerPlace(f"model.{name}") for name in ("vision_tower", "vision_model", "visual"))
_DEFAULT_STRATEGY = ("vision_feature_select_strategy", "default")
_FEATURE_LAYER = TowerPlace("model.vision_tower", Reads("vision_feature_layer"), drops_class=_DEFAULT_STRATEGY)
_BARE = TowerPlace("vision_model")
_DEEPSTACK = TowerPlace("model.visual", Reads("vision_config.deepstack_visual_indexes", counts="blocks", and_last=True))
_VIDEO_LLAVA = Reads("vision_feature_layer")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        # The language side reads recorded hidden states.
        **dict.fromkeys(("llava", "mistral3"), Family((_FEATURE_LAYER,))),
        "vipllava": Family((TowerPlace("model.vision_tower", Reads("vision_feature_layer"), drops_class=True),)),
        **dict.fromkeys(("aya_vision", "aria", "internvl"), Family((_FEATURE_LAYER,), fixed=False)),
        **dict.fromkeys(
            ("llava_next", "llava_next_video", "llava_onevision"), Family((_FEATURE_LAYER,), fixed=False, even=False)
        ),
        "video_llava": Family(
            (
                TowerPlace("model.image_tower", _VIDEO_LLAVA, drops_class=_DEFAULT_STRATEGY),
                TowerPlace("model.video_tower", _VIDEO_LLAVA, fixed=False),
            )
        ),
        "phi4_multimodal": Family(
            (TowerPlace("model.embed_tokens_extend.image_embed.img_processor", Reads("vision_config.feature_layer")),),
            fixed=False,
            even=False,
        ),
        "molmo2": Family(
            (TowerPlace("model.vision_tower", Reads("adapter_config.vision_feature_layer", counts="blocks")),), even=False
        ),
        "granite4_vision": Family(
            (TowerPlace("model.vision_tower", Reads("deepstack_layer_map", also="spatial_vision_layer")),),
            fixed=False,
            even=False,
        ),
        "clipseg": Family((TowerPlace("clip.vision_model", Reads("extract_layers", counts="blocks")),)),
        # The language side reads the end of the tower.
        **dict.fromkeys(("paligemma", "gemma3"), Family((_VISION_TOWER,))),
        **dict.fromkeys(("cohere2_vision", "got_ocr2", "ovis2", "florence2"), Family((_VISION_TOWER,), fixed=False)),
        **dict.fromkeys(("lfm2_vl", "gemma4", "kimi_k25", "minicpmv4_6"), Family((_VISION_TOWER,), fixed=False, even=False)),
        **dict.fromkeys(("deepseek_vl", "janus"), Family((_VISION_MODEL,))),
        "video_llama_3": Family((_VISION_MODEL,), even=False),
        **dict.fromkeys(("idefics", "idefics2", "idefics3", "smolvlm"), Family((_VISION_MODEL,), fixed=False)),
        **dict.fromkeys(
            ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl"),
            Family((_VISUAL,)),
        ),
        **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), Family((_DEEPSTACK,))),
        "mllama": Family(
            (
                TowerPlace(
                    "model.vision_model",
                    Reads("vision_config.intermediate_layers_indices", counts="blocks", and_last=True),
                ),
            ),
            even=False,
        ),
        "deepseek_vl_hybrid": Family(
            (
                _VISION_MODEL,
                TowerPlace(
                    "model.high_res_vision_model",
                    Reads("high_res_vision_config.global_attn_indexes", counts="blocks", and_last=True),
                ),
            )
        ),
        "lighton_ocr": Family((TowerPlace("model.vision_encoder"),)),
        "t5gemma2": Family((TowerPlace("model.encoder.vision_tower"),)),
        "git": Family((TowerPlace("git.image_encoder"),)),
        **dict.fromkeys(("vision-encoder-decoder", "pix2struct"), Family((TowerPlace("encoder"),))),
        **dict.fromkeys(
            ("blip", "blip-2", "instructblip", "kosmos-2", "kosmos-2.5"),
            Family((_BARE,)),
        ),
        "llama4": Family((TowerPlace("vision_model", drops_class=True),)),
        "instructblipvideo": Family((_BARE,), fixed=False),
        # Dual encoders.
        **dict.fromkeys(
            ("clip", "siglip", "siglip2", "altclip", "chinese_clip", "metaclip_2", "aimv2", "align", "owlvit", "owlv2",
             "tipsv2", "groupvit"),
            Family((_BARE,)),
        ),
        # timm towers: their own config does not say what they are.
        "perception_lm": Family(
            (
                TowerPlace(
                    "model.vision_tower",
                    drops_class=("vision_use_cls_token", True),
                    tower=Tower("timm_model.blocks", class_token="first", class_parameter="timm_model.cls_token"),
                ),
            ),
            fixed=False,
        ),
        "gemma3n": Family(
            (TowerPlace("model.vision_tower", Reads(last=2), tower=Tower("timm_model.blocks", shape="maps")),)
        ),
        "fast_vlm": Family((TowerPlace("model.vision_tower", tower=Tower("timm_model.stages", shape="maps")),)),
        # No vision tower.
        "fuyu": Family(refused="Fuyu has no vision tower: patches go through one linear layer into the language model"),
        "udop": Family(refused="UDOP has no vision tower: patch embeddings are mixed into the text encoder's input"),
        "chameleon": Family(refused="Chameleon has no residual stream for images: they become discrete VQ-VAE tokens"),
    }
)  # fmt: skip
"""By the `model_type` of the model's config."""

_LAYERS = "model.language_model.layers"
_PROJECTOR = Behind(_LAYERS, "model.multi_modal_projector")
_ALIGNER = Behind(_LAYERS, "model.aligner")
_CONNECTOR = Behind("model.text_model.layers", "model.connector")
_MERGER = Behind(_LAYERS, "model.visual.merger")
_NO_PROJECTOR = Behind(_LAYERS)
"""Its projector runs once for each image or for each of two towers, or writes something else than tokens."""

BEHIND: Mapping[str, Behind] = MappingProxyType(
    {
        **dict.fromkeys(
            ("llava", "mistral3", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "internvl", "aria",
             "paligemma", "gemma3"),
            _PROJECTOR,
        ),
        "got_ocr2": Behind(_LAYERS, "model.multi_modal_projector", "batch"),
        **dict.fromkeys(("aya_vision", "cohere2_vision"), Behind(_LAYERS, "model.multi_modal_projector", "grid")),
        "lighton_ocr": Behind(_LAYERS, "model.vision_projection"),
        **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid", "janus"), _ALIGNER),
        **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _CONNECTOR),
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm_ocr"), _MERGER),
        **dict.fromkeys(("paddleocr_vl", "video_llama_3"), Behind(_LAYERS, "model.projector")),
        "gemma4": Behind(_LAYERS, "model.embed_vision", "packed"),
        **dict.fromkeys(("video_llava", "lfm2_vl", "molmo2", "kimi_k25", "minicpmv4_6", "ovis2"), _NO_PROJECTOR),
    }
)  # fmt: skip
"""By the `model_type` of the model's config."""
