"""Show where the GPU time of one prefill and one decode step goes, arm beside arm.

    python benchmark/gemma4/profile_step.py --name step-h200 --plot docs/img
    python benchmark/gemma4/profile_step.py --arms fork --requests 1 --steps decode

For each arm (see serving.py) a server is started; torch.profiler records, through its
/start_profile, the kernels of one prompt's prefill, and those of a few decode steps
while 1, 8 and 80 requests decode; with --mtp a step verifies, accepts and drafts. Each
instant of a step goes to the group of the kernel that runs then, or to `gaps` where
none does, so that the groups add up to the step. A decode step lasts from the first
kernel of one step's first attention to that of the next; a prefill from its first
kernel to its sampled token.

The same --name again adds the arms and steps that it lacks. vLLM's profiler records the
CPU's side as well, which lengthens its gaps: how long a step takes without a profiler
stands beside each.

Groups are found by the kernels' names, and where many layers share a name by their
place: the attention kernels between two other kernels are one layer's, and the layers'
kinds are those of the checkpoint's config, in its order. `--trace FILE` groups a trace
that is there already.
"""

import argparse
import bisect
import dataclasses
import gzip
import http.client
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import run as runner  # noqa: E402
import serving  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402
from serving import HouseError, Server, Setup  # noqa: E402

# Kernels alone: recording the CPU's side slows a step down.
ACTIVITIES = ["GPU"]
TRACES = "*.trace.json.gz"
# Tokens that one request alone makes at most while it is profiled.
STREAM = 6400
SLIDING, FULL = "attention, sliding", "attention, full"
EXPERTS, ROUTING, NORMS = "experts", "routing", "norms and rope"
KV, PROJECTIONS, LOGITS = "KV writes", "projections", "logits and sampling"
OTHER, GAPS, DRAFT = "other", "gaps", "draft"
BYTES = "bytes"  # an arm that is none: what must be read
GROUPS = (
    *(SLIDING, FULL, EXPERTS, ROUTING, NORMS, KV, PROJECTIONS, LOGITS),
    *(DRAFT, OTHER, GAPS),
)
ATTENTION, MATMUL, POINTWISE, SELECT = "attention", "matmul", "pointwise", "select"
# What a kernel is, by the first pattern that its name has.
PREPARATION = (
    r"kv_indices|unified_indices|num_kv_splits|kv_indptr|page_table|translate|alloc_"
    r"|req_to_token|last_loc|cache_loc|compute_position|clamp_pos|_metadata"
    r"|draft_extend|verify_(mask|commit)"
)
RULES = (
    (NORMS, r"rms_?norm|layer_?norm|rsqrt|\brope|_rope|rotary|_norm_|pre_feedforward"),
    (OTHER, PREPARATION),
    (KV, r"store_?(kv)?_?cache|(set|store|copy|write)_kv|reshape_and_cache|kv_?write"),
    (
        LOGITS,
        r"softcap|sampl|argmax|MaxOps|cunn_?softmax|multinomial|exponential|topk_topp"
        r"|cross_?entropy|verify_?tree|draft_topk|row_softmax|candidate_lse",
    ),
    (
        ATTENTION,
        r"_fwd_kernel|_fwd_grouped|fmha|attention|attn|flash(::|_fwd|_decode)|_lse\b"
        r"|decode_stage|_extend_|_verify_|stage[12]\b|BatchPrefill|BatchDecode|splitkv"
        r"|reduce_segments",
    ),
    (ROUTING, r"routing|topk|bitonicSort|radixFindKth|softmax_warp"),
    (EXPERTS, r"fused_moe|moe_|_moe|count_and_sort|sorted_token|copy__mul_sum"),
    (MATMUL, r"gemm|nvjet|cutlass|cublas|splitK|gemv|wgmma|matmul|xmma|_mm_"),
    (POINTWISE, r"gelu|silu|act_and_mul"),
)
DECODES = re.compile(r"stage[12]\b|decode|splitkv|reduce_segments", re.IGNORECASE)
RULES = [(group, re.compile(pattern, re.IGNORECASE)) for group, pattern in RULES]


