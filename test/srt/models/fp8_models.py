"""What the tests of FP8 weights share: models in this process, with what a checkpoint or
the command line says of their quantization."""

import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from picture_cases import be_the_only_rank
from safetensors.torch import load_file, save_file

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_loader import get_model, get_model_architecture
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.model_loader.weight_utils import get_quant_config


def can_build_models(case) -> None:
    """In setUpClass of a class whose tests build models, in `case.folder`."""
    folder = tempfile.TemporaryDirectory(prefix="gemma4-fp8-")
    case.addClassCleanup(folder.cleanup)
    case.folder = Path(folder.name)
    be_the_only_rank(case)
    initialize_moe_config()


def load(folder, dtype="bfloat16", quantization=None):
    """The model as a server on the CPU loads it."""
    return get_model(
        model_config=ModelConfig(str(folder), dtype=dtype, quantization=quantization),
        load_config=LoadConfig(),
        device_config=DeviceConfig("cpu"),
    )


def build_as_on_hopper(folder, quantization=None):
    """The model without its weights, and with the methods that a Hopper GPU takes."""
    config = ModelConfig(str(folder), dtype="bfloat16", quantization=quantization)
    model_class, _ = get_model_architecture(config)
    capability = mock.patch("torch.cuda.get_device_capability", return_value=(9, 0))
    with capability, set_default_torch_dtype(torch.bfloat16):
        quant_config = get_quant_config(
            config, LoadConfig(), model_class.packed_modules_mapping
        )
        return model_class(config.hf_config, quant_config)


def write_without_fp8(folder, out, change=lambda name, scale: scale) -> None:
    """Write the checkpoint of an FP8 folder in float32, its weights multiplied by their
    scales here, block by block; `change` may replace a scale."""
    folder, out = Path(folder), Path(out)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    block = quantization.get("weight_block_size")
    for group in quantization.get("config_groups", {}).values():
        block = group["weights"].get("block_structure") or block
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))

    stored, plain, experts = {}, {}, {}
    for file in folder.glob("*.safetensors"):
        stored.update(load_file(file))
    for name, weight in stored.items():
        if name.endswith((".weight_scale", ".input_scale", "_scale_inv")):
            continue
        if weight.dtype == torch.float8_e4m3fn:
            scale_name = next(
                f"{name}{end}"
                for end in ("_scale", "_scale_inv")
                if f"{name}{end}" in stored
            )
            scale = change(scale_name, stored[scale_name])
            weight = _times(weight.float(), scale.float(), block)
        match = re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$", name)
        if match:
            layer = experts.setdefault(match[1], {})
            layer.setdefault(match[3], {})[int(match[2])] = weight
        else:
            plain[name] = weight.float()
    for layer, parts in experts.items():
        gate, up, down = (
            torch.stack([parts[part][i] for i in range(len(parts[part]))])
            for part in ("gate", "up", "down")
        )
        plain[f"{layer}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        plain[f"{layer}.down_proj"] = down
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})


def _times(weight, scale, block):
    rows, columns = weight.shape[-2:]
    if scale.numel() == 1:
        return weight * scale.item()
    if tuple(scale.shape) == (rows, 1):
        return torch.stack([row * s for row, s in zip(weight, scale[:, 0])])
    down, across = block
    for i, j in itertools.product(*map(range, scale.shape[-2:])):
        part = weight[..., i * down : (i + 1) * down, j * across : (j + 1) * across]
        part *= scale[..., i, j, None, None]
    return weight
