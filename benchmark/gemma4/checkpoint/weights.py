"""The weights of a shape: their names, their values, and the files they are saved in.

Each weight is drawn from a generator seeded by the seed and the weight's name, so a
weight's values depend neither on the order of drawing nor on the other weights.
"""

import contextlib
import hashlib
import itertools
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gemma4.checkpoint.files import write_json
from gemma4.checkpoint.tiny import Shape
from gemma4.checkpoint.tokens import FIRST_TEXT_TOKEN
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

CLIP_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def meta_model(config) -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])(config)


def on_meta(config) -> dict[str, torch.Tensor]:
    """Names and shapes that save_pretrained of the config's model class would write."""
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_model(config)
    tied = model.all_tied_weights_keys
    weights = {k: v for k, v in model.state_dict().items() if k not in tied}
    # Modules of Gemma 4 Unified are named otherwise than its checkpoints.
    return revert_weight_conversion(model, weights)


def _generator(seed: int, name: str, device: str) -> torch.Generator:
    # A text-only folder gets the text weights of the full one.
    name = name.replace("language_model.", "")
    # Projections of the same input clip it alike.
    if name.endswith(CLIP_BOUNDS[:2]):
        name = re.sub(r"\b(q|k|v|gate|up)_proj\b", "proj", name)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def _fill_released(name: str, weight: torch.Tensor, generator: torch.Generator):
    if weight.dim() > 1:
        weight.normal_(0.0, 0.02, generator=generator)
    elif name.endswith(CLIP_BOUNDS):
        weight.fill_(-math.inf if name.endswith("_min") else math.inf)
    else:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)


def _fill_tiny(name: str, weight: torch.Tensor, generator: torch.Generator):
    """Spread a tiny model's weights so that its logits can be compared.

    A wrong window, a dropped scale or a swapped layer must move the logits far more
    than float32 rounding does, and bfloat16 rounding must not move them far. Norms and
    scales therefore vary about 1, each its own. Queries are short, so that attention
    is spread over the window. Layers add little to the residual stream, or rounding
    would grow from layer to layer. Routers are sharp, so that the last of the chosen
    experts weighs little: rounding decides near ties among them either way.
    """
    if name.endswith("layer_scalar"):
        weight.uniform_(0.9, 1.0, generator=generator)
    elif name.endswith("std_bias"):
        weight.zero_()
    elif name.endswith(CLIP_BOUNDS):
        weight.uniform_(2.0, 4.0, generator=generator)
        if name.endswith("_min"):
            weight.neg_()
    elif name.endswith(".bias"):
        weight.normal_(0.0, 0.1, generator=generator)
    elif weight.dim() == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
        if name.endswith("q_norm.weight"):
            weight.mul_(0.7 * weight.numel() ** -0.5)
        elif name.endswith(
            (
                "post_attention_layernorm.weight",
                "post_feedforward_layernorm.weight",
                "post_per_layer_input_norm.weight",
            )
        ):
            weight.mul_(0.15)
        elif name.endswith("post_feedforward_layernorm_2.weight"):
            weight.mul_(0.3)
        elif name in ("model.norm.weight", "model.language_model.norm.weight"):
            # The output head is tied to the embedding: with one sign for all, the
            # likeliest next token would always be the last one.
            signs = torch.randint(0, 2, weight.shape, generator=generator)
            weight.mul_(2 * signs - 1)
    elif name.endswith("router.proj.weight"):
        weight.normal_(0.0, 5.0, generator=generator)
    elif name.endswith("embed_tokens.weight"):
        weight.normal_(0.0, 0.15 * weight.shape[-1] ** -0.5, generator=generator)
    elif name.endswith("embed_tokens_per_layer.weight"):
        # A row holds the inputs of all layers, and each is scaled by its own size.
        weight.normal_(0.0, 0.25, generator=generator)
    else:
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)


def draw(
    shape: Shape,
    seed: int,
    name: str,
    size: torch.Size,
    dtype: torch.dtype,
    device: str,
) -> torch.Tensor:
    """Draw one weight; returns it on `device` in `dtype`."""
    generator = _generator(seed, name, device)
    if dtype == torch.long:
        # The draft's order of the vocabulary, the only weight of integers.
        return torch.randperm(size[0], generator=generator, device=device)
    if shape.tiny:
        weight = torch.empty(size, device=device)
        _fill_tiny(name, weight, generator)
    else:
        weight = torch.empty(size, dtype=dtype, device=device)
        _fill_released(name, weight, generator)
    if name.endswith("embed_tokens.weight"):
        # Random text should neither end at once nor consist of half characters.
        weight[:FIRST_TEXT_TOKEN] *= 0.1
        for index in shape.multimodal_ids.values():
            weight[index] *= 0.1
    return weight.to(dtype)


def stored_as(form, name: str, weight: torch.Tensor):
    return {name: weight} if form is None else form.stored(name, weight)


def byte_size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in tensors.values())


def save_weights(
    folder: Path,
    shape: Shape,
    seed: int,
    weights: dict[str, torch.Tensor],
    form,
    max_shard_bytes: int,
) -> None:
    """Draw and save shard by shard; at most one shard a thread is held in memory."""
    stored, drawn_as = {}, {}
    for name, weight in weights.items():
        parts = stored_as(form, name, weight)
        stored.update(parts)
        drawn_as.update(dict.fromkeys(parts, name))
    plan = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_bytes)
    device = "cuda" if torch.cuda.is_available() and not shape.tiny else "cpu"
    threads = 6 if device == "cuda" else 2
    total = byte_size(stored)

    def save(tensors: dict[str, torch.Tensor], path: Path) -> int:
        save_file(tensors, path, metadata={"format": "pt"})
        # safetensors makes its files private.
        shutil.copymode(folder / "config.json", path)
        return byte_size(tensors)

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=None)
        )
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        running = []
        for file, names in plan.filename_to_tensors.items():
            if len(running) == threads:
                progress.update(running.pop(0).result())
            tensors = {}
            for name, parts in itertools.groupby(names, drawn_as.get):
                size, dtype = weights[name].shape, weights[name].dtype
                weight = draw(shape, seed, name, size, dtype, device)
                whole = stored_as(form, name, weight)
                tensors.update({part: whole[part].cpu() for part in parts})
            running.append(pool.submit(save, tensors, folder / file))
        for future in running:
            progress.update(future.result())

    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
