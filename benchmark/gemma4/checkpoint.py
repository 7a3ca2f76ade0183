"""Write a loadable Gemma 4 checkpoint folder with random weights.

    python benchmark/gemma4/checkpoint.py OUT --shape tiny
    python benchmark/gemma4/checkpoint.py OUT --shape 26b-a4b --assistant
    python benchmark/gemma4/checkpoint.py OUT --shape e2b --no-weights
    python benchmark/gemma4/checkpoint.py OUT --shape 31b --weights fp8-dynamic

The folder holds what a released one holds: config, generation config, tokenizer,
chat template, processor, and sharded safetensors with an index. Names and shapes of
the weights are those that transformers saves a model of the config under, built on the
meta device.

26b-a4b, 31b, e2b, e4b and 12b have the sizes of the released models. `tiny` and
tiny-… are small models of the same kinds: `tiny` of 26b-a4b, the others of their names.

Each weight is drawn from a generator seeded by the seed and the weight's name, so a
weight's values depend neither on the order of drawing nor on the other weights. The
large shapes are drawn on the GPU when there is one, and a GPU's generator gives other
numbers than a CPU's; the tiny ones are always drawn on the CPU and are the same
everywhere. With `--weights` the same weights are stored in FP8, in one of the forms of
fp8_forms.py.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
RECIPE_FILE = "checkpoint.json"
# Raised whenever the same arguments begin to give another folder.
RECIPE_VERSION = 4
CONFIG_FORMATS = ("flat", "per-layer")
# The side of a block of weights that share a scale.
FP8_BLOCK, TINY_FP8_BLOCK = 128, 32
CLIP_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
MAX_SHARD_BYTES = 2 * 10**9
# Tokenizer, processor and configs of a large shape come to about 25 MB.
OTHER_FILES_BYTES = 40 * 10**6

PAD, EOS, BOS, UNK, MASK = range(5)
TOOL_RESPONSE, TURN_START, TURN_END = 50, 105, 106
CONTROL_TOKENS = {
    PAD: "<pad>",
    EOS: "<eos>",
    BOS: "<bos>",
    UNK: "<unk>",
    MASK: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    TOOL_RESPONSE: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    TURN_START: "<|turn>",
    TURN_END: "<turn|>",
}
# Attributes of the tokenizer that the processor reads, and tools look up.
NAMED_TOKENS = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
}
VIDEO_TOKEN = "<|video|>"
FIRST_BYTE_TOKEN = 238
FIRST_TEXT_TOKEN = FIRST_BYTE_TOKEN + 256

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] or [] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- elif part['type'] in ('image', 'audio', 'video') -%}
                {{- '<|' + part['type'] + '|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def _fp8_forms():
    """The module beside this one, which nothing but weights in FP8 asks for."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import fp8_forms
    finally:
        sys.path.pop(0)
    return fp8_forms


class CheckpointError(Exception):
    """A request that cannot be met; the message is one sentence for the user."""


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
    # are made for tests that compare logits (see _fill_tiny).
    tiny: bool = False

    def fp8_form(self, name: str, assistant: bool = False):
        block = TINY_FP8_BLOCK if self.tiny else FP8_BLOCK
        mixed = "num_experts" in self.text and not assistant
        return _fp8_forms().Form(name, block, mixed)

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
    # Logits are small (see _fill_tiny), and the cap must still bend them.
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

