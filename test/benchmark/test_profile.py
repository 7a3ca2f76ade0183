"""`profile` on traces whose truth is known, and on one that a GPU recorded."""

import gzip
import http.server
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from gemma4.arguments import Parser
from gemma4.checkpoint import SHAPES, Shape, write_checkpoint
from gemma4.checkpoint.configs import text_config
from gemma4.cli import main
from gemma4.engines.arms import Arm
from gemma4.engines.servers import ArmServer, Setup
from gemma4.errors import UserError
from gemma4.profile import command, trace
from gemma4.profile.floors import floors
from gemma4.profile.live import Requests
from gemma4.profile.trace import GAPS, measured
from gemma4.report import plot, results

LAYERS = (["sliding_attention"] * 5 + ["full_attention"]) * 2
HEAD = "nvjet_tst_128x64_64x8_2x1_v_bz_TNT"
GEMM = "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT"
# The router's, with the sum of its parts.
ROUTER = "nvjet_tst_64x32_64x16_2x4_h_bz_splitK_TNT"
REDUCE = "void cublasLt::splitKreduce_kernel<32, 16, int, float>"
POINTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::{}>"
NORM, GELU = "_gemma_rmsnorm_residual_kernel", "act_and_mul_kernel"
EXPERT_KERNELS = [
    *("moe_align_block_size_kernel", "count_and_sort_expert_tokens_kernel"),
    *("fused_moe_kernel", GELU, "fused_moe_kernel", "_moe_sum_reduce_kernel"),
]
LASTS = {HEAD: 300.0, ROUTER: 0.5, REDUCE: 0.25}
# A layer's kernels from its attention to the next one's, with the group of each.
FORK = [
    ("void flashinfer::norm::RMSNormKernel<8u>", "norms and rope"),
    (GEMM, "projections"),
    ("_gemma_qkv_rmsnorm_rope_kernel", "norms and rope"),
    ("void store_kvcache<512>(int const*)", "KV writes"),
    ("_fwd_grouped_kernel_stage1", "attention"),
    ("_fwd_kernel_stage2", "attention"),
    (GEMM, "projections"),
    (REDUCE, "projections"),
    ("_gemma_pre_feedforward_kernel", "norms and rope"),
    *((ROUTER, "routing"), (REDUCE, "routing")),
    *((GEMM, "projections"), (REDUCE, "projections")),
    ("void flashinfer::activation::act_and_mul_kernel<bf16, gelu>", "projections"),
    (GEMM, "projections"),
    ("_gemma4_routing_kernel", "routing"),
    *((name, "experts") for name in EXPERT_KERNELS),
    ("_gemma_dual_rmsnorm_residual_kernel", "norms and rope"),
]
# The release routes behind the dense MLP, with torch's kernels, whose names say little.
_NORMS = FORK.index(("_gemma_pre_feedforward_kernel", "norms and rope"))
_CHOICE = FORK.index(("_gemma4_routing_kernel", "routing"))
BASE = [
    *FORK[:_NORMS],
    (NORM, "norms and rope"),
    *FORK[_NORMS + 3 : _CHOICE],
    (NORM, "norms and rope"),
    *FORK[_NORMS + 1 : _NORMS + 3],
    (NORM, "norms and rope"),
    *FORK[_CHOICE + 1 :],
]
_AT = BASE.index(("moe_align_block_size_kernel", "experts"))
BASE[_AT:_AT] = [
    ("void at::native::sbtopk::gatherTopK<c10::BFloat16, unsigned int>", "routing"),
    ("void at::native::bitonicSortKVInPlace<-2, -1, 16, 16>", "routing"),
    ("void at::native::(anonymous)::softmax_warp_forward<float, 3>", "routing"),
    ("void at::native::index_elementwise_kernel<128, 4>", "routing"),
    (POINTWISE.format("BinaryFunctor<MulFunctor<float>>"), "routing"),
]
ENDS = [
    (HEAD, "logits and sampling"),
    ("fused_softcap_kernel", "logits and sampling"),
    ("void at::native::reduce_kernel<ArgMaxOps<float>>", "logits and sampling"),
    ("Memcpy DtoD (Device -> Device)", "logits and sampling"),
    ("create_flashinfer_kv_indices_triton", "other"),
    ("get_num_kv_splits_triton", "other"),
]


