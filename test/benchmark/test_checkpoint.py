"""The checkpoint factory writes folders that transformers loads, or says why not."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
import transformers
from gemma4 import checkpoint, fp8_forms
from gemma4.checkpoint import CheckpointError, configs
from gemma4.checkpoint import folder as folder_module
from gemma4.checkpoint import weights as weights_module
from gemma4.checkpoint import write_checkpoint
from gemma4.checkpoint.tokens import TURN_START, UNK
from gemma4.cli import main
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Operations of a tiny model take less time than threads take to meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Path of the tiny folder of a kind, written once."""
    root = tmp_path_factory.mktemp("checkpoints")
    kinds = {
        "target": {},
        "text": {"text_only": True},
        "assistant": {"assistant": True},
        "sharded": {"max_shard_bytes": 10**6},
    }
    for name, kind in kinds.items():
        assert write_checkpoint(root / name, **kind)
    return root


def _files(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def _weights(folder):
    """Name -> tensor over all of a folder's safetensors."""
    weights = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            weights.update({name: f.get_tensor(name) for name in f.keys()})
    return weights


def _leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# What is in the folder -------------------------------------------------------


@pytest.mark.parametrize(
    "kind, auto_class, model_class",
    [
        ("target", AutoModelForImageTextToText, "Gemma4ForConditionalGeneration"),
        ("text", AutoModelForCausalLM, "Gemma4ForCausalLM"),
        ("sharded", AutoModelForImageTextToText, "Gemma4ForConditionalGeneration"),
    ],
)
def test_transformers_loads_every_weight_and_generates(
    folders, tmp_path, kind, auto_class, model_class
):
    model, info = auto_class.from_pretrained(
        folders / kind, output_loading_info=True, dtype="auto"
    )
    assert type(model).__name__ == model_class
    assert model.dtype == torch.bfloat16
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem

    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    inputs = tokenizer("Hello", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 24, "ended too early"
    answer = output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert text.isascii() and tokenizer.decode(answer) == text

    # Names and shapes are what the library itself would save.
    model.save_pretrained(tmp_path)
    saved, ours = _weights(tmp_path), _weights(folders / kind)
    assert {k: v.shape for k, v in saved.items()} == {
        k: v.shape for k, v in ours.items()
    }
    assert all(torch.equal(saved[k], ours[k]) for k in saved)


def test_shards_are_indexed_and_equal_to_one_file(folders):
    index = json.loads(
        (folders / "sharded" / "model.safetensors.index.json").read_text()
    )
    files = {p.name for p in (folders / "sharded").glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"].values()) == files
    one, many = _weights(folders / "target"), _weights(folders / "sharded")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[k], many[k]) for k in one)
    size = sum(v.numel() * v.element_size() for v in many.values())
    assert index["metadata"]["total_size"] == size


def test_text_only_has_the_text_weights_of_the_full_folder(folders):
    full, text = _weights(folders / "target"), _weights(folders / "text")
    for name, weight in text.items():
        assert torch.equal(
            weight, full[name.replace("model.", "model.language_model.")]
        )
    assert not (folders / "text" / "processor_config.json").exists()


def test_seed_and_dtype(folders, tmp_path):
    write_checkpoint(tmp_path / "again")
    write_checkpoint(tmp_path / "other", seed=1)
    write_checkpoint(tmp_path / "wide", dtype="float32")
    first, again = _weights(folders / "target"), _weights(tmp_path / "again")
    assert all(torch.equal(first[k], again[k]) for k in first)
    other, wide = _weights(tmp_path / "other"), _weights(tmp_path / "wide")
    same = [k for k in first if torch.equal(first[k], other[k])]
    assert all(k.endswith("std_bias") for k in same)
    for name, weight in wide.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.bfloat16(), first[name])


