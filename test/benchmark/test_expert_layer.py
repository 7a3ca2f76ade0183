"""What a layer's experts are compared with before they are timed, and where they are not."""

import pytest
import torch
from gemma4.errors import UserError
from gemma4.kernels import expert_layer


@pytest.fixture
def layer():
    torch.manual_seed(0)
    states, w1, w2 = torch.randn(7, 6), torch.randn(4, 8, 6), torch.randn(4, 6, 4)
    weights, ids = torch.rand(7, 4).topk(2)
    return states, w1, w2, weights, ids.int()


def test_the_oracle_is_each_tokens_sum(layer):
    exact = expert_layer.oracle(*layer)
    for x, weights, ids, got in zip(layer[0], *layer[3:], exact):
        want = 0
        for weight, e in zip(weights, ids):
            y = layer[1][e] @ x
            h = torch.nn.functional.gelu(y[:4], approximate="tanh") * y[4:]
            want += weight * (layer[2][e] @ h)
        assert torch.allclose(got.float(), want, rtol=1e-4, atol=1e-4)


def test_what_is_not_taken_is_not_timed(layer):
    states, w1, w2, _, ids = layer
    with pytest.raises(UserError, match="are not taken here: they need a Hopper GPU"):
        expert_layer.check(states, w1, w2, ids)