SHAPES = {
    "tiny": Shape(
        text={
            **TINY_TEXT,
            "enable_moe_block": True,
            "num_experts": 16,
            "top_k_experts": 4,
            "moe_intermediate_size": 32,
        },
        vision=TINY_VISION,
        draft=TINY_DRAFT,
        multimodal_ids=TINY_IDS,
        soft_tokens=70,
        tiny=True,
    ),
    "tiny-31b": Shape(
        text={
            **TINY_TEXT,
            "intermediate_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        vision=TINY_VISION,
        draft=TINY_DRAFT,
        multimodal_ids=TINY_IDS,
        soft_tokens=70,
        tiny=True,
    ),
    "tiny-e2b": Shape(
        text={
            **TINY_SMALL_TEXT,
            "num_hidden_layers": 10,
            "layer_types": ([SLIDING] * 4 + [FULL]) * 2,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 5,
            "use_double_wide_mlp": True,
        },
        vision=TINY_SMALL_VISION,
        audio=TINY_AUDIO,
        draft={**TINY_DRAFT, "num_attention_heads": 2},
        draft_head=TINY_SMALL_DRAFT_HEAD,
        multimodal_ids=TINY_IDS,
        soft_tokens=70,
        tiny=True,
    ),
    "tiny-e4b": Shape(
        text={**TINY_SMALL_TEXT, "num_kv_shared_layers": 6},
        vision=TINY_SMALL_VISION,
        audio=TINY_AUDIO,
        draft={**TINY_DRAFT, "num_attention_heads": 2},
        draft_head=TINY_SMALL_DRAFT_HEAD,
        multimodal_ids=TINY_IDS,
        soft_tokens=70,
        tiny=True,
    ),
    "tiny-12b": Shape(
        text={**TINY_TEXT, "intermediate_size": 256},
        vision={"mm_embed_dim": 128, "output_proj_dims": 128},
        audio={},
        draft=TINY_DRAFT,
        multimodal_ids=TINY_IDS,
        soft_tokens=70,
        unified=True,
        tiny=True,
    ),
    "26b-a4b": Shape(
        text={
            **RELEASED_TEXT,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
        vision=RELEASED_VISION,
        draft=RELEASED_DRAFT,
        multimodal_ids=RELEASED_IDS,
        soft_tokens=280,
    ),
    "31b": Shape(
        text={
            **RELEASED_TEXT,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
        },
        vision=RELEASED_VISION,
        draft=RELEASED_DRAFT,
        multimodal_ids=RELEASED_IDS,
        soft_tokens=280,
    ),
    "e2b": Shape(
        text={
            **RELEASED_SMALL_TEXT,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
        },
        vision=RELEASED_SMALL_VISION,
        audio={},
        draft=RELEASED_SMALL_DRAFT,
        draft_head=RELEASED_SMALL_DRAFT_HEAD,
        multimodal_ids=RELEASED_IDS,
        soft_tokens=280,
    ),
    "e4b": Shape(
        text={
            **RELEASED_SMALL_TEXT,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 42,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
        },
        vision=RELEASED_SMALL_VISION,
        audio={},
        draft=RELEASED_SMALL_DRAFT,
        draft_head=RELEASED_SMALL_DRAFT_HEAD,
        multimodal_ids=RELEASED_IDS,
        soft_tokens=280,
    ),
    "12b": Shape(
        text={
            **RELEASED_TEXT,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
        },
        vision={},
        audio={},
        draft=RELEASED_DRAFT,
        multimodal_ids=RELEASED_IDS,
        soft_tokens=280,
        unified=True,
    ),
}


# Configs ---------------------------------------------------------------------


def _text_config(shape: Shape, **overrides):
    arguments = {
        "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        **shape.text,
        **overrides,
    }
    if shape.unified:
        arguments = {k: v for k, v in arguments.items() if k not in UNIFIED_UNUSED}
    return shape.transformers_class("TextConfig")(**arguments)


def _target_config(shape: Shape, text_only: bool, dtype: str):
    text = _text_config(shape, dtype=dtype)
    if text_only:
        text.use_bidirectional_attention = None
        text.architectures = [shape.transformers_class("ForCausalLM").__name__]
        text.eos_token_id = [EOS, TURN_END, TOOL_RESPONSE]
        return text
    ids = dict(shape.multimodal_ids)
    # transformers calls it eoa_token_index, other readers eoa_token_id.
    ids["eoa_token_index"] = ids["eoa_token_id"]
    vision, extra = dict(shape.vision), {}
    if shape.unified:
        del ids["eoa_token_id"]
    else:
        vision["default_output_length"] = shape.soft_tokens
        extra["vision_soft_tokens_per_image"] = shape.soft_tokens
    return shape.transformers_class("Config")(
        architectures=[shape.transformers_class("ForConditionalGeneration").__name__],
        text_config=text,
        vision_config=shape.transformers_class("VisionConfig")(**vision, dtype=dtype),
        audio_config=(
            None
            if shape.audio is None
            else shape.transformers_class("AudioConfig")(**shape.audio, dtype=dtype)
        ),
        dtype=dtype,
        bos_token_id=BOS,
        eos_token_id=[EOS, TURN_END, TOOL_RESPONSE],
        pad_token_id=PAD,
        **extra,
        **ids,
    )


def _draft_config(shape: Shape, dtype: str):
    """The config of the draft model.

    The draft reads the keys and values of the target's last sliding and last full
    layer, so its attention has the target's geometry.
    """
    text = _text_config(
        shape,
        **{
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "layer_types": [SLIDING] * 3 + [FULL],
            "final_logit_softcapping": None,
            "use_bidirectional_attention": None,
            "use_double_wide_mlp": False,
            **UNIFIED_UNUSED,
            **shape.draft,
            "dtype": dtype,
        },
    )
    return shape.transformers_class("AssistantConfig")(
        architectures=[shape.transformers_class("AssistantForCausalLM").__name__],
        dtype=dtype,
        text_config=text,
        backbone_hidden_size=shape.text["hidden_size"],
        bos_token_id=BOS,
        eos_token_id=[EOS, TURN_END, TOOL_RESPONSE],
        pad_token_id=PAD,
        **shape.draft_head,
    )


def _flatten(config: dict, shape: Shape) -> None:
    """Write what is told per layer as transformers 5.6 and the released folders do."""
    text = config.get("text_config", config)
    text.pop("per_layer_config", None)  # absent where all layers are alike
    text["global_head_dim"] = shape.text["global_head_dim"]
    text["num_global_key_value_heads"] = shape.text["num_global_key_value_heads"]
    if shape.unified:
        text.update(UNIFIED_UNUSED)
    elif config.get("vision_config"):
        config["vision_config"]["rope_parameters"]["rope_type"] = "default"


# Tokenizer and processor -----------------------------------------------------


def _vocabulary(shape: Shape):
    """Build the BPE vocabulary and its merges.

    Beside control tokens, bytes and single characters it holds words "▁" + letters,
    and with each word all that it begins with. A merge appends one letter to such a
    beginning, so text that was decoded from words encodes to the same words again.

    Returns `(vocab, merges)`: token -> id, and pairs in order of rank.
    """
    size = shape.text["vocab_size"]
    ids = shape.multimodal_ids
    reserved = dict(CONTROL_TOKENS)
    for name, index in ids.items():
        name = name[: -len("_id")]
        reserved[index] = NAMED_TOKENS.get(name, VIDEO_TOKEN)
    for byte in range(256):
        reserved[FIRST_BYTE_TOKEN + byte] = f"<0x{byte:02X}>"
    for index in range(FIRST_BYTE_TOKEN):
        reserved.setdefault(index, f"<unused{index}>")

    consonants, vowels = "bdfghjklmnprstvz", "aeiou"
    characters = ["▁", "\n"] + [chr(c) for c in range(33, 127)]
    merges = []

    def words() -> Iterator[str]:
        stems, depth = ["▁"], 0
        while True:
            letters = vowels if depth % 2 else consonants
            longer = []
            for stem in stems:
                for letter in letters:
                    merges.append((stem, letter))
                    longer.append(stem + letter)
                    yield stem + letter
            stems, depth = longer, depth + 1

    texts, vocab = words(), {}
    for index in range(size):
        if index in reserved:
            token = reserved[index]
        elif characters:
            token = characters.pop(0)
        else:
            token = next(texts)
        vocab[token] = index
    texts.close()
    return vocab, merges


def _tokenizer(shape: Shape):
    from transformers import GemmaTokenizer

    vocab, merges = _vocabulary(shape)
    return GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        padding_side="left",
        model_max_length=shape.text["max_position_embeddings"],
        extra_special_tokens=[VIDEO_TOKEN],
        chat_template=CHAT_TEMPLATE,
        **NAMED_TOKENS,
    )


def _processor(shape: Shape, tokenizer):
    return shape.transformers_class("Processor")(
        feature_extractor=shape.transformers_class("AudioFeatureExtractor")(),
        image_processor=shape.transformers_class("ImageProcessor")(
            max_soft_tokens=shape.soft_tokens
        ),
        video_processor=shape.transformers_class("VideoProcessor")(max_soft_tokens=70),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=shape.soft_tokens,
    )


# Weights ---------------------------------------------------------------------


def _meta_model(config) -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])(config)