def test_tokenizer_and_chat_template(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    assert type(tokenizer).__name__ == "GemmaTokenizer"
    assert len(tokenizer) == 2048
    for text in (
        "Hello, world",
        "naïve 你好 🎉\n\ttabs",
        " badu kefi",
        "<|turn>x<turn|>",
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == checkpoint.BOS and max(ids) < 2048
        assert UNK not in ids
        assert tokenizer.decode(ids[1:]) == text
    # Decoded words encode to the same words: benchmarks rely on prompt lengths.
    words = [i for i in range(600, 2040)]
    text = tokenizer.decode(words)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == words

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\nyo<turn|>\n"
    )
    ids = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    assert ids[:2] == [checkpoint.BOS, TURN_START]
    assert ids.count(checkpoint.BOS) == 1


def test_processor_takes_text_image_audio_and_video(folders):
    import numpy as np
    from PIL import Image

    folder = folders / "target"
    processor = AutoProcessor.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert type(processor).__name__ == "Gemma4Processor"
    assert config.eoa_token_id == config.eoa_token_index
    for token in ("image", "audio", "video"):
        assert getattr(processor, f"{token}_token_id") == getattr(
            config, f"{token}_token_id"
        )

    image = Image.new("RGB", (64, 48), "red")
    inputs = processor(text="<|image|> what", images=[image], return_tensors="pt")
    places = (inputs["input_ids"] == config.image_token_id).sum().item()
    assert 0 < places <= checkpoint.SHAPES["tiny"].soft_tokens
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert logits.isfinite().all()

    sound = np.zeros(16000, dtype=np.float32)
    inputs = processor(text="<|audio|>", audio=[sound], return_tensors="pt")
    assert config.audio_token_id in inputs["input_ids"]


# The family ------------------------------------------------------------------

TINY = [name for name, shape in checkpoint.SHAPES.items() if shape.tiny]
RELEASED = [name for name in checkpoint.SHAPES if name not in TINY]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Writes the folder of a shape and kind, once; returns its path."""
    root = tmp_path_factory.mktemp("family")

    def write(shape, config_format="flat", **kind):
        names = [kind["fp8"] if k == "fp8" else k for k in kind]
        folder = root / "-".join([shape, *names, config_format])
        write_checkpoint(
            folder, shape, dtype="float32", config_format=config_format, **kind
        )
        return folder

    return write


def _load(folder):
    """The model of a folder in the class that its config names."""
    config = json.loads((folder / "config.json").read_text())
    (name,) = config["architectures"]
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    return model.eval()


@torch.inference_mode()
def _logits(model, length=80):
    return model(input_ids=torch.arange(600, 600 + length)[None]).logits


@pytest.mark.parametrize("shape", TINY)
def test_every_member_loads_in_both_formats_and_generates_ordinary_text(family, shape):
    alone = []
    for kind in ({}, {"text_only": True}):
        models = [_load(family(shape, f, **kind)) for f in checkpoint.CONFIG_FORMATS]
        flat, per_layer = map(_logits, models)
        assert torch.equal(flat, per_layer)
        alone.append(flat)
        # Every token chooses another next one, and the cap bends the logits.
        assert flat.argmax(-1).unique().numel() > 30
        cap = checkpoint.SHAPES[shape].text["final_logit_softcapping"]
        assert 0.3 * cap < flat.abs().max() < cap
    # The text-only folder has the text model of the full one, and another mask.
    torch.testing.assert_close(*alone, atol=1e-5, rtol=0)

    prompt = torch.arange(700, 740)[None]
    output = models[0].generate(prompt, max_new_tokens=16, do_sample=False)
    answer = output[0, 40:]
    assert len(answer) == 16 and answer.min() >= checkpoint.FIRST_TEXT_TOKEN


@pytest.mark.parametrize("shape", TINY)
def test_every_layer_and_every_text_weight_matters(family, shape):
    """What a server may get wrong in one layer must be seen in the logits."""
    model = _load(family(shape, text_only=True))
    right = _logits(model, 40)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kept = weight.clone()
            weight.copy_(kept.roll(1, 0))
            moved = (_logits(model, 40) - right).abs().max().item()
            weight.copy_(kept)
            assert moved > 1e-4, name


@pytest.mark.parametrize("shape", TINY)
def test_weights_are_named_as_in_a_new_checkpoint(family, tmp_path, shape):
    """A model that was loaded is saved under the names it was loaded from, right or
    wrong; one that was not, under the released ones."""
    folder = family(shape)
    model = type(_load(folder))(AutoConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path)
    ours, saved = _weights(folder), _weights(tmp_path)
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in saved.items()
    }


@pytest.mark.parametrize("shape", TINY)
def test_saving_again_writes_the_per_layer_format(family, tmp_path, shape):
    """The oracle of the format is transformers' own writer, and of the weights."""
    folder = family(shape, "per-layer")
    model = _load(folder)
    model.save_pretrained(tmp_path)
    ours, saved = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path)
    )
    assert ours == saved
    assert ours["text_config"]["per_layer_config"]
    ours, saved = _weights(folder), _weights(tmp_path)
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[k], saved[k]) for k in ours)


