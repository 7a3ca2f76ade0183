"""Every model with sliding windows, as small as it can be built, and what numbers its
layers and its model runner get.

`python3 window_models.py` writes them as JSON; it is a process of its own, as it stands
in for hardware.

What `sliding_window` W of a config means is asked of transformers: the token itself
and the W - 1 before it, in all its causal classes (`kv > q - W`); a radius, itself not
counted, in EmbeddingGemma2. A layer of SGLang is given how many tokens *before its own*
one attends to, by all its backends: FlashAttention and TRT-LLM take it as the left end
of their window, FlashInfer as `window_left`, the CPU's and Triton's kernels keep
`kv >= q - window`. So is the model runner, whose number the backends size their lists
of keys by. Both are W - 1, then.

As SGLang 0.5.23 has them, and how many keys the Triton backend reads then: where it
prefills, one more than the layer's number; where it decodes, as many as the runner's.
(None: no number, and no list of keys to read. An encoder does not decode.)

    model                               W counts  layer  runner  prefill  decode
    AFMoE, Beam, Dots3, EXAONE 4        W         W - 1  W - 1   W        W - 1
    Gemma 2, 3, 4 and its drafts        W         W - 1  W - 1   W        W - 1
    gpt-oss, Inkling and MTP, Mellum    W         W - 1  W - 1   W        W - 1
    Muse Glimmer, Muse Spark, OLMo 3    W         W - 1  W - 1   W        W - 1
    Spark 2.5, DFlash, DSpark           W         W - 1  W - 1   W        W - 1
    DiffusionGemma, EmbeddingGemma      W         W - 1  W - 1   W
    EmbeddingGemma2                     W + 1     W      W       W + 1
    Gemma2ForSequenceClassification     W         W - 1  None    None
    GraniteSWA, GraniteMoeSWA           W         W - 1  W       W        W
    IQuest Q1 and MTP, Laguna           W         W - 1  W       W        W
    gpt-oss in InternVL                 W         W - 1  None    None     None
    Gemma 3n                            W         W      W - 1   W + 1    W - 1
    Jet-Nemotron                        W         W      W       W + 1    W
    MiMo-V2 and MTP                     W         W      W       W + 1    W
    Step-3.5 and MTP, Step-3.7          W         W      W       W + 1    W
    EAGLE-3 with a draft window of W    W         W      W       W + 1    W
    Cohere 2, also its MoE and vision   W         W      None    None     None
    EXAONE MoE and MTP                  W         W      None    None     None
    IQuest LoopCoder                    W         W      None    None     None
    any model of transformers' own      W         W      None    None     None
"""

import importlib
import json
import os
import socket
import sys
import tempfile
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Optional
from unittest import mock

W = 13  # nobody's default
SLIDING, FULL = "sliding_attention", "full_attention"

TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    sliding_window=W,
    layer_types=[SLIDING, FULL],
    dtype="bfloat16",
)
ROPES = {kind: dict(rope_type="default", rope_theta=1e4) for kind in (SLIDING, FULL)}
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def nested(model_type, text_type, vision=VISION, **text):
    """The config of a multimodal model, around that of its text model."""
    config = dict(model_type=model_type, text_config=dict(TEXT, **text))
    config["text_config"]["model_type"] = text_type
    return config | ({"vision_config": vision} if vision else {})


@dataclass
class Model:
    """How to build a model: what is in its folder's config, beside `TEXT`, and more."""

    config: dict
    window: Optional[int] = None  # where the config is not a class of transformers
    windows: bool = True  # whether it has any
    architecture: Optional[str] = None  # in the config, if not that of the model
    draft: bool = False
    impl: str = "auto"
    language_only: bool = False
    text_alone: bool = False  # with the text config of the multimodal one
    load: dict = field(default_factory=dict)
    server: dict = field(default_factory=dict)  # by namespace of the arguments


def model(model_type, **config):
    options = {name: config.pop(name) for name in list(config) if name in OPTIONS}
    return Model(dict(model_type=model_type, **config), **options)


OPTIONS = {option.name for option in fields(Model)} - {"config"}

