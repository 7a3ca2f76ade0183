"""The sizes of the members of Gemma 4, as released and tiny.

26b-a4b, 31b, e2b, e4b and 12b have the sizes of the released models. `tiny` and
tiny-… are small models of the same kinds: `tiny` of 26b-a4b, the others of their names.
"""

import dataclasses
from typing import Optional

from gemma4.checkpoint import fp8

# The side of a block of weights that share a scale.
FP8_BLOCK, TINY_FP8_BLOCK = 128, 32


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one model and of the MTP draft model that goes with it.

    `text`, `vision`, `audio` and `draft` are arguments of transformers' configs, and
    `draft_head` those of the draft's own, beside its text config. `soft_tokens` is the
    largest number of tokens an image takes.
    """

    text: dict
    vision: dict
    draft: dict
    multimodal_ids: dict
    soft_tokens: int
    audio: Optional[dict] = None
    draft_head: dict = dataclasses.field(default_factory=dict)

    # Gemma 4 Unified: the same text model, and no towers before it.
    unified: bool = False

    # Weights of the released shapes are N(0, 0.02) and ones; those of the tiny ones
    # are made for tests that compare logits (see weights.py).
    tiny: bool = False

    def fp8_form(self, name: str, assistant: bool = False):
        block = TINY_FP8_BLOCK if self.tiny else FP8_BLOCK
        mixed = "num_experts" in self.text and not assistant
        return fp8.Form(name, block, mixed)

    def with_text(self, **text) -> "Shape":
        """This shape, its text model with other arguments."""
        return dataclasses.replace(self, text={**self.text, **text})

    def transformers_class(self, name: str):
        """The class that transformers calls Gemma4… or Gemma4Unified…."""
        import transformers

        return getattr(transformers, f"Gemma4{'Unified' if self.unified else ''}{name}")


# Sizes of the released models are those of transformers' conversion scripts,
# convert_gemma4_weights.py and convert_gemma4_unified_weights.py, with the defaults of
# the config classes where those say nothing. The drafts' are from the config.json of
# the released google/gemma-4-…-it-assistant; the unified one's from the script.
RELEASED_IDS = {
    "boi_token_id": 255999,
    "boa_token_id": 256000,
    "image_token_id": 258880,
    "audio_token_id": 258881,
    "eoi_token_id": 258882,
    "eoa_token_id": 258883,
    "video_token_id": 258884,
}
RELEASED_TEXT = {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
}
RELEASED_SMALL_TEXT = {
    **RELEASED_TEXT,
    "num_attention_heads": 8,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "use_bidirectional_attention": None,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
}
RELEASED_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "global_head_dim": 72,
    "standardize": True,
}
RELEASED_SMALL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "global_head_dim": 64,
    "use_clipped_linears": True,
}
RELEASED_DRAFT = {"hidden_size": 1024, "intermediate_size": 8192}
RELEASED_SMALL_DRAFT = {
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
}
RELEASED_SMALL_DRAFT_HEAD = {
    "use_ordered_embeddings": True,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
}
# Keys of the other members that a released unified config states and no model reads.
UNIFIED_UNUSED = {
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}

TINY_IDS = {name: 2048 - 8 + i for i, name in enumerate(RELEASED_IDS)}
TINY_TEXT = {
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 2048,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 32,
    "max_position_embeddings": 8192,
    # Logits are small (see weights.py), and the cap must still bend them.
    "final_logit_softcapping": 1.0,
}
TINY_SMALL_TEXT = {
    **TINY_TEXT,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 16,
    "attention_k_eq_v": False,
    "use_bidirectional_attention": None,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 640,
    "standardize": True,
}
TINY_SMALL_VISION = {
    **TINY_VISION,
    "standardize": False,
    "use_clipped_linears": True,
}
TINY_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # transformers takes the first for the number of mel bins, too.
    "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 48,
}
TINY_DRAFT = {"hidden_size": 64, "intermediate_size": 128}
TINY_SMALL_DRAFT_HEAD = {
    "use_ordered_embeddings": True,
    "num_centroids": 64,
    "centroid_intermediate_top_k": 8,
}

SLIDING, FULL = "sliding_attention", "full_attention"

_TINY = Shape(TINY_TEXT, TINY_VISION, TINY_DRAFT, TINY_IDS, 70, tiny=True)
_TINY_SMALL = Shape(
    *(TINY_SMALL_TEXT, TINY_SMALL_VISION, {**TINY_DRAFT, "num_attention_heads": 2}),
    *(TINY_IDS, 70, TINY_AUDIO, TINY_SMALL_DRAFT_HEAD),
    tiny=True,
)
_RELEASED = Shape(RELEASED_TEXT, RELEASED_VISION, RELEASED_DRAFT, RELEASED_IDS, 280)
_RELEASED_SMALL = Shape(
    *(RELEASED_SMALL_TEXT, RELEASED_SMALL_VISION, RELEASED_SMALL_DRAFT),
    *(RELEASED_IDS, 280, {}, RELEASED_SMALL_DRAFT_HEAD),
)
E2B_LAYERS = [SLIDING] * 4 + [FULL]

SHAPES = {
    "tiny": _TINY.with_text(
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=32,
    ),
    "tiny-31b": _TINY.with_text(
        intermediate_size=256, num_attention_heads=8, num_key_value_heads=4
    ),
    "tiny-e2b": _TINY_SMALL.with_text(
        num_hidden_layers=10,
        layer_types=E2B_LAYERS * 2,
        num_key_value_heads=1,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
    ),
    "tiny-e4b": _TINY_SMALL.with_text(num_kv_shared_layers=6),
    "tiny-12b": dataclasses.replace(
        _TINY.with_text(intermediate_size=256),
        vision={"mm_embed_dim": 128, "output_proj_dims": 128},
        audio={},
        unified=True,
    ),
    "26b-a4b": _RELEASED.with_text(
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    ),
    "31b": _RELEASED.with_text(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
    ),
    "e2b": _RELEASED_SMALL.with_text(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        layer_types=E2B_LAYERS * 7,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "e4b": _RELEASED_SMALL.with_text(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=42,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
    ),
    "12b": dataclasses.replace(
        _RELEASED.with_text(
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=1,
        ),
        vision={},
        audio={},
        unified=True,
    ),
}