@pytest.mark.parametrize("shape", TINY)
def test_flat_config_is_what_transformers_5_6_wrote(family, shape):
    config = json.loads((family(shape) / "config.json").read_text())
    text, sizes = config["text_config"], checkpoint.SHAPES[shape].text
    assert "per_layer_config" not in text
    assert text["global_head_dim"] == sizes["global_head_dim"]
    assert (
        text["num_global_key_value_heads"] == sizes["num_global_key_value_heads"]
    ), "null where the sliding layers' number holds"
    if not checkpoint.SHAPES[shape].unified:
        assert config["vision_config"]["rope_parameters"]["rope_type"] == "default"
    draft = json.loads((family(shape, assistant=True) / "config.json").read_text())
    assert draft["text_config"]["global_head_dim"] == sizes["global_head_dim"]


@pytest.mark.parametrize("shape", TINY)
@torch.inference_mode()
def test_draft_of_every_member_reads_its_keys_and_values(family, shape):
    """One step of drafting. (transformers 5.19 cannot run generate(assistant_model=…)
    with these drafts: it calls its own candidate generator without two arguments.)"""
    target, prompt = _load(family(shape)), torch.arange(700, 780)[None]
    output = target(
        input_ids=prompt, output_hidden_states=True, return_shared_kv_states=True
    )
    embedded = target.get_input_embeddings()(output.logits[:, -1:].argmax(-1))
    logits = []
    for config_format in checkpoint.CONFIG_FORMATS:
        draft = _load(family(shape, config_format, assistant=True))
        drafted = draft(
            inputs_embeds=torch.cat([embedded, output.hidden_states[-1][:, -1:]], -1),
            position_ids=torch.tensor([[prompt.shape[1] - 1]]),
            shared_kv_states=output.shared_kv_states,
        )
        assert drafted.last_hidden_state.shape == embedded.shape
        logits.append(drafted.logits)
    assert logits[0].shape == (1, 1, 2048) and logits[0].std() > 0.01
    assert torch.equal(*logits)


def test_draft_orders_the_whole_vocabulary(family):
    weights = _weights(family("tiny-e2b", assistant=True))
    order = weights["masked_embedding.token_ordering"]
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(2048))
    assert weights["masked_embedding.centroids.weight"].shape == (64, 64)


@pytest.mark.parametrize("shape", ["tiny-e2b", "tiny-e4b", "tiny-12b"])
def test_members_that_hear_and_see(family, shape):
    import numpy as np
    from PIL import Image

    folder = family(shape)
    processor, model = AutoProcessor.from_pretrained(folder), _load(folder)
    inputs = processor(
        text="<|image|> and <|audio|>",
        images=[Image.new("RGB", (64, 48), "red")],
        audio=[np.sin(np.arange(8000, dtype=np.float32))],
        return_tensors="pt",
    )
    for token in ("image_token_id", "audio_token_id"):
        assert getattr(model.config, token) in inputs["input_ids"]
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


