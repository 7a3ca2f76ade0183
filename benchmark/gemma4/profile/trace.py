"""Cuts a trace of torch.profiler into steps of a forward pass, and gives each kernel to a
group.

Groups are found by the kernels' names, and where many layers share a name by their
place: the attention kernels between two other kernels are one layer's, and the layers'
kinds are those of the checkpoint's config, in its order.
"""

import bisect
import dataclasses
import gzip
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, List, Tuple

from gemma4.errors import UserError

SLIDING, FULL = "attention, sliding", "attention, full"
EXPERTS, ROUTING, NORMS = "experts", "routing", "norms and rope"
KV, PROJECTIONS, LOGITS = "KV writes", "projections", "logits and sampling"
OTHER, GAPS, DRAFT = "other", "gaps", "draft"
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


class TraceError(UserError):
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