@dataclasses.dataclass
class Kernel:
    name: str
    start: float  # µs
    end: float
    kind: str = ""
    group: str = ""


class TraceError(HouseError):
    pass


def read_trace(path: Path) -> List[Kernel]:
    """The kernels, copies and fills of a torch.profiler trace, in order of their start."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as file:
        events = json.load(file)["traceEvents"]
    kernels = [
        Kernel(e["name"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and "dur" in e
    ]
    if not kernels:
        raise TraceError(f"{path} has no kernel of a GPU.")
    return sorted(kernels, key=lambda kernel: kernel.start)


def kind_of(name: str) -> str:
    for kind, pattern in RULES:
        if pattern.search(name):
            return kind
    return OTHER


def blocks(kernels: List[Kernel]) -> List[Tuple[int, int]]:
    """The runs of attention kernels, one a layer, as (first, past the last) indices.

    Kernels that write the cache, or that are of no known kind, do not part a run.
    """
    found, first, last = [], None, None
    for i, kernel in enumerate(kernels):
        if kernel.kind == ATTENTION:
            first, last = (i if first is None else first), i
        elif first is not None and kernel.kind not in (OTHER, KV):
            found.append((first, last + 1))
            first = None
    if first is not None:
        found.append((first, last + 1))
    return found


def steps(kernels: List[Kernel], layers: List[str], decode: bool) -> List[List[Kernel]]:
    """Cuts a trace into steps of a forward pass each, their kernels with their groups.

    Args:
        layers: `sliding_attention` or `full_attention` for each layer of the model.
        decode: Whole steps between the first and the last; else one step, of all that
            is prefilled. The decode step that an overlapping scheduler launches before
            it knows that the request is finished is left out.

    Raises:
        TraceError: The layers cannot be told apart.
    """
    for kernel in kernels:
        kernel.kind = kind_of(kernel.name)
    runs = blocks(kernels)
    # A layer of the target has experts after its attention, one of the draft has none.
    bounds = [first for first, _ in runs] + [len(kernels)]
    target = [
        any(k.kind == EXPERTS for k in kernels[a:b]) for a, b in zip(bounds, bounds[1:])
    ]
    if not any(target):
        target = [True] * len(runs)
    if not decode:
        # What decodes splits its keys and values.
        for i, (first, past) in enumerate(runs):
            if any(DECODES.search(kernel.name) for kernel in kernels[first:past]):
                target[i] = False
    count = sum(target)
    if count < len(layers) or not decode and count % len(layers):
        raise TraceError(
            f"The trace has the attention of {count} layers and the model "
            f"{len(layers)}: they cannot be told apart."
        )
    positions = [i for i, is_target in enumerate(target) if is_target]
    # A trace that begins amid a step shows it: its first pass is short of layers. The
    # longest distance between two layers' starts is where passes meet.
    offset = _phase(kernels, runs, positions, len(layers)) if decode else 0
    starts = positions[offset :: len(layers)]
    for number, i in enumerate(positions):
        layer = (number - offset) % len(layers)
        sliding = layers[layer] == "sliding_attention"
        first, end = bounds[i], bounds[i + 1]
        _group_layer(kernels, first, end, runs[i][1], SLIDING if sliding else FULL)
        if layer == len(layers) - 1:
            sampled = _group_logits(kernels, runs[i][1], end)
            if i + 1 < len(target) and not target[i + 1]:
                _group_draft_input(kernels[sampled:end])
    for i, is_target in enumerate(target):
        if not is_target:
            # After the last of its passes the target's next one begins.
            end, more = bounds[i + 1], target[i + 1 : i + 2] == [False]
            past = end if more else _sampled(kernels, runs[i][1], end)
            for kernel in kernels[bounds[i] : past]:
                kernel.group = DRAFT
            _group_layer(kernels, past, end, past, OTHER)
    _group_layer(kernels, 0, bounds[0], 0, OTHER)
    for i in positions:
        _group_inputs(kernels, runs[i][0], kernels[runs[i][0]].group)
    if not decode:
        last = positions[-1]
        return [kernels[: _sampled(kernels, runs[last][1], bounds[last + 1])]]
    cuts = [runs[i][0] for i in starts]
    # Cut at the start of a step's first layer; what is before the first cut and after
    # the last belongs to steps that the trace does not hold whole.
    return [kernels[a:b] for a, b in zip(cuts, cuts[1:])]


def _phase(kernels, runs, positions, layers: int) -> int:
    """The first of `positions` that begins a pass: layers follow each other evenly,
    and passes are parted by logits and sampling, which have a kernel of their own."""
    votes = Counter()
    for n, (a, b) in enumerate(zip(positions, positions[1:])):
        between = kernels[runs[a][1] : runs[b][0]]
        if any(k.kind == LOGITS for k in between):
            votes[(n + 1) % layers] += 1
    if not votes:
        gaps = [
            kernels[runs[b][0]].start - kernels[runs[a][1] - 1].end
            for a, b in zip(positions, positions[1:])
        ]
        for n, gap in enumerate(gaps):
            votes[(n + 1) % layers] += gap
    return votes.most_common(1)[0][0] if votes else 0


def _group_layer(kernels, first: int, end: int, past: int, attention: str) -> None:
    """Groups the kernels from a layer's attention to the next layer's."""
    part = kernels[first:end]
    at = {
        kind: [i for i, k in enumerate(part) if k.kind == kind]
        for kind in (EXPERTS, ROUTING)
    }
    experts, routing = at[EXPERTS], at[ROUTING]
    for i, kernel in enumerate(part):
        if kernel.kind == ATTENTION or first + i < past and kernel.kind == OTHER:
            kernel.group = attention
        elif kernel.kind == MATMUL:
            kernel.group = PROJECTIONS
        elif kernel.kind == POINTWISE:
            inside = experts and experts[0] < i < experts[-1]
            kernel.group = EXPERTS if inside else PROJECTIONS
        elif kernel.kind == OTHER:
            # Elementwise kernels between a router's selection and its experts.
            chosen = routing and experts and routing[0] < i < experts[0]
            inside = experts and experts[0] < i < experts[-1]
            kernel.group = ROUTING if chosen else EXPERTS if inside else OTHER
        else:
            kernel.group = kernel.kind
    if routing:
        # The product that makes the router's logits is the shortest before its
        # selection: it has one column an expert. The sum of its parts may follow it.
        before = [i for i in range(routing[0]) if part[i].kind == MATMUL]
        products = [i for i in before if "reduce" not in part[i].name.lower()]
        if products:
            router = min(products, key=lambda i: part[i].end - part[i].start)
            part[router].group = ROUTING
            if router + 1 in before and router + 1 not in products:
                part[router + 1].group = ROUTING
            for kernel in part[before[-1] : routing[0]]:
                if kernel.kind == OTHER:
                    kernel.group = ROUTING


def _group_inputs(kernels: List[Kernel], first: int, attention: str) -> None:
    """Copies between a layer's norm or cache write and its attention are for the latter."""
    start = first
    while start and kernels[start - 1].kind == OTHER:
        start -= 1
    if start and kernels[start - 1].kind in (NORMS, KV):
        for kernel in kernels[start:first]:
            if not re.search(PREPARATION, kernel.name):
                kernel.group = attention


