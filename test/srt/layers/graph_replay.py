"""What the Triton backend writes before a CUDA graph of decode or verification is replayed,
and what it should, in plain Python.

On CUDA where there is a GPU, else on CPU tensors in Triton's interpreter.
"""

import math
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from window_layer import DEVICE, WindowLayer

from sglang.srt.model_executor.forward_batch_info import ForwardMode

WINDOW, CONTEXT = 1023, 3100
CORES, MOST, TILE = 132, 8, 256
UNWRITTEN, AROUND = -7, 4096
SPLITS = ["dynamic", "static", "no cores", "deterministic"]


class Replay:
    """A backend whose graphs hold `rows` requests, and whose buffers nobody wrote."""

    def __init__(
        self,
        rows,
        drafts=4,
        window=WINDOW,
        hybrid=True,
        splits="dynamic",
        heads=(16, 2),
        skip_prefill=False,
    ):
        self.layer = WindowLayer(window, rows, CONTEXT + 3 * drafts, hybrid=hybrid)
        self.window, self.hybrid, self.drafts = window, hybrid, drafts
        self.backend = backend = self.layer.backend
        vars(backend).update(
            num_head=heads[0],
            num_kv_head=heads[1],
            max_kv_splits=MOST,
            device_core_count=0 if splits == "no cores" else CORES,
            static_kv_splits=splits == "static",
            enable_deterministic=splits == "deterministic",
            split_tile_size=TILE if splits == "deterministic" else None,
        )
        backend.init_cuda_graph_state(rows, rows * drafts)
        for name, buffer in self.buffers().items():
            # Between two others, so that what is written beside it is seen.
            room = torch.full(
                (len(buffer) + 2 * AROUND,), UNWRITTEN, dtype=buffer.dtype
            )
            buffer = room.to(DEVICE)[AROUND:-AROUND]
            if name.endswith("indptr"):
                buffer[0] = 0
            setattr(backend, name, buffer)

    def buffers(self):
        names = ["kv_indptr", "cuda_graph_kv_indices", "cuda_graph_num_kv_splits"]
        names += ["qo_indptr", "mask_indptr", "cuda_graph_uneven_batch"]
        if self.window:
            names += ["window_kv_indptr", "cuda_graph_window_kv_indices"]
            names += ["cuda_graph_window_num_kv_splits", "cuda_graph_window_kv_offsets"]
        if self.hybrid:
            names.append("cuda_graph_swa_out_cache_loc")
        return {name: getattr(self.backend, name) for name in names}

    def update(self, lengths, verify, padding=0, dtype=torch.int64, mask=None):
        """What runs before a graph that holds `padding` requests more is replayed."""
        backend, layer = self.backend, self.layer
        mode = ForwardMode.TARGET_VERIFY if verify else ForwardMode.DECODE
        fill = backend.get_cuda_graph_seq_len_fill_value()
        more = {}
        if verify:
            more["spec_info"] = SimpleNamespace(
                num_tokens_per_req=self.drafts, custom_mask=mask
            )
        batch = layer.batch(mode, lengths, **more)
        # A drafted token is written behind those that are cached, a decoded one is one
        # of them.
        first = [length if verify else length - 1 for length in lengths]
        self.written = [
            (i, start + j)
            for i, start in enumerate(first)
            for j in range(self.drafts if verify else 1)
        ]
        rows = layer.requests.req_to_token[batch.req_pool_indices]
        slots = torch.stack([rows[i, j] for i, j in self.written])
        layer.plan(batch.req_pool_indices, batch.seq_lens, slots).bind(
            batch, layer.translator
        )
        # The graph's own buffers, in which row 0 pads.
        count = len(lengths) + padding
        per_request = self.drafts if verify else 1
        tail = torch.full((padding,), fill, device=DEVICE)
        batch.batch_size = count
        batch.seq_lens = torch.cat([batch.seq_lens, tail]).to(dtype)
        zeros = torch.zeros(padding, dtype=torch.int64, device=DEVICE)
        batch.req_pool_indices = torch.cat([batch.req_pool_indices, zeros])
        batch.out_cache_loc = torch.zeros(
            count * per_request, dtype=torch.int64, device=DEVICE
        )
        backend.init_forward_metadata_out_graph(batch)

    def splits(self, lengths):
        backend = self.backend
        heads, kv_heads = backend.num_head, backend.num_kv_head
        most = backend.get_max_kv_splits(len(lengths))
        if backend.enable_deterministic:
            return [-(-length // TILE) for length in lengths]
        if backend.static_kv_splits or not backend.device_core_count:
            return [most] * len(lengths)
        longest, shortest = max(lengths), self.shortest(lengths)
        growth = np.log2(np.float32(longest) / np.float32(64))
        programs = len(lengths) * -(-heads // min(16, heads // kv_heads))
        cores = int(np.float32(CORES) * max(growth, np.float32(1)))
        chunks = [
            math.ceil(longest / min(math.ceil(wanted), most))
            for wanted in (longest / shortest, cores / programs)
        ]
        return [
            max(math.ceil(length / chunk) for chunk in chunks) for length in lengths
        ]

    @staticmethod
    def shortest(lengths):
        """Lengths that differ by less than a fifth are taken as equal."""
        return max(lengths) if max(lengths) < 1.25 * min(lengths) else min(lengths)

    def expected(self, lengths, verify, padding):
        """What each buffer holds afterwards."""
        backend, layer, drafts = self.backend, self.layer, self.drafts
        expected = {name: buffer.tolist() for name, buffer in self.buffers().items()}

        def write(name, values, first=0):
            expected[name][first : first + len(values)] = values

        table = layer.requests.req_to_token.tolist()
        rows = [*layer.req_pool_indices.tolist()[: len(lengths)], *[0] * padding]
        fill = backend.get_cuda_graph_seq_len_fill_value()
        lengths = [*lengths, *[fill] * padding]
        kept = [table[row][:n] for row, n in zip(rows, lengths)]
        write("kv_indptr", list(accumulate(lengths)), 1)
        write("cuda_graph_kv_indices", [slot for slots in kept for slot in slots])
        dynamic = not (
            backend.enable_deterministic
            or backend.static_kv_splits
            or not backend.device_core_count
        )
        if verify:
            seen = [drafts * (drafts + length) for length in lengths]
            write("mask_indptr", list(accumulate(seen)), 1)
            write("qo_indptr", [drafts * i for i in range(1, len(rows) + 1)], 1)
        else:
            write("cuda_graph_num_kv_splits", self.splits(lengths))
            if dynamic:
                uneven = self.shortest(lengths) < max(lengths)
                write("cuda_graph_uneven_batch", [int(uneven)])
        if not self.window:
            return expected
        # Those before a decoded token and its own; a drafted token's own is not cached.
        seen = self.window + (not verify)
        windows = [slots[-seen:] for slots in kept]
        inside = [len(window) for window in windows]
        slots = [slot for window in windows for slot in window]
        if self.hybrid:
            mapping = layer.runner.token_to_kv_pool.full_to_swa_index_mapping.tolist()
            slots = [mapping[slot] for slot in slots]
            written = [mapping[table[rows[i]][j]] for i, j in self.written]
            room = len(expected["cuda_graph_swa_out_cache_loc"])
            written += [0] * (room - len(written))
            write("cuda_graph_swa_out_cache_loc", written)
        write("window_kv_indptr", list(accumulate(inside)), 1)
        write("cuda_graph_window_kv_indices", slots)
        if verify:
            before = [length - n for length, n in zip(lengths, inside)]
            write("cuda_graph_window_kv_offsets", before)
        else:
            write("cuda_graph_window_num_kv_splits", self.splits(inside))
        return expected

    def check(self, lengths, verify, padding=0, **how):
        self.update(lengths, verify, padding, **how)
        found = self.buffers()
        expected = self.expected(lengths, verify, padding)
        for name, buffer in found.items():
            assert buffer.tolist() == expected[name], name
            for beside in (buffer._base[:AROUND], buffer._base[-AROUND:]):
                assert (beside == UNWRITTEN).all(), name


class Launches(TorchDispatchMode):
    """The operations that PyTorch runs, but for views."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.seen.append(str(op))
        return op(*args, **(kwargs or {}))
