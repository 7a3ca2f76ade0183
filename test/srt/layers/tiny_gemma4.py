"""A tiny Gemma 4 on the CPU, in a process of its own, for tests of its layers."""

import multiprocessing
import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

from gemma4.checkpoint import write_checkpoint  # noqa: E402


class OnCuda(torch.Tensor):
    """Stands for the GPU that the model's tensors are not on."""

    is_cuda = True


def load_model(folder: str, port: int):
    """The model and its config, in a process that holds no other."""
    from safetensors.torch import load_file

    from sglang.srt.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
    )
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.models import gemma4_causal
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.hf_transformers_utils import get_config

    server_args = ServerArgs(model_path="dummy", device="cpu")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="gloo",
    )
    initialize_model_parallel()
    initialize_moe_config()
    config = get_config(folder, trust_remote_code=False)
    model = gemma4_causal.Gemma4ForCausalLM(config)
    weights = load_file(os.path.join(folder, "model.safetensors"))
    model.load_weights(weights.items())
    return model, config


def ask_model(question: Callable[[str, int], list], folder: Path) -> list:
    """What question(folder, port) answers in a process of its own, whose Triton
    interprets. It is to begin with load_model(folder, port)."""
    write_checkpoint(folder, "tiny", text_only=True, dtype="float32")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        "TRITON_INTERPRET": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(
        1, mp_context=spawn
    ) as pool:
        return pool.submit(question, str(folder), port).result()