def _sampled(kernels: List[Kernel], first: int, end: int) -> int:
    """Past a pass's last kernel: its sampling, and the copies of what was sampled."""
    past = max(
        (i + 1 for i in range(first, end) if kernels[i].kind == LOGITS), default=0
    )
    if not past:
        return end
    while past < end and kernels[past].name.startswith("Memcpy"):
        past += 1
    return past


def _group_draft_input(part: List[Kernel]) -> None:
    """Before a draft's first attention: from its first product on it is the draft's."""
    products = [i for i, kernel in enumerate(part) if kernel.kind == MATMUL]
    for kernel in part[products[0] :] if products else []:
        kernel.group = DRAFT


def _group_logits(kernels: List[Kernel], first: int, end: int) -> int:
    """After the last layer: the output head, the largest of its products, to the
    sampled tokens; returns where they end. What then prepares the next pass is OTHER.
    """
    past = _sampled(kernels, first, end)
    part = kernels[first:past]
    last = max((i for i, k in enumerate(part) if k.kind == EXPERTS), default=-1)
    products = [i for i in range(last + 1, len(part)) if part[i].kind == MATMUL]
    if products:
        head = max(products, key=lambda i: part[i].end - part[i].start)
        for kernel in part[head:]:
            kernel.group = LOGITS
    return past