def test_unified_generation_suppresses_what_is_only_read(family):
    ids = checkpoint.SHAPES["tiny-12b"].multimodal_ids
    config = transformers.GenerationConfig.from_pretrained(family("tiny-12b"))
    assert config.suppress_tokens == [ids["eoa_token_id"], ids["eoi_token_id"]]


def test_assistant_is_what_the_loader_wants(folders):
    """Every weight has a place in SGLang's draft model, and none of it lacks one."""
    config = json.loads((folders / "assistant" / "config.json").read_text())
    target = json.loads((folders / "target" / "config.json").read_text())
    text, target_text = config["text_config"], target["text_config"]
    for key in (
        "num_attention_heads",
        "num_key_value_heads",
        "num_global_key_value_heads",
        "head_dim",
        "global_head_dim",
        "sliding_window",
        "vocab_size",
        "attention_k_eq_v",
    ):
        assert text[key] == target_text[key], key
    assert config["backbone_hidden_size"] == target_text["hidden_size"]
    assert text["num_kv_shared_layers"] == text["num_hidden_layers"] == 4

    weights = _weights(folders / "assistant")
    assert not [k for k in weights if ".k_proj" in k or ".v_proj" in k]
    assert weights["pre_projection.weight"].shape == (64, 2 * 128)
    assert weights["post_projection.weight"].shape == (128, 64)
    assert weights["model.layers.3.self_attn.q_proj.weight"].shape == (4 * 64, 64)
    assert weights["model.embed_tokens.weight"].shape == (2048, 64)


# FP8 -------------------------------------------------------------------------

MADE_BY_LLM_COMPRESSOR = ("fp8-dynamic", "fp8-block", "fp8-static")


def _error(stored, weight):
    """Of a weight that was stored in FP8, relative to what it was."""
    return ((stored.float() - weight.float()).norm() / weight.float().norm()).item()


@pytest.mark.parametrize(
    "shape, form",
    [(name, "fp8-dynamic") for name in TINY if name != "tiny"]
    + [("tiny-31b", "fp8-block"), ("tiny-31b", "fp8-static")],
)
def test_transformers_reads_fp8(family, shape, form):
    """The oracle of names, scales and config is transformers with compressed-tensors,
    LLM Compressor's own reader. It knows no experts."""
    for kind in ({}, {"text_only": True}, {"assistant": True}):
        folder = family(shape, fp8=form, **kind)
        config = json.loads((folder / "config.json").read_text())
        model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
            output_loading_info=True,
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[problem], problem
        read, errors = model.state_dict(), []
        for name, weight in _load(family(shape, **kind)).state_dict().items():
            if not torch.equal(read[name], weight):
                assert not re.search("tower|embed|norm|router", name), name
                errors.append(_error(read[name], weight))
        # FP8 has 3 bits behind the first one.
        assert len(errors) >= 4 * len(model.model.layers if kind else [0])
        assert 0.01 < min(errors) and max(errors) < 0.05


@pytest.mark.parametrize("form", [*MADE_BY_LLM_COMPRESSOR, "fp8-fine-grained"])
def test_fp8_experts(family, form):
    """Each expert's scales give its weights back."""
    plain, stored = _weights(family("tiny")), _weights(family("tiny", fp8=form))
    layer = "model.language_model.layers.3.experts"
    gate_up, down = plain[f"{layer}.gate_up_proj"], plain[f"{layer}.down_proj"]
    if form == "fp8-fine-grained":
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
            quantized = stored[f"{layer}.{name}"]
            scale = stored[f"{layer}.{name}_scale_inv"]
            assert quantized.dtype == torch.float8_e4m3fn
            for axis in (1, 2):
                scale = scale.repeat_interleave(32, axis)
            assert _error(quantized.float() * scale, weight) < 0.05
        return
    assert f"{layer}.gate_up_proj" not in stored
    for expert in (0, 15):
        gate, up = gate_up[expert].chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", down[expert])):
            module = f"{layer}.{expert}.{name}_proj"
            quantized, scale = (
                stored[f"{module}.weight"],
                stored[f"{module}.weight_scale"],
            )
            assert quantized.dtype == torch.float8_e4m3fn
            # Blocks do not fit the experts of the real shape.
            rows = [len(weight), 1] if form == "fp8-dynamic" else [1]
            assert list(scale.shape) == rows
            assert _error(quantized.float() * scale, weight) < 0.05
            assert (f"{module}.input_scale" in stored) == (form != "fp8-dynamic")


