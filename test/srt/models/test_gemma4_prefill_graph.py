"""Prefill in CUDA graphs for Gemma 4's multimodal classes: which members, up to how many
tokens, and that the text model runs as a graph is captured, with tokens and embeddings.

A GPU's answers from these graphs, pictures among them, are compared with transformers'
by test_gemma4_parity.py and `python -m gemma4 pictures`.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from sglang.srt.arg_groups.overrides import model_config_of, resolution_result
from sglang.srt.environ import envs
from sglang.srt.model_executor import cuda_graph_config
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import (
    _build_layer_model_forward_kwargs,
    _resolve_transformer_layer_model,
)
from sglang.srt.server_args import prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci

BENCHMARKS = Path(__file__).parents[3] / "benchmark"
sys.path.insert(0, str(BENCHMARKS))
from gemma4.checkpoint import write_checkpoint  # noqa: E402
from gemma4.engines import one_rank  # noqa: E402

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")


@pytest.fixture(scope="module")
def folders():
    with tempfile.TemporaryDirectory() as place:

        def folder(shape, **kwargs):
            name = "-".join([shape, *kwargs])
            write_checkpoint(Path(place, name), shape, weights=False, **kwargs)
            return str(Path(place, name))

        yield folder


def prefill(model, *flags):
    """The graphs of a prefill that a GPU's server would have."""
    # What a host without a GPU lacks.
    with mock.patch.object(
        cuda_graph_config, "default_prefill_backend", lambda: Backend.BREAKABLE
    ):
        args = prepare_server_args(["--model-path", model, "--device", "cpu", *flags])
        args.resolve_once()
    return resolution_result(args, "cuda_graph_config").prefill


@pytest.mark.parametrize("shape", ["tiny", "tiny-31b", "tiny-12b"])
def test_a_prefill_is_captured(folders, shape):
    graphs = prefill(folders(shape), "--chunked-prefill-size", "8192")
    assert graphs.backend == Backend.BREAKABLE
    assert graphs.max_bs == max(graphs.bs) == 2048


@pytest.mark.parametrize(
    "flags, most",
    [
        (["--chunked-prefill-size", "1024"], 1024),
        (["--cuda-graph-max-bs-prefill", "4096"], 4096),
        (["--cuda-graph-config", '{"prefill": {"max_bs": 3072}}'], 3072),
    ],
    ids=["short chunks", "flag", "config"],
)
def test_a_given_size_is_kept(folders, flags, most):
    graphs = prefill(folders("tiny"), *flags)
    assert graphs.backend == Backend.BREAKABLE
    assert graphs.max_bs == max(graphs.bs) == most


@pytest.mark.parametrize("shape", ["tiny-e2b", "tiny-e4b"])
def test_inputs_of_each_layer_are_not_captured(folders, shape):
    """The model computes them of tokens before the layers run, pictures' left out."""
    assert prefill(folders(shape)).backend == Backend.DISABLED


def test_text_only_is_as_it_was(folders):
    graphs = prefill(folders("tiny", text_only=True), "--chunked-prefill-size", "8192")
    assert graphs.backend == Backend.BREAKABLE
    assert graphs.max_bs == 8192


def test_positions_have_to_be_advanced_in_place(folders):
    with envs.SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION.override(True):
        assert prefill(folders("tiny")).backend == Backend.DISABLED


def test_embeddings_win_over_tokens(folders):
    """A graph is captured with both, and replayed with the embeddings of pictures."""
    model = folders("tiny")
    server_args = prepare_server_args(["--model-path", model, "--device", "cpu"])
    one_rank.start(server_args)
    config = model_config_of(server_args).hf_config
    config.text_config.num_hidden_layers = 1
    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration

    torch.manual_seed(0)
    layers = _resolve_transformer_layer_model(Gemma4ForConditionalGeneration(config))
    for parameter in layers.parameters():
        parameter.data.normal_()
    layers.end_layer = 0  # what is before and behind them
    ids = torch.tensor([5, 7])
    embeds = torch.randn(2, config.text_config.hidden_size)
    batch = SimpleNamespace(input_embeds=embeds, input_ids=ids)
    kwargs = _build_layer_model_forward_kwargs(layers, batch, None)
    positions = torch.arange(2)
    with torch.inference_mode():
        both = layers.forward(ids, positions, batch, **kwargs)
        embedded = layers.forward(None, positions, batch, embeds)
        named = layers.forward(ids, positions, batch)
        looked_up = layers.forward(None, positions, batch, layers.embed_tokens(ids))
    assert torch.equal(both, embedded)
    assert torch.equal(named, looked_up)
    assert not torch.allclose(both, named)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