def shares(step: List[Kernel], until: float) -> Dict[str, float]:
    """µs of each group from the step's start to `until`; with the gaps that is all.

    An instant at which several kernels run is the first one's.
    """
    found = dict.fromkeys(GROUPS, 0.0)
    now = step[0].start
    for kernel in step:
        start, end = max(kernel.start, now), min(kernel.end, until)
        if start > now:
            found[GAPS] += start - now
            now = start
        if end > now:
            found[kernel.group] += end - now
            now = end
    found[GAPS] += max(until - now, 0.0)
    return found


def measured(
    kernels: List[Kernel], layers: List[str], decode: bool
) -> Tuple[List[Dict[str, float]], Dict[str, Tuple[int, float]], float]:
    """(µs of each group in each step, kernel -> (launches, µs) a step, steps)."""
    found = steps(kernels, layers, decode)
    if not found:
        raise TraceError("The trace holds no whole step.")
    ends = [step[0].start for step in found[1:]]
    if decode:
        position = bisect.bisect([k.start for k in kernels], found[-1][-1].start)
        # The next step's first attention closes the last one.
        ends.append(kernels[position].start)
    else:
        ends.append(max(k.end for k in found[-1]))
    groups = [shares(step, end) for step, end in zip(found, ends)]
    launches: Dict[str, List[float]] = defaultdict(list)
    for step in found:
        for kernel in step:
            label = f"{kernel.group}: {short(kernel.name)}"
            launches[label].append(kernel.end - kernel.start)
    return (
        groups,
        {
            name: (len(times) / len(found), sum(times) / len(found))
            for name, times in launches.items()
        },
        len(found),
    )


def floors(model: Path, requests: int, tokens: int, rate: float) -> Dict[str, float]:
    """ms in which a decode step could read what it must, by group, in bfloat16.

    That is each weight once (of the experts, as many as are chosen on average if each is
    as likely as any other), and the keys and values that are attended to.

    Args:
        model: The checkpoint's folder.
        tokens: Of each request, the newest among them.
        rate: Bytes a microsecond.
    """
    from checkpoint import on_meta
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    chosen = 0.0
    if getattr(text, "num_experts", None):
        missed = (1 - text.top_k_experts / text.num_experts) ** requests
        chosen = 1 - missed
    parts = {
        LOGITS: ("embed_tokens.weight", 1.0),
        ROUTING: ("router.proj.weight", 1.0),
        EXPERTS: ("experts.", chosen),
        PROJECTIONS: (
            r"(self_attn|mlp)\.\w+_proj|per_layer_(input_gate|(model_)?projection)\.",
            1.0,
        ),
    }
    read: Dict[str, float] = defaultdict(float)
    for name, weight in on_meta(config).items():
        if "vision" in name or "audio" in name:
            continue
        for group, (pattern, share) in parts.items():
            if re.search(pattern, name):
                read[group] += 2 * weight.numel() * share
    # A layer that has no keys and values of its own reads another's, of the same size.
    for kind, layer in zip(text.layer_types, text.per_layer_config):
        sliding = kind == "sliding_attention"
        seen = min(tokens, text.sliding_window) if sliding else tokens
        width = layer.num_key_value_heads * layer.head_dim
        # Keys and as many values.
        read[SLIDING if sliding else FULL] += 2 * 2 * width * seen * requests
    return {group: size / rate / 1e3 for group, size in read.items()}