@pytest.mark.parametrize("form", ["fp8-dynamic", "fp8-block"])
def test_fp8_in_shards_is_the_same(tmp_path, form):
    write_checkpoint(tmp_path / "one", fp8=form)
    write_checkpoint(tmp_path / "many", fp8=form, max_shard_bytes=10**6)
    one, many = _weights(tmp_path / "one"), _weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[k].float(), many[k].float()) for k in one)
    with pytest.raises(CheckpointError, match="fp8 .* instead of None"):
        write_checkpoint(tmp_path / "one")


@pytest.mark.parametrize("shape", RELEASED)
def test_fp8_of_the_large_shapes(shape):
    """What is in blocks, and what is too narrow for them."""
    spec, mixed = checkpoint.SHAPES[shape], shape == "26b-a4b"
    form = fp8_forms.form_of(spec, "fp8-block")
    groups = form.config([])["config_groups"].values()
    blocks = [group["weights"].get("block_structure") for group in groups]
    assert blocks == ([[128, 128], None] if mixed else [[128, 128]])
    config = configs.target_config(spec, False, "bfloat16")
    for name, weight in weights_module.on_meta(config).items():
        if ".experts." in name:
            weight = weight[:2]
        for part, tensor in form.stored(name, weight).items():
            if tensor.dtype == torch.float8_e4m3fn:
                whole = all(size % 128 == 0 for size in tensor.shape)
                assert whole or mixed and re.search(r"\.(mlp|experts)\.", part), part


# The large shapes, without their weights -------------------------------------


def _parameters(config):
    return {k: v.numel() for k, v in weights_module.on_meta(config).items()}


def _kv_bytes(text):
    """bfloat16 bytes a token, of the full and of the sliding layers."""
    own = len(text.layer_types) - text.num_kv_shared_layers
    sizes = {"full_attention": 0, "sliding_attention": 0}
    for kind, layer in zip(text.layer_types[:own], text.per_layer_config):
        sizes[kind] += layer.num_key_value_heads * layer.head_dim * 2 * 2
    return sizes["full_attention"], sizes["sliding_attention"]


def test_26b_a4b(tmp_path):
    write_checkpoint(tmp_path / "big", "26b-a4b", weights=False)
    assert not list((tmp_path / "big").glob("*.safetensors*"))
    config = AutoConfig.from_pretrained(tmp_path / "big")
    text = config.text_config
    assert _kv_bytes(text) == (20480, 204800)

    sizes = _parameters(config)
    total = sum(sizes.values())
    experts = sum(n for k, n in sizes.items() if ".experts." in k)
    vision = sum(n for k, n in sizes.items() if "vision" in k)
    assert 25e9 < total < 26e9
    active = total - vision - experts + experts * text.top_k_experts / text.num_experts
    assert 3.5e9 < active < 4.2e9

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "big")
    assert len(tokenizer) == text.vocab_size == 262144
    assert tokenizer.convert_tokens_to_ids("<|image|>") == 258880
    words = torch.randint(1000, 255999, (2000,)).tolist()
    again = tokenizer(tokenizer.decode(words), add_special_tokens=False)["input_ids"]
    assert again == words


