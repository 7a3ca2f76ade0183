"""Hypothesis profiles (HYPOTHESIS_PROFILE=nightly runs ten times the examples), and
what a machine without a GPU needs."""

import os
import signal
from unittest import mock

import torch
from hypothesis import HealthCheck, settings

_COMMON = dict(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("default", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Ctrl-C is tested, also where the tests run in the background and a shell ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small tensors, and servers beside the tests: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    # Triton decides when it is first imported whether its language can be interpreted.
    # Only there: a server that a test starts must not inherit it.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import triton.language  # noqa: F401


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu: what only a GPU has, or is fast enough for"
    )


def pytest_collection_modifyitems(config, items):
    """Leave out, where there is no GPU, what is there for a GPU alone."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
