"""The configs of a shape: of the model, of its MTP draft, and as config.json has them."""

from gemma4.checkpoint.tiny import FULL, SLIDING, UNIFIED_UNUSED, Shape
from gemma4.checkpoint.tokens import BOS, EOS, PAD, TOOL_RESPONSE, TURN_END


def text_config(shape: Shape, **overrides):
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


def target_config(shape: Shape, text_only: bool, dtype: str):
    text = text_config(shape, dtype=dtype)
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


def draft_config(shape: Shape, dtype: str):
    """The config of the draft model.

    The draft reads the keys and values of the target's last sliding and last full
    layer, so its attention has the target's geometry.
    """
    text = text_config(
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


def flatten(config: dict, shape: Shape) -> None:
    """Writes what is said per layer as transformers 5.6 and the released folders do."""
    text = config.get("text_config", config)
    text.pop("per_layer_config", None)  # absent where all layers are alike
    text["global_head_dim"] = shape.text["global_head_dim"]
    text["num_global_key_value_heads"] = shape.text["num_global_key_value_heads"]
    if shape.unified:
        text.update(UNIFIED_UNUSED)
    elif config.get("vision_config"):
        config["vision_config"]["rope_parameters"]["rope_type"] = "default"