GEMMA3N = dict(
    num_kv_shared_layers=0,
    intermediate_size=[128, 128],
    activation_sparsity_pattern=[0.0, 0.0],
    vocab_size_per_layer_input=128,
    hidden_size_per_layer_input=16,
    laurel_rank=8,
)
GEMMA4 = dict(
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=0,
    rope_parameters=ROPES,
)
ASSISTANT = dict(GEMMA4, vision=None, num_kv_shared_layers=2)
MIMO = dict(
    model_type="mimo_v2_flash",
    hybrid_layer_pattern=[1, 0],
    moe_layer_freq=[0, 0],
    sliding_window_size=W,  # its folders have both names
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=16,
    swa_v_head_dim=16,
    v_head_dim=16,
    attention_bias=False,
    layernorm_epsilon=1e-6,
    swa_rope_theta=1e4,
    rope_scaling=None,
    **EXPERTS,
)
STEP_LAYERS = 46  # the draft is number 45
STEP = dict(
    model_type="step3p5",
    window=W,
    num_attention_groups=2,
    num_hidden_layers=STEP_LAYERS,
    moe_layers_enum="99",
    attention_other_setting=dict(
        num_attention_heads=4, num_attention_groups=2, head_dim=16
    ),
    layer_types=[SLIDING, FULL] + [SLIDING] * (STEP_LAYERS - 2),
    rope_theta=[1e4] * STEP_LAYERS,
    partial_rotary_factors=[1.0] * STEP_LAYERS,
    swiglu_limits=[0] * STEP_LAYERS,
    swiglu_limits_shared=[0] * STEP_LAYERS,
    num_nextn_predict_layers=1,
    use_head_wise_attn_gate=True,
)
EXAONE_MOE = dict(model_type="exaone_moe", is_moe_layer=[False, True], **EXPERTS)
DFLASH = dict(
    model_type="qwen3",
    use_sliding_window=True,
    dflash_config=dict(target_layer_ids=[0, 1], mask_token_id=5),
    block_size=4,
)
DSPARK = dict(DFLASH, markov_rank=8, markov_head_type="vanilla")


def inkling(**text):
    return model(
        **nested(
            "inkling_mm_model",
            "inkling_model",
            vision=None,
            sliding_window_size=W,
            local_layer_ids=[0],
            **text,
        ),
        window=W,
        draft="num_nextn_predict_layers" in text,
        load=dict(draft_model_idx=0) if "num_nextn_predict_layers" in text else {},
        server=dict(disagg=dict(disaggregation_mode="decode")),
    )


