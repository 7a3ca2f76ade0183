"""The sizes of the members of Gemma 4, as released and tiny.

26b-a4b, 31b, e2b, e4b and 12b have the sizes of the released models.
"""

import dataclasses

from gemma4.checkpoint.tiny import E2B_LAYERS, TINY, Shape

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
_RELEASED = Shape(RELEASED_TEXT, RELEASED_VISION, RELEASED_DRAFT, RELEASED_IDS, 280)
_RELEASED_SMALL = Shape(
    *(RELEASED_SMALL_TEXT, RELEASED_SMALL_VISION, RELEASED_SMALL_DRAFT),
    *(RELEASED_IDS, 280, {}, RELEASED_SMALL_DRAFT_HEAD),
)

SHAPES = {
    **TINY,
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
