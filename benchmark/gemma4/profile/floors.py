"""What a decode step must read, and how long that takes."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict

from gemma4.engines.host import own_environment
from gemma4.errors import UserError
from gemma4.profile.live import decode_title
from gemma4.profile.trace import (
    EXPERTS,
    FULL,
    GROUPS,
    LOGITS,
    PROJECTIONS,
    ROUTING,
    SLIDING,
)
from gemma4.report.results import Results

BYTES = "bytes"  # an arm that is none: what must be read


def floors(model: Path, requests: int, tokens: int, rate: float) -> Dict[str, float]:
    """ms in which a decode step could read what it must, by group, in bfloat16.

    That is each weight once (of the experts, as many as are chosen on average if each is
    as likely as any other), and the keys and values that are attended to.

    Args:
        model: The checkpoint's folder.
        tokens: Of each request, the newest among them.
        rate: Bytes a microsecond.
    """
    from gemma4.checkpoint.weights import on_meta
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


def add_floors(args, results: Results) -> None:
    """The arm BYTES: for each decode step, what it must read at the rate of a copy."""
    # In a process of its own, which leaves no memory taken on the GPU.
    program = "from gemma4.kernels.timing import copy_rate; print(copy_rate())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        **dict(env=own_environment(), capture_output=True, text=True),
    )
    if done.returncode:
        raise UserError(f"The GPU's copy rate was not measured: {done.stderr[-300:]}")
    rate = float(done.stdout)
    results.settings.update(copy_bytes_per_us=round(rate), limits=[BYTES])
    for count in args.requests:
        found = floors(args.model, count, args.context_tokens, rate)
        for group in GROUPS:
            case = {"step": decode_title(count), "group": group}
            if group in found and results.get(case, BYTES, "time") is None:
                results.add(case, BYTES, "time", "ms", [round(found[group], 5)])
