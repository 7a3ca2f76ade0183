"""The kernels of a trace of torch.profiler, and what kind each is, by its name."""

import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import List

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