# By architecture.
MODELS = {
    "AfmoeForCausalLM": model("afmoe", **EXPERTS),
    "BeamForCausalLM": model("beam", window=W, **EXPERTS),
    "Cohere2ForCausalLM": model("cohere2"),
    "Cohere2MoeForCausalLM": model("cohere2_moe", **EXPERTS),
    "Cohere2VisionForConditionalGeneration": model(
        **nested("cohere2_vision", "cohere2_moe", **EXPERTS)
    ),
    "CohereForCausalLM": model("cohere", windows=False),
    "DFlashDraftModel": model(**DFLASH),
    "DiffusionGemmaForBlockDiffusion": model(
        **nested(
            "diffusion_gemma",
            "diffusion_gemma_text",
            top_k_experts=2,
            **EXPERTS,
            **GEMMA4,
        )
    ),
    "DSparkDraftModel": model(**DSPARK),
    "DSparkMiniMaxDraftModel": model(
        **DSPARK,
        hidden_act="silu",
        dense_intermediate_size=128,
        moe_layer_freq=[0, 0],
        use_gemma_norm=True,
        rotary_dim=16,
        swiglu_alpha=1.7,
        swiglu_limit=7.0,
    ),
    "Dots3NoteForCausalLM": model(
        "dots3_note",
        window=W,
        sliding_window_size=W,
        language_only=True,
        num_key_value_heads=4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        moe_intermediate_size=32,
    ),
    # It halves what its config says.
    "EmbeddingGemmaModel": model("gemma3_text", use_bidirectional_attention=True),
    # It gives its layers 512 whatever its config says.
    "EmbeddingGemma2Model": model(
        "embedding_gemma2", sliding_window=512, rope_parameters=ROPES
    ),
    "Exaone4ForCausalLM": model("exaone4", sliding_window_pattern="LG"),
    "ExaoneMoEForCausalLM": model(**EXAONE_MOE),
    "ExaoneMoeForCausalLM": model(**EXAONE_MOE),
    "ExaoneMoEForCausalLMMTP": model(
        **EXAONE_MOE, draft=True, architecture="ExaoneMoEForCausalLM"
    ),
    "Gemma2ForCausalLM": model("gemma2", hidden_act="gelu_pytorch_tanh"),
    "Gemma2ForSequenceClassification": model(
        "gemma2", hidden_act="gelu_pytorch_tanh", num_labels=2
    ),
    "Gemma3ForCausalLM": model("gemma3_text"),
    "Gemma3ForConditionalGeneration": model(**nested("gemma3", "gemma3_text")),
    "Gemma3nForCausalLM": model("gemma3n_text", **GEMMA3N),
    "Gemma3nForConditionalGeneration": model(
        **nested("gemma3n", "gemma3n_text", vision=None, **GEMMA3N)
    ),
    "Gemma4AssistantForCausalLM": model(
        **nested("gemma4_assistant", "gemma4_text", **ASSISTANT),
        backbone_hidden_size=64,
    ),
    "Gemma4UnifiedAssistantForCausalLM": model(
        **nested("gemma4_unified_assistant", "gemma4_unified_text", **ASSISTANT),
        backbone_hidden_size=64,
    ),
    "Gemma4ForCausalLM": model(
        **nested("gemma4", "gemma4_text", **GEMMA4),
        architecture="Gemma4ForConditionalGeneration",
        text_alone=True,
    ),
    "Gemma4ForConditionalGeneration": model(
        **nested("gemma4", "gemma4_text", **GEMMA4)
    ),
    "Gemma4UnifiedForConditionalGeneration": model(
        **nested("gemma4_unified", "gemma4_unified_text", vision=None, **GEMMA4)
    ),
    "GptOssForCausalLM": model("gpt_oss", **EXPERTS),
    "GraniteForCausalLM": model("granite", windows=False),
    "GraniteSWAForCausalLM": model("granite_swa"),
    "GraniteMoeForCausalLM": model("granitemoe", windows=False, **EXPERTS),
    "GraniteMoeSharedForCausalLM": model(
        "granitemoeshared", windows=False, shared_intermediate_size=32, **EXPERTS
    ),
    "GraniteMoeSWAForCausalLM": model("granitemoe_swa", **EXPERTS),
    "InklingForConditionalGeneration": inkling(),
    "InklingForConditionalGenerationMTP": inkling(
        num_nextn_predict_layers=1, mtp_local_layer_ids=[0]
    ),
    "IQuestLoopCoderForCausalLM": model("llama", window=W, loop_window_size=W),
    "IQuestQ1ForCausalLM": model(
        "iquest_q1",
        window=W,
        first_layers_types=[SLIDING],
        hybrid_layers_types_block=[FULL],
        num_hybrid_layers_block=1,
        last_layers_types=[],
        rotary_dim=16,
        **EXPERTS,
    ),
    "IQuestQ1MTP": model(
        "iquest_q1_mtp",
        window=W,
        draft=True,
        num_hidden_layers=1,
        layer_types=[SLIDING],
        rotary_dim=16,
        **EXPERTS,
    ),
    "JetNemotronForCausalLM": model(
        "jet_nemotron",
        window=W,
        layer_types=["swa", "attn"],
        efficient_attention_config=dict(swa=dict(window_size=W)),
        hidden_act="silu",
        tie_word_embeddings=False,
    ),
    "LagunaForCausalLM": model("laguna", rope_parameters=ROPES, **EXPERTS),
    # "the most recent N keys", says the help of the option.
    "LlamaForCausalLMEagle3": model(
        "llama",
        window=W,
        draft_vocab_size=128,
        server=dict(spec=dict(speculative_draft_window_size=W)),
    ),
    "MellumForCausalLM": model("mellum", rope_parameters=ROPES, **EXPERTS),
    "MiMoV2FlashForCausalLM": model(**MIMO),
    "MiMoV2ForCausalLM": model(**MIMO),
    "MiMoV2MTP": model(**MIMO, draft=True, architecture="MiMoV2FlashForCausalLM"),
    "MuseGlimmerForCausalLM": model("muse_glimmer", no_rope_layers=[1, 0]),
    "MuseGlimmerForConditionalGeneration": model(
        "muse_glimmer", no_rope_layers=[1, 0], vision_config=VISION
    ),
    "MuseSparkForConditionalGeneration": model(
        **nested(
            "muse_spark", "muse_spark_text", vision=None, moe_hidden_size=64, **EXPERTS
        ),
        audio_config=dict(out_hidden_size=64),
        window=W,
    ),
    "NemotronHForCausalLM": model(
        "nemotron_h",
        windows=False,  # its class of transformers reads none
        sliding_window=None,
        layer_types=[FULL, FULL],
        hybrid_override_pattern="**",
    ),
    "Olmo2ForCausalLM": model("olmo3"),
    "Spark2_5ForCausalLM": model("spark2_5", window=W),
    "Step3p5ForCausalLM": model(**STEP),
    "Step3p5MTP": model(**STEP, draft=True, architecture="Step3p5ForCausalLM"),
    "TransformersForCausalLM": model(
        "gemma2",
        hidden_act="gelu_pytorch_tanh",
        architecture="Gemma2ForCausalLM",
        impl="transformers",
    ),
}