def on_meta(config) -> dict[str, torch.Tensor]:
    """Names and shapes that save_pretrained of the config's model class would write."""
    from transformers.core_model_loading import revert_weight_conversion

    model = _meta_model(config)
    tied = model.all_tied_weights_keys
    weights = {k: v for k, v in model.state_dict().items() if k not in tied}
    # Modules of Gemma 4 Unified are named otherwise than its checkpoints.
    return revert_weight_conversion(model, weights)


def _generator(seed: int, name: str, device: str) -> torch.Generator:
    # A text-only folder gets the text weights of the full one.
    name = name.replace("language_model.", "")
    # Projections of the same input clip it alike.
    if name.endswith(CLIP_BOUNDS[:2]):
        name = re.sub(r"\b(q|k|v|gate|up)_proj\b", "proj", name)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def _fill_released(name: str, weight: torch.Tensor, generator: torch.Generator):
    if weight.dim() > 1:
        weight.normal_(0.0, 0.02, generator=generator)
    elif name.endswith(CLIP_BOUNDS):
        weight.fill_(-math.inf if name.endswith("_min") else math.inf)
    else:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)


def _fill_tiny(name: str, weight: torch.Tensor, generator: torch.Generator):
    """Spread a tiny model's weights so that its logits can be compared.

    A wrong window, a dropped scale or a swapped layer must move the logits far more
    than float32 rounding does, and bfloat16 rounding must not move them far. Norms and
    scales therefore vary about 1, each its own. Queries are short, so that attention
    is spread over the window. Layers add little to the residual stream, or rounding
    would grow from layer to layer. Routers are sharp, so that the last of the chosen
    experts weighs little: rounding decides near ties among them either way.
    """
    if name.endswith("layer_scalar"):
        weight.uniform_(0.9, 1.0, generator=generator)
    elif name.endswith("std_bias"):
        weight.zero_()
    elif name.endswith(CLIP_BOUNDS):
        weight.uniform_(2.0, 4.0, generator=generator)
        if name.endswith("_min"):
            weight.neg_()
    elif name.endswith(".bias"):
        weight.normal_(0.0, 0.1, generator=generator)
    elif weight.dim() == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
        if name.endswith("q_norm.weight"):
            weight.mul_(0.7 * weight.numel() ** -0.5)
        elif name.endswith(
            (
                "post_attention_layernorm.weight",
                "post_feedforward_layernorm.weight",
                "post_per_layer_input_norm.weight",
            )
        ):
            weight.mul_(0.15)
        elif name.endswith("post_feedforward_layernorm_2.weight"):
            weight.mul_(0.3)
        elif name in ("model.norm.weight", "model.language_model.norm.weight"):
            # The output head is tied to the embedding: with one sign for all, the
            # likeliest next token would always be the last one.
            signs = torch.randint(0, 2, weight.shape, generator=generator)
            weight.mul_(2 * signs - 1)
    elif name.endswith("router.proj.weight"):
        weight.normal_(0.0, 5.0, generator=generator)
    elif name.endswith("embed_tokens.weight"):
        weight.normal_(0.0, 0.15 * weight.shape[-1] ** -0.5, generator=generator)
    elif name.endswith("embed_tokens_per_layer.weight"):
        # A row holds the inputs of all layers, and each is scaled by its own size.
        weight.normal_(0.0, 0.25, generator=generator)
    else:
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)


