"""The checkpoint factory writes folders that transformers loads, or says why not."""

import json
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

FACTORY = Path(__file__).parents[2] / "benchmark" / "gemma4" / "checkpoint.py"
sys.path.insert(0, str(FACTORY.parent))
import checkpoint
from checkpoint import CheckpointError, main, write_checkpoint


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
        assert checkpoint.UNK not in ids
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
    assert ids[:2] == [checkpoint.BOS, checkpoint.TURN_START]
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


# The large shapes, without their weights -------------------------------------


def _parameters(config):
    return {k: v.numel() for k, v in checkpoint.on_meta(config).items()}


def _kv_bytes(text):
    """bfloat16 bytes a token, of the full and of the sliding layers."""
    full = text.layer_types.count("full_attention")
    sliding = len(text.layer_types) - full
    return (
        full * text.num_global_key_value_heads * text.global_head_dim * 2 * 2,
        sliding * text.num_key_value_heads * text.head_dim * 2 * 2,
    )


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


@pytest.mark.parametrize("shape, size", [("26b-a4b", 0.42e9), ("31b", 0.47e9)])
def test_assistants_of_the_large_shapes(tmp_path, shape, size):
    write_checkpoint(tmp_path / "draft", shape, assistant=True, weights=False)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    numbers = [v.numel() for v in checkpoint._draft_on_meta(config).values()]
    assert sum(numbers) == pytest.approx(size, rel=0.03)


def test_weights_of_a_large_shape_are_normal_and_ones():
    """Drawn one by one: the distribution that keeps a deep random model alive."""
    shape = checkpoint.SHAPES["26b-a4b"]

    def draw(name, *size):
        return checkpoint._draw(
            shape, 0, name, torch.Size(size), torch.bfloat16, "cpu"
        ).float()

    matrix = draw("model.language_model.layers.0.mlp.up_proj.weight", 2112, 2816)
    assert matrix.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(matrix.mean().item()) < 1e-4
    for name in ("router.scale", "router.per_expert_scale", "layer_scalar"):
        assert draw(f"model.language_model.layers.0.{name}", 128).eq(1).all()


# The folder as a whole -------------------------------------------------------


def test_existing_folder_of_the_same_arguments_is_left_alone(tmp_path, capsys):
    out = tmp_path / "tiny"
    assert main([str(out)]) == 0
    before = _files(out)
    assert main([str(out)]) == 0
    assert "left alone" in capsys.readouterr().out
    assert _files(out) == before


def test_existing_folder_of_other_arguments_needs_overwrite(tmp_path, capsys):
    out = tmp_path / "tiny"
    write_checkpoint(out)
    before = _files(out)
    assert main([str(out), "--seed", "7"]) == 1
    message = capsys.readouterr().err
    assert "seed 0 instead of 7" in message and "--overwrite" in message
    assert _files(out) == before
    assert main([str(out), "--seed", "7", "--overwrite"]) == 0
    assert json.loads((out / "checkpoint.json").read_text())["seed"] == 7
    assert not _leftovers(tmp_path)


@pytest.mark.parametrize("extra", [[], ["--overwrite"]])
def test_foreign_folder_and_file_are_never_touched(tmp_path, capsys, extra):
    folder, file = tmp_path / "mine", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("a file")
    assert main([str(folder), *extra]) == 1
    assert "did not write" in capsys.readouterr().err
    assert main([str(file), *extra]) == 1
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
        checkpoint.shutil, "disk_usage", lambda path: usage(10**12, 0, 50 * 10**9)
    )
    assert main([str(tmp_path / "big"), "--shape", "26b-a4b"]) == 1
    message = capsys.readouterr().err
    assert "51." in message and "50.0 GB free" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_nothing(tmp_path, capsys, monkeypatch):
    out = tmp_path / "tiny"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main([str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_failed_overwrite_keeps_the_old_folder(tmp_path, monkeypatch):
    out = tmp_path / "tiny"
    write_checkpoint(out)
    before = _files(out)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(out, seed=1, overwrite=True)
    assert _files(out) == before
    assert not _leftovers(tmp_path)


def test_parent_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    assert main([str(tmp_path / "file" / "tiny")]) == 1
    message = capsys.readouterr().err
    assert "not a folder" in message and message.count("\n") == 1
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: OUT"),
        (["x", "--shape", "70b"], "invalid choice: '70b'"),
        (["x", "--dtype", "int4"], "invalid choice: 'int4'"),
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
        main(arguments)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [{"shape": "70b"}, {"dtype": "int4"}, {"assistant": True, "text_only": True}],
)
def test_bad_arguments_of_the_function(tmp_path, arguments):
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "x", **arguments)
    assert not list(tmp_path.iterdir())


def _start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(FACTORY), *arguments],
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