def cuda():
    import torch

    return torch.cuda.is_available()


def stand_in_for_hardware():
    """Models name streams and kernels of a GPU while they are built, and run none."""
    import torch

    torch.cuda.Stream = mock.MagicMock()
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.models import transformers
    from sglang.srt.models.dots3_common import modeling

    base._is_cpu = True
    transformers.get_device = lambda: "cpu"
    modeling._require_cuda = lambda: None


def keys_seen(config, window):
    """How many keys, its own the last, a token far from the start attends to in the
    sliding layers of transformers' class of `config`, or in any with that `window`."""
    import torch
    from transformers import masking_utils

    if window is not None:
        sees = masking_utils.sliding_window_causal_mask_function(window)
        query, key = torch.tensor(3 * window), torch.arange(3 * window + 1)
        return sees(0, 0, query, key).sum().item()
    name = type(config).__module__.replace("configuration_", "modeling_")
    if not name.startswith("transformers."):  # the same, kept by SGLang
        name = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    modeling = importlib.import_module(name)
    create = getattr(modeling, "create_sliding_window_causal_mask", None)
    if create is None:
        create = modeling.create_bidirectional_sliding_window_mask
    config._attn_implementation = "eager"
    query = 2 * config.sliding_window
    mask = create(
        config=config,
        inputs_embeds=torch.zeros(1, 3 * config.sliding_window, 1),
        attention_mask=None,
        past_key_values=None,
    )
    return (mask[0, 0, query, : query + 1] == 0).sum().item()


def numbers(architecture, case):
    """What the layers and the runner of a model get, and what they should read."""
    import torch

    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner_components import load_model_utils
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.models.registry import ModelRegistry

    base = {} if "text_config" in case.config else TEXT
    config = {**base, **case.config}
    config["architectures"] = [case.architecture or architecture]
    with ExitStack() as stack:
        enter = stack.enter_context
        folder = enter(tempfile.TemporaryDirectory())
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file)
        made = ModelConfig(
            folder,
            dtype="bfloat16",
            model_impl=case.impl,
            is_draft_model=case.draft,
            language_only=case.language_only,
        )
        enter(runtime_context.get_model().override(model_path=folder))
        for namespace, values in case.server.items():
            bag = getattr(runtime_context, f"get_{namespace}")()
            enter(bag.override(**values))
        enter(set_default_torch_dtype(torch.bfloat16))
        enter(torch.device("meta"))
        if case.text_alone:
            built, _ = ModelRegistry.resolve_model_cls([architecture])
            built = built(made.hf_text_config)
        else:
            built = loader._initialize_model(made, LoadConfig(**case.load))
    layers = [
        module
        for owner in (built, *getattr(built, "attention_instances", {}).values())
        for module in owner.modules()
        if isinstance(module, RadixAttention)
    ]
    return dict(
        built=type(built).__name__,
        layers=sorted({layer.sliding_window_size for layer in layers}),
        runner=load_model_utils.resolve_sliding_window_size(built, made),
        keys=keys_seen(made.hf_text_config, case.window) if case.windows else None,
    )


def main(architectures):
    if not cuda():
        stand_in_for_hardware()
    from sglang.test.layer_ut_utils import init_single_process_dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    init_single_process_dist(master_port=port)
    found = {}
    for architecture in architectures or MODELS:
        try:
            found[architecture] = numbers(architecture, MODELS[architecture])
        except Exception:
            found[architecture] = dict(error=traceback.format_exc())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
