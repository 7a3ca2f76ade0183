"""The pool planner against the exact pool sizes, and what it says when a load is too big."""

import pytest
import torch
from gemma4.checkpoint import write_checkpoint
from gemma4.cli import main
from gemma4.pools.plan import gpu_kv_bytes
from gemma4.report.results import load
from programs import run

PLAN = ["pools", "plan"]
H200 = ["--kv-memory", "74384050000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "26b-a4b"
    write_checkpoint(path, "26b-a4b", weights=False)
    return str(path)


def test_sizes_and_counts(folder, tmp_path):
    out = tmp_path / "pools.json"
    argv = [*H200, "--ratio", "0.15,0.8", "--json", str(out), "--plot", str(tmp_path)]
    assert main([*PLAN, folder, *argv]) == 0
    pools = load(out)
    expected = {
        (0.15, "full", "tokens"): 1_452_813,
        (0.15, "SWA", "tokens"): 217_921,
        (0.8, "full", "tokens"): 403_559,
        (0.8, "SWA", "tokens"): 322_847,
        (0.15, "full", "requests"): 161,
        (0.15, "SWA", "requests"): 99,
        (0.8, "full", "requests"): 44,
        (0.8, "SWA", "requests"): 151,
    }
    found = {(r.case["ratio"], r.arm, r.metric): r.median for r in pools.records}
    assert found == expected
    assert pools.settings["full_bytes_per_token"] == 20_480
    assert pools.settings["swa_bytes_per_token"] == 204_800
    # 8000 in, 1000 out: a prompt's window of 1023 is kept, and all that is generated.
    assert pools.settings["full_tokens_per_request"] == 9000
    assert pools.settings["swa_tokens_per_request"] == 2023
    assert len(list(tmp_path.glob("pools-*.svg"))) == 2


def test_default_ratio(folder, tmp_path):
    out = tmp_path / "pools.json"
    assert main([*PLAN, folder, *H200, "--json", str(out)]) == 0
    assert {r.case["ratio"] for r in load(out).records} == {0.15}


def test_long_answer_leaves_the_window(folder, tmp_path, monkeypatch):
    out = tmp_path / "pools.json"
    argv = [folder, *H200, "--output-len", "20000", "--json", str(out)]
    for interval in (128, 16):
        monkeypatch.setenv("SGLANG_SWA_EVICTION_INTERVAL", str(interval))
        assert main([*PLAN, *argv]) == 0
        per_request = load(out).settings["swa_tokens_per_request"]
        assert per_request == 1023 + (1 + 1023 + interval)


def test_options_reach_the_server(folder, tmp_path):
    """Half of the heads on each of two GPUs, one byte a number, pages of 64."""
    out = tmp_path / "pools.json"
    argv = ["--tp-size", "2", "--kv-cache-dtype", "fp8_e4m3", "--page-size", "64"]
    assert main([*PLAN, folder, *H200, *argv, "--json", str(out)]) == 0
    pools = load(out)
    assert pools.settings["full_bytes_per_token"] == 20_480 // 4
    assert pools.settings["swa_bytes_per_token"] == 204_800 // 4
    tokens = [r.median for r in pools.records if r.metric == "tokens"]
    assert all(n % 64 == 0 for n in tokens)


def test_what_the_weights_leave_of_each_gpu(folder, monkeypatch):
    """Two GPUs share 25.8 billion weights, but each has the table of 262,144 tokens."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**11, 10**11))
    table = 262_144 * 2816
    alone, shared = (10**11 - gpu_kv_bytes(folder, 1.0, tp_size) for tp_size in (1, 2))
    assert alone == pytest.approx(2 * 25.8e9, rel=0.01)
    assert shared == pytest.approx(2 * (table + (alone / 2 - table) / 2))


def test_load_does_not_fit(folder, capsys):
    assert main([*PLAN, folder, *H200, "--requests", "160"]) == 1
    said = capsys.readouterr().out
    assert "The load does not fit: 99 of 160 requests at ratio 0.15" in said
    assert "the swa pool binds" in said
    assert main([*PLAN, folder, *H200, "--requests", "80"]) == 0
    assert main([*PLAN, folder, *H200, "--input-len", "2000000"]) == 1


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["/no/such/folder", *H200], "neither a folder with a config.json nor one of"),
        (["tiny", "--kv-memory", "10"], "too little for a window of the KV cache"),
    ],
)
def test_cannot_be_planned(argv, sentence, capsys):
    assert main([*PLAN, *argv]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value",
    [
        ("--ratio", "0"),
        ("--ratio", "1.5"),
        ("--ratio", "0.1:0.5:0"),
        ("--kv-memory", "much"),
        ("--requests", "0"),
    ],
)
def test_bad_argument(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*PLAN, "tiny", option, value])
    assert caught.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_one_pool(tmp_path, capsys):
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert main([*PLAN, str(tmp_path), *H200]) == 2
    assert "LlamaForCausalLM has one KV pool" in capsys.readouterr().err


def test_command_line(folder):
    done = run(*PLAN, folder, *H200)
    assert done.returncode == 0, done.stderr
    assert "1,452,813" in done.stdout and "217,921" in done.stdout
