"""`serve` with real servers of both arms, and what stops it: a sentence, and no server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import programs
import pytest
from gemma4.arguments import Parser
from gemma4.checkpoint import write_checkpoint
from gemma4.engines import arms as engines
from gemma4.engines.arms import CPU_BLOCKERS, Arm
from gemma4.engines.host import HOST, has_gpu
from gemma4.engines.servers import captured_graphs
from gemma4.report import results
from gemma4.serve import command, run
from gemma4.serve.loads import LOADS, Load, bursts, chosen_loads

import fork.base

CASE = {"load": "chat 31/31, 8 prompts", "mtp": "off"}
BASE = f"base+{CPU_BLOCKERS}"
PROJECT = fork.base.installed()


def is_free(port) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, int(port))) != 0


@pytest.fixture
def port() -> str:
    first = 25000 + os.getpid() % 900  # two runs of the tests do not meet
    return str(next(port for port in range(first, 26000) if is_free(port)))


@pytest.fixture
def small(tmp_path, port):
    """The arguments that keep a run's files and its server to a test."""
    return [
        *("--shape", "tiny", "--load", "chat", "--repeats", "1", "--port", port),
        *("--out", str(tmp_path), "--logs", str(tmp_path / "logs")),
    ]


@pytest.fixture
def start(small, tmp_path):
    def start(*args: str) -> subprocess.Popen:
        return programs.start("serve", *small, *args, mark=tmp_path, cwd=tmp_path)

    return start


def parse(arguments: list):
    parser = Parser()
    command.arguments(parser)
    return parser.parse_args(arguments)


def test_both_arms_are_served_and_an_interrupted_run_goes_on(start, tmp_path, port):
    """Ctrl-C while the second arm starts; then the same command again."""
    path = tmp_path / "serving.json"
    command = ["--arms", "base,fork", "--plot", str(tmp_path / "img")]
    running = start(*command)
    deadline = time.monotonic() + 400
    while not (path.exists() and list(results.load(path).select(BASE))):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while not (tmp_path / "logs" / "serving" / "1-fork.server.log").exists():
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "interrupted; no server is left" in err and "Traceback" not in err
    assert not programs.marked(tmp_path) and is_free(port)
    first = results.load(path)
    assert first.arms() == [BASE]
    assert "8 of 31" in out and "burst, not measured" in out

    running = start(*command)
    out, err = running.communicate(timeout=400)
    assert running.returncode == 0, err
    assert not programs.marked(tmp_path) and is_free(port)
    found = results.load(path)
    assert found.arms() == [BASE, "fork"]
    assert list(found.select(BASE)) == first.records
    for arm in found.arms():
        assert found.get(CASE, arm, "output").median > 0
        # bench_serving counted 8 prompts of 31 tokens, less what the cache keeps whole.
        assert 8 * 15 < found.get(CASE, arm, "prompt tokens prefilled").median < 8 * 62
        assert found.get(CASE, arm, "KV slots held when idle").samples == [0]
        (start_up,) = found.select(arm, "start-up")
        assert start_up.case == {"load": "start", "mtp": "off"}
        assert 0 < start_up.median < 400
        assert not list(found.select(arm, "peak GPU memory")) or has_gpu()
    assert any("does not serve on a CPU" in note for note in found.notes)
    arms = found.settings["arms"]
    assert arms[BASE]["version"] == fork.base.requirement(PROJECT).split("==")[1]
    assert "+gemma4." in arms["fork"]["version"]
    assert arms[BASE]["code_sha256"] != arms["fork"]["code_sha256"]
    assert f"fork / {BASE}" in out
    assert list((tmp_path / "img").glob("serving-output-*.svg"))


