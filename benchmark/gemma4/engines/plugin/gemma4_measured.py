"""What every measured server does beside serving, the same in each arm.

SGLang and vLLM load it themselves, as a plugin, in each of their processes: this folder
on PYTHONPATH is all that it takes, and no file of a measured tree is changed.

- It logs which file and version of the engine the process imported.
- `--load-format dummy` draws matrices from N(0, 0.02), each from a seed of its own, and
  sets norms and scales to one, as the checkpoint factory does. Both engines' own dummy weights
  lie within 1e-3 of zero and repeat from layer to layer: the hidden state collapses, all
  tokens choose the same experts, and the experts' time means nothing.
- With SGLANG_SIMULATE_ACC_LEN the tokens that are accepted become random ids; SGLang
  writes token 100 for all of them, which again sends every row to the same experts.
"""

import sys
import zlib

import torch

# The reader of the log (servers.py) looks for these.
CODE = "Measured code:"
WEIGHTS = "Random weights:"
STD = 0.02


def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Fills every floating-point parameter in place; buffers stay as constructed, but
    for a draft's order of the vocabulary."""
    count = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            data = parameter.data
            if data.is_meta or not data.is_floating_point():
                continue
            count += 1
            if data.dim() < 2:
                data.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            generator = torch.Generator(data.device)
            generator.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            if torch.finfo(data.dtype).bits < 16:
                wide = torch.empty_like(data, dtype=torch.float16)
                data.copy_(wide.normal_(0.0, STD, generator=generator))
            elif data.dim() > 2:
                # Stacked experts one by one: normal_ may need as much memory again.
                for part in data:
                    part.normal_(0.0, STD, generator=generator)
            else:
                data.normal_(0.0, STD, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("token_ordering"):  # else every token is token 0
            torch.arange(len(buffer), out=buffer)
    for module in model.modules():
        if hasattr(module, "fuse_scale"):  # Gemma4Router keeps a product of its scale
            module.fuse_scale()
    kind = type(model).__name__
    _say(f"{WEIGHTS} {count} parameters of {kind}, N(0, {STD}) and ones elsewhere")


def _say(message: str) -> None:
    # Plugins are loaded before the engines set their loggers up.
    print(message, file=sys.stderr, flush=True)


# SGLang ----------------------------------------------------------------------


def sglang_plugin() -> None:
    import sglang
    from sglang.srt.environ import envs
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _say(f"{CODE} {sglang.__file__} {sglang.__version__}")
    HookRegistry.register(
        "sglang.srt.model_loader.weight_utils.initialize_dummy_weights",
        lambda model, *args, **kwargs: draw_weights(model),
        HookType.REPLACE,
    )
    if envs.SGLANG_SIMULATE_ACC_LEN.get() <= 0:
        return
    HookRegistry.register(
        "sglang.srt.speculative.spec_utils.generate_simulated_accept_index",
        _accept_random_ids,
    )


def _accept_random_ids(index, accept_index, predict, *args, **kwargs) -> None:
    # Ordinary tokens of the vocabulary: above the controls, below the images'.
    predict.random_(1000, 250000)


# vLLM ------------------------------------------------------------------------


def vllm_plugin() -> None:
    import vllm
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    _say(f"{CODE} {vllm.__file__} {vllm.__version__}")

    def initialize(model, *args, **kwargs):
        # The loader calls it for every module; the parameters are those of the root.
        draw_weights(model)

    def load_weights(self, model, model_config):
        draw_weights(model)

    weight_utils.initialize_dummy_weights = initialize
    dummy_loader.DummyModelLoader.load_weights = load_weights