def test_31b(tmp_path):
    write_checkpoint(tmp_path / "big", "31b", weights=False, text_only=True)
    text = AutoConfig.from_pretrained(tmp_path / "big")
    assert text.num_hidden_layers == 60
    full, sliding = _kv_bytes(text)
    assert sliding == 10 * full == 50 * 16 * 256 * 2 * 2
    assert 30e9 < sum(_parameters(text).values()) < 31.5e9


@pytest.mark.parametrize(
    "shape, size, kv_bytes",
    # Parameters with all embeddings and towers, as the model cards state them; bytes a
    # token by hand: E2B has 3 full and 12 sliding layers of its own, E4B 4 and 20.
    [
        ("e2b", 5.1e9, (3 * 512 * 4, 12 * 256 * 4)),
        ("e4b", 8.0e9, (4 * 2 * 512 * 4, 20 * 2 * 256 * 4)),
        ("12b", 12.0e9, (8 * 512 * 4, 40 * 8 * 256 * 4)),
    ],
)
def test_smaller_members(tmp_path, shape, size, kv_bytes):
    write_checkpoint(tmp_path / "model", shape, weights=False)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert sum(_parameters(config).values()) == pytest.approx(size, rel=0.03)
    assert _kv_bytes(config.text_config) == kv_bytes


@pytest.mark.parametrize(
    "shape, size",
    [
        ("26b-a4b", 0.42e9),
        ("31b", 0.47e9),
        ("e2b", 78.0e6),
        ("e4b", 78.8e6),
        ("12b", 0.42e9),
    ],
)
def test_assistants_of_the_large_shapes(tmp_path, shape, size):
    write_checkpoint(tmp_path / "draft", shape, assistant=True, weights=False)
    config = AutoConfig.from_pretrained(tmp_path / "draft")
    assert sum(_parameters(config).values()) == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("shape", RELEASED)
def test_geometry_is_the_tiny_ones(shape):
    """What a tiny shape shows of its member: the same kinds of layers and sizes."""
    tiny = checkpoint.SHAPES["tiny" if shape == "26b-a4b" else f"tiny-{shape}"]
    large = checkpoint.SHAPES[shape]
    assert tiny.unified == large.unified
    assert (tiny.audio is None) == (large.audio is None)
    small_text, text = configs.text_config(tiny), configs.text_config(large)
    for key in (
        "attention_k_eq_v",
        "enable_moe_block",
        "use_double_wide_mlp",
        "use_bidirectional_attention",
    ):
        assert getattr(small_text, key, None) == getattr(text, key, None), key
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        assert bool(getattr(small_text, key, 0)) == bool(getattr(text, key, 0)), key
    assert text.layer_types[:6] == small_text.layer_types[:6]
    assert tiny.draft_head.keys() == large.draft_head.keys()


def test_weights_of_a_large_shape_are_normal_and_ones():
    """Drawn one by one: the distribution that keeps a deep random model alive."""
    shape = checkpoint.SHAPES["26b-a4b"]

    def draw(name, *size):
        return weights_module.draw(
            shape, 0, name, torch.Size(size), torch.bfloat16, "cpu"
        ).float()

    assert draw("model.vision_embedder.patch_dense.bias", 8).eq(0).all()
    assert draw("model.audio_tower.layers.0.lconv1d.linear_start.input_min").item() < 0

    matrix = draw("model.language_model.layers.0.mlp.up_proj.weight", 2112, 2816)
    assert matrix.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(matrix.mean().item()) < 1e-4
    for name in ("router.scale", "router.per_expert_scale", "layer_scalar"):
        assert draw(f"model.language_model.layers.0.{name}", 128).eq(1).all()


# The folder as a whole -------------------------------------------------------


def test_existing_folder_of_the_same_arguments_is_left_alone(tmp_path, capsys):
    out = tmp_path / "tiny"
    assert main(["checkpoint", str(out)]) == 0
    before = _files(out)
    assert main(["checkpoint", str(out)]) == 0
    assert "left alone" in capsys.readouterr().out
    assert _files(out) == before