def test_a_server_that_dies_while_loading(start, tmp_path, port):
    """Of a checkpoint whose weights were cut off."""
    model = tmp_path / "model"
    write_checkpoint(model)
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100000])
    running = start("--arms", "fork", "--model", str(model))
    out, err = running.communicate(timeout=200)
    assert running.returncode == 1, (out, err)
    (said,) = [line for line in err.splitlines() if line.startswith("gemma4 serve: ")]
    assert "The server of fork died while starting" in said
    assert str(tmp_path / "logs" / "serving" / "1-fork.server.log") in said
    assert not programs.marked(tmp_path) and is_free(port)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_machine_without_a_gpu(refused, small):
    said = refused("serve", *small, "--shape", "26b-a4b")
    assert "no GPU" in said and "--shape tiny" in said
    assert "MTP needs a GPU" in refused("serve", *small, "--mtp", "2.75")


def test_a_port_in_use(refused, small, port):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, int(port)))
        taken.listen()
        assert f"Port {port} of 127.0.0.1 is in use" in refused("serve", *small)
    assert "none that SGLang takes" in refused("serve", *small, "--port", "60000")


def test_folders_that_are_not_there(refused, small, tmp_path):
    none = str(tmp_path / "none")
    said = refused("serve", *small, "--model", none)
    assert f"{none} is no checkpoint" in said
    said = refused("serve", *small, "--arm", f"fork@{none}")
    assert f"{none}: no such place" in said
    (tmp_path / "empty").mkdir()
    said = refused("serve", *small, "--arm", f"vllm@{tmp_path / 'empty'}")
    assert "The arm vllm has no vllm in" in said


def test_arms_that_are_none(refused, small):
    assert "has no patch no-such-one" in refused(
        "serve", *small, "--upto", "no-such-one"
    )
    assert "'=x' is no arm" in refused("serve", *small, "--arm", "=x")


def test_a_result_of_something_else_is_not_added_to(refused, small, tmp_path):
    other = results.Results.start("serving", "serving", "Other", model="other")
    other.save(tmp_path / "serving.json")
    said = refused("serve", *small, "--arms", "fork")
    assert "was measured otherwise (model, " in said and "--name" in said
    assert results.load(tmp_path / "serving.json") == other


def test_a_full_disk(start, tmp_path):
    """A disk of one page, as root or in a namespace of its own."""
    small = tmp_path / "small"
    small.mkdir()
    mount = 'mount -t tmpfs -o size=4k none "$0" && exec "$@"'
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        command = [*unshare, "sh", "-c", mount, str(small)]
        if not subprocess.run([*command, "true"], capture_output=True).returncode:
            break
    else:
        pytest.skip("needs a namespace to mount a tmpfs in")
    script = [sys.executable, "-m", "gemma4", "serve", "--shape", "tiny"]
    script += ["--arms", "fork", "--out", str(small), "--name", "x" * 200]
    script += ["--flags", "--any " * 1000]
    done = subprocess.run([*command, *script], capture_output=True, text=True)
    assert done.returncode == 1, done
    assert done.stderr.startswith("gemma4 serve: the disk is full"), done.stderr
    assert "Traceback" not in done.stderr and not list(small.iterdir())