def made(layer, passes: int, skip: int = 0, gap: float = 0.5):
    """(events, truth): so many forward passes, less the first `skip` kernels.

    Kernels last 1 to 7 µs by their place, or as LASTS says; between two lie `gap` µs.
    The truth is a pass's µs by group.
    """
    now, events, truth = 1000.0, [], Counter()
    for number in range(passes):
        one = []
        for kind in LAYERS:
            for name, group in layer:
                if group == "attention":
                    group = f"attention, {kind.split('_')[0]}"
                one.append((name, group))
        one += ENDS
        for place, (name, group) in enumerate(one):
            duration = LASTS.get(name, 1.0 + place % 7)
            if number == 0:
                truth[group] += duration
                truth[GAPS] += gap
            events.append({"cat": "kernel", "name": name, "ts": now, "dur": duration})
            now += duration + gap
    events.append({"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9})
    return events[skip:], dict(truth)


def read(tmp_path, events):
    path = tmp_path / "some.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return trace.read_trace(path)


@pytest.mark.parametrize("layer", [FORK, BASE], ids=["fork", "base"])
@pytest.mark.parametrize("skip", [0, 1, 100, 261])
def test_decode_steps_are_cut_and_grouped(tmp_path, layer, skip):
    events, truth = made(layer, 5, skip)
    groups, kernels, count = measured(read(tmp_path, events), LAYERS, True)
    # From 5 passes, cut anywhere, at least 3 are whole between two attentions.
    assert 3 <= count <= 4
    for found in groups:
        assert {k: v for k, v in found.items() if v} == pytest.approx(truth)
    launches = sum(launched for launched, _ in kernels.values())
    assert launches == len(LAYERS) * len(layer) + len(ENDS)


@pytest.mark.parametrize("layer", [FORK, BASE], ids=["fork", "base"])
def test_a_prefill_is_one_step(tmp_path, layer):
    layer = [
        ("_fwd_kernel" if "stage1" in name else name, group)
        for name, group in layer
        if "stage2" not in name
    ]
    events, truth = made(layer, 1)
    (found,), _, _ = measured(read(tmp_path, events), LAYERS, False)
    del truth["other"]  # what would prepare the next step
    truth[GAPS] -= 0.5 * 3
    assert {k: v for k, v in found.items() if v} == pytest.approx(truth)
    # The scheduler launched the decode step before the request was known to be over.
    late, _ = made(FORK, 1)
    for event in late[:-1]:
        event["ts"] += 1e6
    (again,), _, _ = measured(read(tmp_path, events + late), LAYERS, False)
    assert again == pytest.approx(found)


def test_a_step_with_mtp_is_verify_accept_and_draft(tmp_path):
    """Three drafts between two passes of the target, which begins with its own inputs."""
    target = []
    for name, group in FORK:
        if "stage1" in name:  # its queries are copied, once the cache is written
            target.append((POINTWISE.format("direct_copy_kernel_cuda"), "attention"))
            name = "_verify_kernel_stage1"
        target.append((name, group))
    draft = [
        *((GEMM, NORM, GEMM, "_gemma_qkv_rmsnorm_rope_kernel")),
        *(("_fwd_grouped_kernel_stage1", "_fwd_kernel_stage2", GEMM, NORM, GEMM)),
        *((GELU, GEMM, NORM, HEAD, "void at::native::cunn_SoftMaxForward<4>")),
        "void at::native::reduce_kernel<512, 1, ReduceOp<float, at::native::MaxOps<>>>",
    ]
    one = [pair for _ in LAYERS for pair in target]
    one += [(name, group) for name, group in ENDS if name != ENDS[3][0]]
    one += [(name, trace.DRAFT) for _ in range(3) for name in draft]
    one += [(name, "other") for name in (ENDS[4][0], "assign_extend_cache_locs")]
    truth, kernels, now = Counter(), [], 0.0
    for number in range(4):
        place = -1
        for name, group in one:
            if group == "attention":
                place += "direct_copy" in name
                group = f"attention, {LAYERS[place].split('_')[0]}"
            duration = LASTS.get(name, 2.0)
            if not number:
                truth[group] += duration
                truth[GAPS] += 0.5
            event = {"cat": "kernel", "name": name, "ts": now, "dur": duration}
            kernels.append(event)
            now += duration + 0.5
    groups, _, count = measured(read(tmp_path, kernels), LAYERS, True)
    assert count == 3
    for found in groups:
        assert {k: v for k, v in found.items() if v} == pytest.approx(dict(truth))


def test_overlapping_kernels_are_counted_once(tmp_path):
    events, _ = made(FORK, 4)
    for event in events[::3]:
        event["dur"] += 2.0  # into the next one
    kernels = read(tmp_path, events)
    groups, _, count = measured(kernels, LAYERS, True)
    starts = [k.start for k in kernels if k.name == "_fwd_grouped_kernel_stage1"]
    lasted = [b - a for a, b in zip(starts[::12], starts[12::12])]
    assert [sum(found.values()) for found in groups] == pytest.approx(lasted)
    assert len(lasted) == count == 3


def test_a_trace_of_another_model_is_refused(tmp_path):
    events, _ = made(FORK, 2)
    with pytest.raises(trace.TraceError, match="cannot be told apart"):
        measured(read(tmp_path, events), LAYERS * 3, True)
    with pytest.raises(trace.TraceError, match="no kernel of a GPU"):
        read(tmp_path, events[-1:])


def test_the_program_on_a_trace(tmp_path, capsys, refused):
    """Table, JSON and picture; the groups add up to the step."""
    events, truth = made(FORK, 5)
    read(tmp_path, events)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"layer_types": LAYERS}))
    arguments = ["--trace", str(tmp_path / "some.trace.json.gz"), "--name", "some"]
    arguments += ["--model", str(model), "--out", str(tmp_path), "--steps", "decode"]
    assert main(["profile", *arguments, "--plot", str(tmp_path / "img")]) == 0
    out = capsys.readouterr().out
    assert "| attention, sliding |" in out and "fused_moe_kernel" in out
    found = results.load(tmp_path / "some.json")
    (step,) = found.select(metric="step")
    parts = sum(record.median for record in found.select(metric="time"))
    assert parts == pytest.approx(step.median, rel=0.03)
    assert step.median == pytest.approx(sum(truth.values()) / 1e3)
    (picture,) = (tmp_path / "img").glob("*.svg")
    assert "logits and sampling" in picture.read_text()
    assert plot.draw(found, tmp_path / "img") == [picture]
    assert "exists: give another --name" in refused("profile", *arguments)