def _draw(
    shape: Shape,
    seed: int,
    name: str,
    size: torch.Size,
    dtype: torch.dtype,
    device: str,
) -> torch.Tensor:
    """Draw one weight; returns it on `device` in `dtype`."""
    generator = _generator(seed, name, device)
    if dtype == torch.long:
        # The draft's order of the vocabulary, the only weight of integers.
        return torch.randperm(size[0], generator=generator, device=device)
    if shape.tiny:
        weight = torch.empty(size, device=device)
        _fill_tiny(name, weight, generator)
    else:
        weight = torch.empty(size, dtype=dtype, device=device)
        _fill_released(name, weight, generator)
    if name.endswith("embed_tokens.weight"):
        # Random text should neither end at once nor consist of half characters.
        weight[:FIRST_TEXT_TOKEN] *= 0.1
        for index in shape.multimodal_ids.values():
            weight[index] *= 0.1
    return weight.to(dtype)


def _stored(form, name: str, weight: torch.Tensor):
    return {name: weight} if form is None else form.stored(name, weight)


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in tensors.values())


def _save_weights(
    folder: Path,
    shape: Shape,
    seed: int,
    weights: dict[str, torch.Tensor],
    form,
    max_shard_bytes: int,
) -> None:
    """Draw and save shard by shard; at most one shard a thread is held in memory."""
    stored, drawn_as = {}, {}
    for name, weight in weights.items():
        parts = _stored(form, name, weight)
        stored.update(parts)
        drawn_as.update(dict.fromkeys(parts, name))
    plan = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_bytes)
    device = "cuda" if torch.cuda.is_available() and not shape.tiny else "cpu"
    threads = 6 if device == "cuda" else 2
    total = _bytes(stored)

    def save(tensors: dict[str, torch.Tensor], path: Path) -> int:
        save_file(tensors, path, metadata={"format": "pt"})
        # safetensors makes its files private.
        shutil.copymode(folder / "config.json", path)
        return _bytes(tensors)

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=None)
        )
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        running = []
        for file, names in plan.filename_to_tensors.items():
            if len(running) == threads:
                progress.update(running.pop(0).result())
            tensors = {}
            for name, parts in itertools.groupby(names, drawn_as.get):
                size, dtype = weights[name].shape, weights[name].dtype
                weight = _draw(shape, seed, name, size, dtype, device)
                whole = _stored(form, name, weight)
                tensors.update({part: whole[part].cpu() for part in parts})
            running.append(pool.submit(save, tensors, folder / file))
        for future in running:
            progress.update(future.result())

    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