def short(name: str) -> str:
    """A kernel's name without return type, namespaces and most template arguments."""
    name = re.sub(r"^void |\((anonymous namespace|anonymous)\)::", "", name)
    inner = re.findall(r"(\w*(?:Functor|Op|kernel_impl|lambda)\w*)", name)
    head = re.split(r"[<(]", name)[0].split("::")[-1]
    if head in (
        "vectorized_elementwise_kernel",
        "elementwise_kernel",
        "reduce_kernel",
        "unrolled_elementwise_kernel",
        "index_elementwise_kernel",
    ):
        names = [n for n in inner if n not in (head,)]
        head += f" {names[0]}" if names else ""
    return head[:60]


# On a live server -----------------------------------------------------------


def decode_title(requests: int) -> str:
    return f"decode, {requests} request{'s' * (requests > 1)}"


class Requests:
    """Random prompts that a server is answering, each in a thread of its own.

    vLLM is asked through the API of OpenAI, which SGLang would count text for.
    """

    def __init__(self, server: Server, count: int, input: int, output: int, seed: int):
        self.server, self.first = server, threading.Semaphore(0)
        self.times: List[List[float]] = [[] for _ in range(count)]
        self.failed: List[str] = []
        self.stopped = False
        generator = random.Random(seed)
        self.threads = [
            threading.Thread(
                target=self._ask,
                args=(i, [generator.randrange(1000, 250000) for _ in range(input)]),
                kwargs={"output": output},
                daemon=True,
            )
            for i in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int, prompt: List[int], output: int) -> None:
        sampling = {"temperature": 0, "ignore_eos": True}
        if self.server.arm.engine == "vllm":
            path, asked = "/v1/completions", {"prompt": prompt, "max_tokens": output}
            asked.update(sampling, model=str(self.server.setup.model))
        else:
            path, asked = "/generate", {"input_ids": prompt}
            asked["sampling_params"] = {**sampling, "max_new_tokens": output}
        try:
            asked["stream"] = True
            # vLLM stops a request when nobody listens any more.
            with self.server.ask(path, asked, timeout=600) as response:
                for line in response:
                    if self.stopped:
                        break
                    if line.startswith(b'data: {"error"'):
                        raise OSError(line.decode(errors="replace").strip())
                    if line.startswith(b"data: {"):
                        self.times[number].append(time.perf_counter())
                        if len(self.times[number]) == 1:
                            self.first.release()
            if not self.times[number] and not self.stopped:
                raise OSError("it was answered nothing")
        except (OSError, http.client.HTTPException) as e:
            if not self.stopped:
                self.failed.append(str(e))
            self.first.release()

    def wait_for_first_tokens(self) -> None:
        for _ in self.threads:
            self.first.acquire()
        self.check()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join()
        self.check()

    def stop(self) -> None:
        """Ends those that still run: what they would say is of no use."""
        self.check()
        self.stopped = True
        if self.server.arm.engine == "sglang":
            self.server.ask("/abort_request", {"rid": "", "abort_all": True}).read()
        for thread in self.threads:
            thread.join()

    def check(self) -> None:
        if self.failed:
            self.server.check_alive("while it was profiled")
            raise HouseError(f"A request failed: {self.failed[0]}")

    def interval(self, since: float) -> float:
        """The median time between two tokens of a request from then on, in seconds."""
        found = sorted(
            b - a
            for times in self.times
            for a, b in zip(times, times[1:])
            if a >= since
        )
        return found[len(found) // 2] if found else 0.0


class Profiler:
    def __init__(self, server: Server, folder: Path):
        self.server, self.folder = server, folder

    def record(self, name: str, body) -> List[Kernel]:
        """The kernels that ran while `body` did."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        settings = {
            "output_dir": str(folder),
            "activities": ACTIVITIES,
            "with_stack": False,
            "record_shapes": False,
        }
        written = self.server.setup.profiles or folder
        before = set(written.glob(TRACES))
        self.server.ask("/start_profile", settings).read()
        try:
            body()
        finally:
            self.server.ask("/stop_profile", {}, timeout=300).read()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for path in set(written.glob(TRACES)) - before:
                try:
                    kernels = read_trace(path)
                    folder.mkdir(parents=True, exist_ok=True)
                    path.replace(folder / path.name)
                    return kernels
                except (EOFError, OSError, ValueError):
                    pass  # not written to its end yet
            self.server.check_alive("while it wrote its profile")
            time.sleep(0.1)
        raise HouseError(
            f"The server of {self.server.arm.name} wrote no profile into {folder}: see "
            f"{self.server.log}."
        )


def flush(server: Server) -> None:
    """Empties the prefix cache, once the last request has left the scheduler."""
    if server.arm.engine == "vllm":
        return  # No prompt has another's beginning for long.
    for attempt in range(20):
        try:
            server.ask("/flush_cache", {}).read()
            return
        except urllib.error.HTTPError as e:
            if attempt == 19:
                raise HouseError(f"The server does not flush its cache: {e}.") from None
            time.sleep(0.25)


def profile_prefill(server, profiler, args) -> Tuple[List[Kernel], float]:
    """(kernels of one prompt's prefill, seconds to its first token without a profiler)"""
    waits = []
    for seed in range(2):  # the first compiles
        begin = time.perf_counter()
        requests = Requests(server, 1, args.input, 1, seed)
        requests.wait()
        waits.append(requests.times[0][0] - begin)
        flush(server)

    def body():
        Requests(server, 1, args.input, 1, 10).wait()

    kernels = profiler.record("prefill", body)
    flush(server)
    return kernels, min(waits)


def profile_decode(server, profiler, args, count: int) -> Tuple[List[Kernel], float]:
    """(kernels of some decode steps, seconds between tokens without a profiler)"""
    # Few requests have short steps, and must last as long.
    output = max(args.output, STREAM // count)
    requests = Requests(server, count, args.context_tokens, output, count)
    requests.wait_for_first_tokens()
    time.sleep(0.3)  # the first steps may compile
    begin = time.perf_counter()
    time.sleep(0.7)
    interval = requests.interval(begin)
    kernels = profiler.record(
        f"decode-{count}", lambda: time.sleep(max(8 * interval, 0.05))
    )
    requests.stop()
    flush(server)
    return kernels, interval


def add(results: Results, arm: str, step: str, found, undisturbed: float) -> None:
    groups, kernels, count = found
    for group in GROUPS:
        samples = [round(one[group] / 1e3, 5) for one in groups]
        if any(samples):
            results.add({"step": step, "group": group}, arm, "time", "ms", samples)
    totals = [round(sum(one.values()) / 1e3, 5) for one in groups]
    results.add({"step": step}, arm, "step", "ms", totals)
    if undisturbed:
        results.add(
            {"step": step}, arm, "without profiler", "ms", [round(1e3 * undisturbed, 4)]
        )
    for name, (launches, us) in sorted(kernels.items(), key=lambda k: -k[1][1])[:40]:
        case = {"step": step, "kernel": name}
        results.add(case, arm, "kernel time", "us a step", [round(us, 2)])
        results.add(case, arm, "launches", "a step", [round(launches, 2)])
    launched = sum(launches for launches, _ in kernels.values())
    results.add({"step": step}, arm, "kernels", "a step", [round(launched, 1)])


def show(results: Results, step: str, top: int) -> str:
    arms = [arm for arm in results.arms() if arm != BYTES]
    against = arms[0] if len(arms) > 1 else None
    parts = [table(results, "time", against, step=step)]
    for arm in arms:
        total = results.get({"step": step}, arm, "step")
        if total is None:
            continue
        said = f"{arm}: a step of {total.median:.3f} ms"
        alone = results.get({"step": step}, arm, "without profiler")
        if alone:
            said += f" ({alone.median:.3f} ms without the profiler)"
        parts.append(said)
        lines = [f"{'us a step':>10} {'launches':>9} {'mean us':>8}  kernel"]
        records = list(results.select(arm, "kernel time", step=step))[:top]
        for record in records:
            launches = results.get(record.case, arm, "launches").median
            us = record.median
            lines.append(
                f"{us:10.1f} {launches:9.1f} {us / launches:8.2f}  {record.case['kernel']}"
            )
        parts.append("\n".join(lines))
    return f"\n{step}\n\n" + "\n\n".join(parts)


def layer_types(model: Path) -> List[str]:
    config = json.loads((model / "config.json").read_text())
    return config.get("text_config", config)["layer_types"]


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="step", help="of the result file")
    parser.add_argument("--shape", default="26b-a4b", help="of random weights")
    parser.add_argument("--model", type=Path, help="a checkpoint, instead of --shape")
    parser.add_argument("--draft", type=Path, help="its MTP draft's checkpoint")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: base,fork")
    parser.add_argument("--arm", action="append", default=[], metavar="ARM")
    parser.add_argument("--steps", default="prefill,decode")
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[1, 8, 80], help="that decode"
    )
    parser.add_argument("--input", type=int, default=8000, help="tokens prefilled")
    parser.add_argument("--context-tokens", type=int, default=1000, help="of a decoder")
    parser.add_argument(
        "--output", type=int, default=400, help="tokens a decoder makes at most"
    )
    parser.add_argument("--mtp", default="off", help="or accepted tokens a step")
    parser.add_argument("--top", type=int, default=15, help="kernels to print")
    parser.add_argument("--flags", default="", help="more for every server")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--start-timeout", type=float, default=900)
    parser.add_argument(
        "--trace", type=Path, help="group this trace instead of serving"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--logs", type=Path, default=serving.CACHE / "logs")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw SVGs there")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    with serving.reported("profile_step.py"):
        path = args.out / f"{args.name}.json"
        if path.exists() and args.trace:
            raise HouseError(f"{path} exists: give another --name, or remove it.")
        if not serving.has_gpu() and not args.trace:
            raise HouseError(
                "This machine has no GPU that torch can use, and a step's time is that "
                "of a GPU's kernels; --trace groups a trace that is there."
            )
        args.mtp = [args.mtp]
        runner.prepare_model(args)
        layers = layer_types(args.model)
        results = prepare_results(args, path)
        if args.trace:
            decode = "prefill" not in args.steps
            step = "decode" if decode else "prefill"
            found = measured(read_trace(args.trace), layers, decode)
            add(results, args.trace.name, step, found, 0.0)
        else:
            profile(args, layers, results, path)
        for step in dict.fromkeys(r.case["step"] for r in results.records):
            print(show(results, step, args.top))
        print(f"\nwrote {results.save(path)}")
        if args.plot:
            from plot import draw

            for picture in draw(results, args.plot):
                print(picture)


def prepare_results(args: argparse.Namespace, path: Path) -> Results:
    """The result file, or what is there of the same measurement, to add arms to."""
    settings = {
        "model": args.model.name,
        "mtp": args.mtp[0],
        "server": args.flags,
        "context": args.context,
        "context tokens": args.context_tokens,
    }
    if not path.exists():
        title = "Where a step's time goes"
        return Results.start(
            *("kernels", args.name, title), **settings, stacked="group", arms={}
        )
    return runner.resume(path, settings, {})


def add_floors(args, results: Results) -> None:
    """The arm BYTES: for each decode step, what it must read at the rate of a copy."""
    # In a process of its own, which leaves no memory taken on the GPU.
    program = "import timing; print(timing.copy_rate())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        **dict(cwd=Path(__file__).parent, capture_output=True, text=True),
    )
    if done.returncode:
        raise HouseError(f"The GPU's copy rate was not measured: {done.stderr[-300:]}")
    rate = float(done.stdout)
    results.settings.update(copy_bytes_per_us=round(rate), limits=[BYTES])
    for count in args.requests:
        found = floors(args.model, count, args.context_tokens, rate)
        for group in GROUPS:
            case = {"step": decode_title(count), "group": group}
            if group in found and results.get(case, BYTES, "time") is None:
                results.add(case, BYTES, "time", "ms", [round(found[group], 5)])