SPAWN_UNDER_A_SIGNAL = """
import os, signal
from gemma4.engines import process

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

with process.interruptible():
    os.register_at_fork(after_in_parent=interrupt)
    try:
        process.spawn(["sleep", "60"])
        print("went on")
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_ctrl_c_while_a_process_is_started():
    """In a function that Python runs around the fork: what is raised there is dropped."""
    mark = f"spawn-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", SPAWN_UNDER_A_SIGNAL],
        env={**os.environ, "GEMMA4_TEST_MARK": mark},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert not programs.marked(mark)


def test_what_bench_serving_gets():
    assert LOADS["chat"].arguments() == [
        *("--dataset-name", "random-ids", "--random-input-len", "1000"),
        *("--random-output-len", "1000", "--random-range-ratio", "1.0"),
        *("--num-prompts", "80"),
    ]
    stream = LOADS["stream"]
    assert stream.arguments()[-2:] == ["--max-concurrency", "1"]
    assert stream.title("stream") == "stream 1000/400, 8 prompts, one at a time"
    shared = dict(zip(*[iter(LOADS["shared-prefix"].arguments())] * 2))
    assert shared["--gsp-system-prompt-len"] == "4000"
    assert shared["--gsp-question-len"] == "500"
    assert (
        int(shared["--gsp-num-groups"]) * int(shared["--gsp-prompts-per-group"]) == 80
    )


def test_other_loads(capsys):
    args = parse(["--loads", "chat,1000/500x80@8,64/1x2"])
    loads = chosen_loads(args)
    assert list(loads) == ["chat", "1000/500x80@8", "64/1x2"]
    assert loads["1000/500x80@8"] == Load(1000, 500, 80, at_once=8)
    assert loads["64/1x2"] == Load(64, 1, 2)
    titles = [load.title(name) for name, load in loads.items()]
    assert titles[0].startswith("chat 1000/1000, 80 prompts")
    assert titles[1:] == ["1000/500, 80 prompts, 8 at once", "64/1, 2 prompts"]
    for text in ("1000/500", "1000/0x8", "1000/500x80@", "chats", "-1/5x8"):
        with pytest.raises(SystemExit):
            parse([f"--loads=chat,{text}"])
        assert f"{text!r} is none of summarization, chat" in capsys.readouterr().err


def test_fewer_prompts(capsys):
    args = parse(["--prompts", "40", "--loads", "summarization,prefill"])
    loads = chosen_loads(args)
    assert loads["summarization"] == Load(8000, 1000, 40)
    assert loads["prefill"] == LOADS["prefill"]  # has fewer
    for prompts, sent, groups in ((1, 1, 1), (20, 16, 8), (30, 24, 8), (99, 80, 8)):
        shared = LOADS["shared-prefix"].scaled(prompts, 1, 1)
        assert (shared.prompts, shared.groups) == (sent, groups)
    with pytest.raises(SystemExit):
        parse(["--prompts", "0"])
    said = capsys.readouterr().err
    assert "argument --prompts: '0' is not a whole number above 0." in said


def test_bursts_reach_the_shapes_of_the_loads():
    def sizes(*names):
        return [
            (load.input, load.prompts) for load in bursts(LOADS[name] for name in names)
        ]

    assert sizes("chat") == [(1000, 80)]
    # 16 long prompts fill chunks of two, and 80 short ones decode together.
    assert sizes("summarization", "chat", "stream") == [(1000, 80), (8000, 16)]
    assert sizes("summarization") == [(1000, 80), (8000, 16)]
    assert sizes("long", "128k") == [(1000, 4), (65536, 2)]
    # Prompts one at a time: their own warm-ups meet all there is.
    assert sizes("stream", "prefill", "128k") == []
    assert LOADS["128k"].warmups == 1 and LOADS["chat"].warmups == 2


def test_graphs_are_counted_in_the_log():
    """Two runners: the draft's does not tell its memory, but its bar does."""
    bar = "Capturing batches (bs={} avail_mem={} GB): {}%| {}/2 [00:00<00:01]"
    log = "\n".join(
        [
            "Capture target verify CUDA graph begin. backend=full, num_tokens_per_req=4, "
            "avail mem=20.72 GB",
            bar.format(80, "20.70", 0, 0) + "\r" + bar.format(1, "20.10", 50, 1),
            "Capture target verify CUDA graph end. bs=[1, 80], elapsed=7.00 s, "
            "mem usage=0.74 GB, avail mem=2.00 GB.",
            "Capture Frozen-KV MTP draft cuda graph begin.",
            bar.format(80, "19.13", 0, 0) + "\r" + bar.format(1, "18.80", 50, 1),
            "Capture Frozen-KV MTP draft cuda graph end.",
        ]
    )
    assert captured_graphs(log) == (4, 1.07)
    assert captured_graphs("The server is fired up") == (0, 0.0)