def test_arms_are_added_to_what_was_measured_alike(tmp_path):
    path = tmp_path / "step.json"

    def prepared(*argv):
        parser = Parser()
        command.arguments(parser)
        args = parser.parse_args([*argv, "--model", "some-model"])
        return command.prepare_results(args, path)

    first = prepared("--flags", "--page-size 16")
    command.record(
        first,
        "base",
        "prefill",
        ([{**dict.fromkeys(trace.GROUPS, 0.0), GAPS: 5.0}], {}, 1),
        0.0,
    )
    first.save(path)
    assert prepared("--flags", "--page-size 16").records == first.records
    with pytest.raises(UserError, match=r"otherwise \(mtp, context differ\)"):
        prepared("--flags", "--page-size 16", "--mtp", "2.75", "--context", "9")
    first.hardware["gpu"] = "another"
    first.save(path)
    with pytest.raises(UserError, match=r"otherwise \(GPU differ\)"):
        prepared("--flags", "--page-size 16")
    path.write_text("{")
    with pytest.raises(UserError, match="give another --name"):
        prepared()


def test_what_a_decode_step_must_read(tmp_path):
    """Of a small model, counted by hand: at two bytes a number and a microsecond each."""
    text = dict(SHAPES["26b-a4b"].text, num_hidden_layers=6, vocab_size=1000)
    text.update(vocab_size_per_layer_input=1000, sliding_window=64)
    config = text_config(Shape({**text, "layer_types": LAYERS[:6]}, *[{}] * 3, 0))
    config.architectures = ["Gemma4ForCausalLM"]
    config.save_pretrained(tmp_path)
    hidden, q, kv = 2816, 16 * 256, 8 * 256
    attention = 5 * (2 * hidden * q + 2 * hidden * kv)
    attention += 2 * hidden * 2 * q + hidden * 1024  # values are the keys
    expert = 3 * hidden * 704
    for requests, tokens, chosen in ((1, 50, 8), (2, 500, 8 + 8 * 15 / 16)):
        seen = min(tokens, 64)
        found = floors(tmp_path, requests, tokens, 1e-3)
        assert found == pytest.approx(
            {
                trace.LOGITS: 2 * 1000 * hidden,
                trace.PROJECTIONS: 2 * (attention + 6 * 3 * hidden * 2112),
                trace.EXPERTS: 2 * 6 * chosen * expert,
                trace.ROUTING: 2 * 6 * hidden * 128,
                trace.SLIDING: 2 * 2 * 5 * kv * seen * requests,
                trace.FULL: 2 * 2 * 1024 * tokens * requests,
            }
        )