def profile(args, layers: List[str], results: Results, path: Path) -> None:
    serving.check_port(args.port)
    args.logs = args.logs.resolve()
    arms = serving.chosen_arms(args.arms, args.arm, ["base", "fork"])
    for arm in arms:
        known = results.settings["arms"].get(arm.name)
        if known and known["code_sha256"] != arm.code:
            raise HouseError(
                f"{path} holds the arm {arm.name} with other code: give another --name."
            )
    on = args.mtp != ["off"]
    setup = Setup(
        *(args.model, args.port),
        context=args.context,
        draft=args.draft if on else None,
        accepted=float(args.mtp[0]) if on else 0.0,
        requests=max(args.requests),
        flags=args.flags.split(),
    )
    wanted = args.steps.split(",")
    kinds = ["prefill"] * ("prefill" in wanted)
    kinds += [count for count in args.requests] if "decode" in wanted else []
    title = {kind: decode_title(kind) for kind in kinds if kind != "prefill"}
    title["prefill"] = f"prefill, {args.input} tokens"
    with tqdm(total=len(arms) * (1 + len(kinds)), unit="step", disable=None) as bar:
        for arm in arms:
            missing = [
                kind
                for kind in kinds
                if results.get({"step": title[kind]}, arm.name, "step") is None
            ]
            bar.update(len(kinds) - len(missing))
            if not missing:
                bar.update()
                continue
            bar.set_description(f"{arm.name}: starting")
            stem = args.logs / args.name / arm.name
            own = dataclasses.replace(
                setup, profiles=stem if arm.engine == "vllm" else None
            )
            server = Server(arm, own, stem.with_name(f"{arm.name}.server.log"))
            with server.running(args.start_timeout):
                tqdm.write(f"{arm.name}: up in {server.seconds:.0f} s")
                bar.update()
                profiler = Profiler(server, stem)
                # Builds the kernels, and starts what the profiler starts once.
                profiler.record("warm-up", Requests(server, 2, 100, 32, 0).wait)
                flush(server)
                for kind in missing:
                    bar.set_description(f"{arm.name}: {kind}")
                    try:
                        step = title[kind]
                        if kind == "prefill":
                            kernels, alone = profile_prefill(server, profiler, args)
                        else:
                            kernels, alone = profile_decode(
                                server, profiler, args, kind
                            )
                        found = measured(kernels, layers, kind != "prefill")
                        add(results, arm.name, step, found, alone)
                        results.settings["arms"][arm.name] = arm.describe()
                    except TraceError as e:
                        print(f"{arm.name}, {kind}: {e}", file=sys.stderr)
                    results.save(path)
                    bar.update()
    if "decode" in wanted and not on:
        add_floors(args, results)


if __name__ == "__main__":
    main()