def test_existing_folder_of_other_arguments_needs_overwrite(tmp_path, capsys):
    out = tmp_path / "tiny"
    write_checkpoint(out)
    before = _files(out)
    assert main(["checkpoint", str(out), "--seed", "7"]) == 1
    message = capsys.readouterr().err
    assert "seed 0 instead of 7" in message and "--overwrite" in message
    assert _files(out) == before
    assert main(["checkpoint", str(out), "--seed", "7", "--overwrite"]) == 0
    assert json.loads((out / "checkpoint.json").read_text())["seed"] == 7
    assert not _leftovers(tmp_path)


@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_foreign_folder_and_file_are_never_touched(tmp_path, capsys, extra):
    folder, file = tmp_path / "mine", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("a file")
    assert main(["checkpoint", str(folder), *extra]) == 1
    assert "did not write" in capsys.readouterr().err
    assert main(["checkpoint", str(file), *extra]) == 1
    assert "not a folder" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
    assert file.read_text() == "a file"
    assert not _leftovers(tmp_path)


def test_missing_parents_and_empty_folders_are_fine(tmp_path):
    assert write_checkpoint(tmp_path / "a folder" / "of ours" / "tiny")
    (tmp_path / "empty").mkdir()
    assert write_checkpoint(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_not_enough_space_is_said_before_the_first_byte(tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        folder_module.shutil, "disk_usage", lambda path: usage(10**12, 0, 50 * 10**9)
    )
    assert main(["checkpoint", str(tmp_path / "big"), "--shape", "26b-a4b"]) == 1
    message = capsys.readouterr().err
    assert "51." in message and "50.0 GB free" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_nothing(tmp_path, capsys, monkeypatch):
    out = tmp_path / "tiny"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(weights_module, "save_file", full)
    assert main(["checkpoint", str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_failed_overwrite_keeps_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "tiny"
    write_checkpoint(out)
    before = _files(out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(out, seed=1, overwrite=True)
    assert _files(out) == before
    assert not _leftovers(tmp_path)


def test_parent_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    assert main(["checkpoint", str(tmp_path / "file" / "tiny")]) == 1
    message = capsys.readouterr().err
    assert "not a folder" in message and message.count("\n") == 1
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: OUT"),
        (["x", "--shape", "70b"], "invalid choice: '70b'"),
        (["x", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["x", "--config-format", "5.6"], "invalid choice: '5.6'"),
        (["x", "--seed", "one"], "invalid int value: 'one'"),
        (["x", "--assistant", "--text-only"], "not allowed with argument"),
        (["x", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_get_one_sentence(
    tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["checkpoint", *arguments])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": "70b"},
        {"dtype": "int4"},
        {"config_format": "5.6"},
        {"assistant": True, "text_only": True},
    ],
)
def test_bad_arguments_of_the_function(tmp_path, arguments):
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "x", **arguments)
    assert not list(tmp_path.iterdir())


def _start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "gemma4", "checkpoint", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "never came"
        time.sleep(0.01)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_write_is_never_taken_for_whole(tmp_path, sent):
    out, partial = tmp_path / "draft", tmp_path / ".draft.partial"
    process = _start(str(out), "--shape", "26b-a4b", "--assistant")
    try:
        _wait_for(lambda: (partial / "config.json").exists(), process)
        # A second writer of the same folder is turned away meanwhile.
        with pytest.raises(CheckpointError, match="another process"):
            write_checkpoint(out)
        process.send_signal(sent)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert not out.exists()
    if sent != signal.SIGKILL:
        assert not partial.exists()
        assert "interrupted" in error and "Traceback" not in error
    # What a killed run left is cleared away by the next one.
    assert write_checkpoint(out)
    assert AutoConfig.from_pretrained(out).text_config.vocab_size == 2048
    assert not _leftovers(tmp_path)