def test_the_peak_of_the_memory(monkeypatch, tmp_path):
    """nvidia-smi is hardware that is not there; what it prints is MiB."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat $0.says\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(run, "has_gpu", lambda: True)
    watch = run.MemoryWatch()
    for says in ("2048", "4096", "1024", "[N/A]"):
        program.with_suffix(".says").write_text(says)
        watch.next = 0.0
        watch.look()
    assert watch.peak == 4.0
    monkeypatch.setattr(run, "has_gpu", lambda: False)
    unseen = run.MemoryWatch()
    unseen.look()
    assert unseen.peak == 0.0


def test_turns_are_interleaved_and_resumed(tmp_path):
    args = parse(["--repeats", "2", "--mtp", "off,2.75", "--loads", "chat,stream"])
    args.chosen = chosen_loads(args)
    found = results.Results.start("serving", "serving", "Some")
    arms = [Arm("base"), Arm("fork")]
    planned = run.Run(args, found, arms).turns()
    assert [(t.repeat, t.mtp, t.arm.name) for t in planned] == [
        (repeat, mtp, arm)
        for repeat in (0, 1)
        for mtp in ("off", "2.75")
        for arm in ("base", "fork")
    ]
    assert all(turn.loads == ["chat", "stream"] for turn in planned)
    this = run.Run(args, found, arms)
    found.append(this.case("chat", "off"), "base", "output", "tok/s", 1.0)
    assert this.turns()[0].loads == ["stream"] and len(this.turns()) == 8
    found.append(this.case("stream", "off"), "base", "output", "tok/s", 1.0)
    assert len(this.turns()) == 7 and this.turns()[0].arm.name == "fork"


def test_the_dummy_weights_of_a_server(monkeypatch):
    """Spread, seeded by name, alike wherever they stand; scales and norms are one."""
    import torch

    monkeypatch.syspath_prepend(engines.PLUGIN)
    from gemma4_measured import draw_weights

    def model(order):
        found = torch.nn.Module()
        for name in order:
            found.register_parameter(name, torch.nn.Parameter(torch.zeros(64, 512)))
        found.scale = torch.nn.Parameter(torch.zeros(8))
        found.bias = torch.nn.Parameter(torch.ones(8))
        found.register_buffer("kept", torch.arange(4.0))
        found.register_buffer("token_ordering", torch.zeros(5, dtype=torch.long))
        draw_weights(found)
        return found

    one, other = model("ab"), model("ba")
    assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
    assert not torch.equal(one.a, one.b)
    assert abs(one.a.std().item() - 0.02) < 5e-4 and abs(one.a.mean().item()) < 5e-4
    assert torch.equal(one.scale, torch.ones(8)) and not one.bias.any()
    assert torch.equal(one.kept, torch.arange(4.0))
    assert one.token_ordering.tolist() == list(range(5))


def test_sglang_loads_the_plugin(tmp_path):
    """Its own registry applies the hooks, in an environment that only has the folder."""
    program = """
import json, sglang.srt.model_loader.loader as loader, torch
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.speculative.spec_utils as spec
model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
loader.initialize_dummy_weights(model)
index, predict = torch.arange(8).view(2, 4), torch.zeros(8, dtype=torch.int32)
spec.generate_simulated_accept_index(
    accept_index=index, predict=predict, num_correct_drafts=torch.zeros(2),
    candidates=None, target_predict=None, bs=2, spec_steps=3)
print(json.dumps([model.weight.std().item(), predict.tolist()]))
"""
    env = {**Arm("fork").environment(), "SGLANG_SIMULATE_ACC_LEN": "2.75"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        **dict(env=env, cwd=tmp_path, capture_output=True, text=True),
    )
    std, ids = json.loads(done.stdout.splitlines()[-1])
    assert std == pytest.approx(0.02, rel=0.1)
    assert (
        len(set(ids)) == 8 and min(ids) >= 1000
    ), "random ids, and not 100 eight times"
    assert "Measured code: " in done.stderr and "Random weights: 2 par" in done.stderr
