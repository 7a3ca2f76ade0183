"""What the tests of Gemma 4's pictures share: sizes, pictures, and a process in which
models can be built."""

import os
import socket

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import numpy as np

from sglang.srt.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
)
from sglang.test.test_utils import publish_build_topology

# (height, width)
PICTURES = {
    "square": (96, 96),
    "tall": (400, 60),
    "wide": (60, 400),
    "small": (17, 23),
    "large": (700, 900),
}


def random_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Random colors, [height, width, 3] of uint8."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def be_the_only_rank(case) -> None:
    """Lets the tests of a class build models on the CPU, in its setUpClass."""
    publish_build_topology(device="cpu")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="gloo",
    )
    case.addClassCleanup(destroy_distributed_environment)
    initialize_model_parallel()
    case.addClassCleanup(destroy_model_parallel)