# The folder ------------------------------------------------------------------


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _read_recipe(folder: Path) -> Optional[dict]:
    try:
        return json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _claim(partial: Path) -> Iterator[None]:
    """Make `partial` an empty folder that is this process's alone, and remove it after.

    What a killed process left behind is removed; a folder that a living one writes
    to is not touched.
    """
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have just finished and renamed the folder.
            if not os.path.samestat(os.fstat(handle), os.stat(partial)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise CheckpointError(
                f"{partial} is being written by another process; wait for it to end."
            ) from None
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield
    finally:
        try:
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                shutil.rmtree(partial)
        except FileNotFoundError:
            pass
        os.close(handle)


def write_checkpoint(
    out,
    shape: str = "tiny",
    *,
    assistant: bool = False,
    text_only: bool = False,
    dtype: str = "bfloat16",
    seed: int = 0,
    weights: bool = True,
    fp8: Optional[str] = None,
    config_format: str = "flat",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> bool:
    """Write a checkpoint folder with random weights.

    Args:
        out: the folder to make. It appears under this name only when it is whole.
        shape: a name in `SHAPES`.
        assistant: write the MTP draft model of the shape instead of the shape.
        text_only: write a text model's folder, without vision tower and processor.
        dtype: a name in `DTYPES`.
        seed: what all weights are drawn from.
        weights: False leaves the weights out, for `--load-format dummy`.
        fp8: a name in fp8_forms.FORMS, for weights in FP8; None for `dtype`.
        config_format: "flat" states `global_head_dim` and `num_global_key_value_heads`,
            as the released folders and transformers 5.6 do; "per-layer" states
            `per_layer_config`, as transformers 5.19 does, which reads both.
        overwrite: replace a folder that this function wrote with other arguments.
        max_shard_bytes: size of a safetensors file, unless one weight is larger.

    Returns:
        True if the folder was written, False if it was there already, made with the
        same arguments.

    Raises:
        CheckpointError: the arguments exclude each other, `out` holds something else,
            or the disk is too small. Nothing was changed.
    """
    if shape not in SHAPES:
        raise CheckpointError(
            f"Unknown shape {shape!r}; choose one of {', '.join(SHAPES)}."
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}."
        )
    if config_format not in CONFIG_FORMATS:
        raise CheckpointError(
            f"Unknown config format {config_format!r}; choose one of "
            f"{', '.join(CONFIG_FORMATS)}."
        )
    if fp8 is not None and fp8 not in _fp8_forms().FORMS:
        raise CheckpointError(
            f"Unknown form of FP8 {fp8!r}; choose one of "
            f"{', '.join(_fp8_forms().FORMS)}."
        )
    if assistant and text_only:
        raise CheckpointError(
            "An assistant has no vision tower to leave out; drop one of --assistant "
            "and --text-only."
        )
    out = Path(out).absolute()
    recipe = {
        "version": RECIPE_VERSION,
        "shape": shape,
        "assistant": assistant,
        "text_only": text_only,
        "dtype": dtype,
        "seed": seed,
        "weights": weights,
        "config_format": config_format,
        "max_shard_bytes": max_shard_bytes,
    }
    if fp8 is not None:
        recipe["fp8"] = fp8
    if _is_there(out, recipe, overwrite):
        return False

    spec = SHAPES[shape]
    config = (
        _draft_config(spec, dtype)
        if assistant
        else _target_config(spec, text_only, dtype)
    )
    form = None if fp8 is None else spec.fp8_form(fp8, assistant)
    tensors = {
        k: v.to(DTYPES[dtype]) if v.is_floating_point() else v
        for k, v in on_meta(config).items()
    }
    if form is not None:
        linears = [
            name
            for name, module in _meta_model(config).named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        config.quantization_config = form.config(linears)
    if not weights:
        tensors = {}
    needed = OTHER_FILES_BYTES + sum(
        _bytes(_stored(form, name, weight)) for name, weight in tensors.items()
    )

    parent = out.parent
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:
            raise CheckpointError(
                f"{e.filename} is not a folder; choose another name for {out}."
            ) from None
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise CheckpointError(
                f"{out} needs {_size(needed)} and {parent} has {_size(free)} free; "
                "make room or choose another folder."
            )
        partial = parent / f".{out.name}.partial"
        with _claim(partial):
            _write_files(partial, spec, config, config_format)
            if tensors:
                _save_weights(partial, spec, seed, tensors, form, max_shard_bytes)
            _write_json(partial / RECIPE_FILE, recipe)
            _publish(partial, out, recipe, overwrite)
    except OSError as e:
        raise CheckpointError(
            f"Cannot write {e.filename or out}: {e.strerror or e}."
        ) from e
    return True


def _is_there(out: Path, recipe: dict, overwrite: bool) -> bool:
    """Whether `out` is what would be written; raises if it is in the way."""
    if not os.path.lexists(out):
        return False
    if not out.is_dir():
        raise CheckpointError(f"{out} is not a folder; choose another name.")
    found = _read_recipe(out)
    if found == recipe:
        return not overwrite
    if found is None:
        if not any(out.iterdir()):
            return False
        raise CheckpointError(
            f"{out} holds files that this program did not write; choose another "
            "folder or remove it yourself."
        )
    if not overwrite:
        changed = ", ".join(
            f"{key} {found.get(key)!r} instead of {recipe.get(key)!r}"
            for key in {**recipe, **found}
            if found.get(key) != recipe.get(key)
        )
        raise CheckpointError(
            f"{out} holds another checkpoint ({changed}); pass --overwrite to replace "
            "it or choose another folder."
        )
    return False


def _write_files(folder: Path, shape: Shape, config, config_format: str) -> None:
    from transformers import GenerationConfig

    multimodal = hasattr(config, "vision_config")
    tokenizer = _tokenizer(shape)
    (_processor(shape, tokenizer) if multimodal else tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    if config_format == "flat":
        path = folder / "config.json"
        values = json.loads(path.read_text())
        _flatten(values, shape)
        _write_json(path, values)
    ids = shape.multimodal_ids
    GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=[EOS, TURN_END, TOOL_RESPONSE],
        pad_token_id=PAD,
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
        # A unified model's embeddings of these two are no output's.
        suppress_tokens=(
            [ids["eoa_token_id"], ids["eoi_token_id"]]
            if multimodal and shape.unified
            else None
        ),
    ).save_pretrained(folder)


def _publish(partial: Path, out: Path, recipe: dict, overwrite: bool) -> None:
    """Give the whole folder its name."""
    # Something may have appeared there while the weights were written.
    if _is_there(out, recipe, overwrite):
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if _read_recipe(out) is not None:
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


# Command line ----------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--assistant", action="store_true", help="the shape's MTP draft model"
    )
    kind.add_argument(
        "--text-only", action="store_true", help="a text model's folder, without vision"
    )
    parser.add_argument(
        "--weights",
        choices=_fp8_forms().FORMS,
        help="store them in FP8, in one of the published forms (see fp8_forms.py)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--config-format",
        choices=CONFIG_FORMATS,
        default="flat",
        help="as transformers 5.6 (flat) or 5.19 (per-layer) writes config.json",
    )
    parser.add_argument(
        "--no-weights",
        action="store_true",
        help="config and tokenizer alone, for --load-format dummy",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a folder that this program wrote",
    )
    return parser


def main(argv: Optional[list[str]] = None) -> int:
    args = _parser().parse_args(argv)
    # A terminated run leaves no more behind than an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        written = write_checkpoint(
            args.out,
            args.shape,
            assistant=args.assistant,
            text_only=args.text_only,
            dtype=args.dtype,
            seed=args.seed,
            weights=not args.no_weights,
            fp8=args.weights,
            config_format=args.config_format,
            overwrite=args.overwrite,
        )
    except CheckpointError as e:
        print(f"checkpoint.py: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"checkpoint.py: interrupted; {args.out} not written.", file=sys.stderr)
        return 130
    print(f"{args.out}: {'written' if written else 'already there, left alone'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