def test_layers_without_keys_of_their_own_read_anothers(tmp_path):
    """Of E2B's kind: 8 layers sliding and 2 full, 5 of them with another's keys."""
    write_checkpoint(tmp_path / "e2b", "tiny-e2b", text_only=True, weights=False)
    found = floors(tmp_path / "e2b", 3, 100, 1e-3)
    assert found[trace.SLIDING] == pytest.approx(2 * 2 * 8 * 32 * 32 * 3)
    assert found[trace.FULL] == pytest.approx(2 * 2 * 2 * 64 * 100 * 3)
    hidden, q, kv = 128, 4, 1
    own = 4 * 32 * (q + 2 * kv) + 64 * (q + 2 * kv)
    shared = 4 * 32 * q + 64 * q
    outputs = (8 * 32 + 2 * 64) * q
    mlps = 3 * 96 * (5 + 5 * 2)  # double width where keys are shared
    per_layer = 10 * (16 + 16) + 10 * 16
    matrices = own + shared + outputs + mlps + per_layer
    assert found[trace.PROJECTIONS] == pytest.approx(2 * hidden * matrices)
    assert trace.ROUTING not in found and trace.EXPERTS not in found


@pytest.mark.parametrize(
    "kind, names",
    # Triton's kernels of 0.5.23 whose names say less than they seem to.
    [
        ("attention", "_fwd_kernel_unified _verify_prefix_stage1 _fwd_kernel_stage2"),
        (
            "logits and sampling",
            "_wide_row_softmax_partials_kernel _draft_topk1_finalize_kernel "
            "verify_tree_greedy_kernel_triton softcap_inplace_logits_kernel",
        ),
        ("routing", "_gemma4_routing_kernel"),
        (
            "other",
            "_pack_verify_mask_kernel _verify_commit_outputs_kernel "
            "fill_widened_draft_extend_inputs_kernel _fused_decode_metadata_kernel "
            "_prepare_draft_extend_lengths_kernel get_num_kv_splits_triton",
        ),
    ],
)
def test_kernels_by_their_names(kind, names):
    assert {trace.kind_of(name) for name in names.split()} == {kind}


class Streams(http.server.BaseHTTPRequestHandler):
    """What both engines stream, a token every few milliseconds, as long as it is read."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        self.send_response(200)
        self.end_headers()
        if self.path == "/abort_request":
            self.server.aborted.set()
            return
        sampling = asked.get("sampling_params", asked)
        try:
            for _ in range(sampling.get("max_new_tokens") or asked["max_tokens"]):
                if self.server.aborted.is_set():
                    break
                self.wfile.write(b"data: {}\n\n")
                time.sleep(0.005)
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.server.left.append(self.path)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_requests_of_both_engines(tmp_path, engine):
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Streams)
    http_server.asked, http_server.left = [], []
    http_server.aborted = threading.Event()
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    setup = Setup(Path("/some/model"), http_server.server_port, profiles=tmp_path)
    server = ArmServer(Arm(engine), setup, tmp_path / "log")
    try:
        requests = Requests(server, 2, 10, 3, 0)
        requests.wait()
        assert [len(times) for times in requests.times] == [3, 3]
        path, asked = http_server.asked[0]
        tokens = asked["input_ids" if engine == "sglang" else "prompt"]
        assert len(tokens) == 10 and asked["stream"]
        if engine == "vllm":
            assert path == "/v1/completions" and asked["model"] == "/some/model"
            assert asked["ignore_eos"] and asked["temperature"] == 0
        requests = Requests(server, 2, 10, 10**6, 1)
        requests.wait_for_first_tokens()
        begin = time.perf_counter()
        time.sleep(0.2)
        assert 0.004 < requests.interval(begin) < 0.1
        requests.stop()
        assert http_server.aborted.is_set() == (engine == "sglang")
        deadline = time.monotonic() + 10
        while engine == "vllm" and len(http_server.left) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        http_server.aborted.set()
        http_server.shutdown()
        http_server.server_close()


def test_a_machine_without_a_gpu(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    said = refused("profile", "--out", str(tmp_path))
    assert "no GPU" in said and "--trace groups" in said
