"""What a member of Gemma 4 is made of, and small models of each kind.

`tiny` is small and of the kind of 26b-a4b, tiny-… of the released model of its name.
"""

import dataclasses
from typing import Optional


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

    def with_text(self, **text) -> "Shape":
        """This shape, its text model with other arguments."""
        return dataclasses.replace(self, text={**self.text, **text})

    def transformers_class(self, name: str):
        """The class that transformers calls Gemma4… or Gemma4Unified…."""
        import transformers

        return getattr(transformers, f"Gemma4{'Unified' if self.unified else ''}{name}")


# Keys of the other members that a released unified config states and no model reads.
UNIFIED_UNUSED = {
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}

MULTIMODAL_IDS = (
    "boi_token_id",
    "boa_token_id",
    "image_token_id",
    "audio_token_id",
    "eoi_token_id",
    "eoa_token_id",
    "video_token_id",
)
TINY_IDS = {name: 2048 - 8 + i for i, name in enumerate(MULTIMODAL_IDS)}
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
E2B_LAYERS = [SLIDING] * 4 + [FULL]

TINY = {
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
}
