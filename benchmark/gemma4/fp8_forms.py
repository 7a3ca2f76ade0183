"""The forms in which FP8 weights of Gemma 4 are published: names, scales, config.

| form | made by | weights | activations |
|---|---|---|---|
| fp8-dynamic | LLM Compressor, FP8_DYNAMIC | a scale a row | a scale a token, when it runs |
| fp8-block | LLM Compressor, FP8_BLOCK | a scale for 128 x 128 | a scale for 128 of a token |
| fp8-static | LLM Compressor, FP8 | one scale | one scale, in the checkpoint |
| fp8-fine-grained | transformers, FineGrainedFP8 | a scale for 128 x 128 | as fp8-block |

LLM Compressor writes each expert's projections under names of their own, transformers
all experts of a layer in one tensor. In all of them the embeddings, norms, routers and
the towers of pictures and sound, with their projections, stay as they were.

Experts of 704 columns are no whole number of blocks: in the published fp8-block of
26B-A4B the attention has blocks, and the MLP and the experts have fp8-static's scales.
"""

import re

import torch

FORMS = ("fp8-dynamic", "fp8-block", "fp8-static", "fp8-fine-grained")
# The side of a block of weights that share a scale.
BLOCK, TINY_BLOCK = 128, 32
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# Inputs of a projection lie within 16, which no model here exceeds by much.
INPUT_SCALE = 16 / FP8_MAX

NOT_QUANTIZED = re.compile(
    r"(vision|audio)_tower|embed_(vision|audio|tokens)|vision_embedder"
    r"|router|lm_head|masked_embedding"
)
EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MIXED_MLP = re.compile(r"\.(mlp|experts)\.")


def is_quantized(name: str, weight: torch.Tensor) -> bool:
    if NOT_QUANTIZED.search(name):
        return False
    return bool(EXPERTS.match(name)) or (name.endswith(".weight") and weight.dim() == 2)


def form_of(shape, name: str, assistant: bool = False) -> "Form":
    """The form of FP8 of this name for a shape, or for its draft."""
    block = TINY_BLOCK if shape.tiny else BLOCK
    return Form(name, block, "num_experts" in shape.text and not assistant)


class Form:
    """One form for one model. `block` is the side of a block, `mixed` whether its MLP
    and experts cannot have blocks."""

    def __init__(self, name: str, block: int, mixed: bool):
        self.name = name
        self.block = block
        self.mixed = mixed

    def stored(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the checkpoint holds for a weight, under which names; on meta, too."""
        if not is_quantized(name, weight):
            return {name: weight}
        if self.name == "fp8-fine-grained":
            quantized, scale = self._blocks(weight)
            return {name: quantized, f"{name}_scale_inv": scale}
        stored = {}
        for module, part in self._modules(name, weight):
            in_blocks = self.name == "fp8-block"
            if in_blocks and not (self.mixed and MIXED_MLP.search(module + ".")):
                quantized, scale = self._blocks(part)
                scale = scale.to(weight.dtype)
            elif self.name == "fp8-dynamic":
                amax = part.abs().amax(dim=-1, keepdim=True).float()
                quantized, scale = _quantize(part, amax, weight.dtype)
            else:
                amax = part.abs().amax().float().reshape(1)
                quantized, scale = _quantize(part, amax, weight.dtype)
                stored[f"{module}.input_scale"] = torch.full_like(scale, INPUT_SCALE)
            stored[f"{module}.weight"] = quantized
            stored[f"{module}.weight_scale"] = scale
        return stored

    def _modules(self, name: str, weight: torch.Tensor):
        """The modules that LLM Compressor makes of a weight, and their weights."""
        match = EXPERTS.match(name)
        if match is None:
            yield name.removesuffix(".weight"), weight
            return
        for i, expert in enumerate(weight):
            if match[2] == "down_proj":
                yield f"{match[1]}.{i}.down_proj", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{match[1]}.{i}.gate_proj", gate
                yield f"{match[1]}.{i}.up_proj", up

    def _blocks(self, weight: torch.Tensor):
        """Blocks at the ends may be smaller."""
        *outer, rows, columns = weight.shape
        down, across = (-(-size // self.block) for size in (rows, columns))
        padded = weight.new_zeros(*outer, down * self.block, across * self.block)
        padded[..., :rows, :columns] = weight
        blocks = padded.view(*outer, down, self.block, across, self.block)
        amax = blocks.abs().amax(dim=(-3, -1), keepdim=True).float()
        quantized, scale = _quantize(blocks, amax, torch.float32)
        quantized = quantized.view(padded.shape)[..., :rows, :columns].contiguous()
        return quantized, scale.view(*outer, down, across)

    def config(self, linears: list[str]) -> dict:
        """The `quantization_config` of config.json for a model of these linear layers."""
        ignored = [name for name in linears if NOT_QUANTIZED.search(name)]
        if self.name == "fp8-fine-grained":
            return {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [self.block, self.block],
                "modules_to_not_convert": ignored,
            }
        groups = {
            "fp8-dynamic": [(["Linear"], "channel")],
            "fp8-block": [(["Linear"], "block")],
            "fp8-static": [(["Linear"], "tensor")],
        }[self.name]
        if self.name == "fp8-block" and self.mixed:
            attention = [f"re:.*self_attn.{name}" for name in ATTENTION]
            mlp = [
                f"re:.*{name}.{part}_proj"
                for name in ("mlp", r"experts.\d+")
                for part in ("gate", "up", "down")
            ]
            groups = [(attention, "block"), (mlp, "tensor")]
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignored,
            "config_groups": {
                f"group_{i}": self._group(targets, strategy)
                for i, (targets, strategy) in enumerate(groups)
            },
        }

    def _group(self, targets: list[str], strategy: str) -> dict:
        common = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**common, "strategy": strategy, "dynamic": False}
        if strategy == "block":
            weights["block_structure"] = [self.block, self.block]
            inputs = {"strategy": "group", "group_size": self.block, "dynamic": True}
        elif strategy == "channel":
            inputs = {"strategy": "token", "dynamic": True}
        else:
            inputs = {"strategy": "tensor", "dynamic": False}
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": {**common, **inputs},
            "output_activations": None,
            "format": "float-quantized",
        }


def _quantize(weight: torch.Tensor, amax: torch.Tensor, scale_dtype: torch.dtype):
    """Returns the weight in FP8, and the scale that gives it back."""
    if weight.is_meta:  # where torch clamps slowly
        return weight.to(FP8), amax.to(scale_dtype)
    scale = (amax / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = scale.to(scale_dtype)
    quantized = (weight.float() / scale.float()).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return quantized, scale
