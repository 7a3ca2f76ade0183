"""The folder as a whole: it appears under its name when it is whole, or not at all."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from gemma4.checkpoint.configs import draft_config, target_config
from gemma4.checkpoint.files import write_files, write_json
from gemma4.checkpoint.shapes import SHAPES
from gemma4.checkpoint.weights import (
    byte_size,
    meta_model,
    on_meta,
    save_weights,
    stored_as,
)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
RECIPE_FILE = "checkpoint.json"
# Raised whenever the same arguments begin to give another folder.
RECIPE_VERSION = 4
CONFIG_FORMATS = ("flat", "per-layer")
MAX_SHARD_BYTES = 2 * 10**9
# Tokenizer, processor and configs of a large shape come to about 25 MB.
OTHER_FILES_BYTES = 40 * 10**6


class CheckpointError(Exception):
    """A request that cannot be met; the message is one sentence for the user."""


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _read_recipe(folder: Path) -> Optional[dict]:
    try:
        return json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _claim(partial: Path) -> Iterator[None]:
    """Make `partial` an empty folder that is this process's alone, and remove it after.

    What a killed process left behind is removed; a folder that a living one writes
    to is not touched.
    """
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have just finished and renamed the folder.
            if not os.path.samestat(os.fstat(handle), os.stat(partial)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise CheckpointError(
                f"{partial} is being written by another process; wait for it to end."
            ) from None
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield
    finally:
        try:
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                shutil.rmtree(partial)
        except FileNotFoundError:
            pass
        os.close(handle)


def write_checkpoint(
    out,
    shape: str = "tiny",
    *,
    assistant: bool = False,
    text_only: bool = False,
    dtype: str = "bfloat16",
    seed: int = 0,
    weights: bool = True,
    fp8: Optional[str] = None,
    config_format: str = "flat",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> bool:
    """Write a checkpoint folder with random weights.

    Args:
        out: the folder to make. It appears under this name only when it is whole.
        shape: a name in `SHAPES`.
        assistant: write the MTP draft model of the shape instead of the shape.
        text_only: write a text model's folder, without vision tower and processor.
        dtype: a name in `DTYPES`.
        seed: what all weights are drawn from.
        weights: False leaves the weights out, for `--load-format dummy`.
        fp8: a name in `fp8_forms.FORMS`, for weights in FP8; None for `dtype`.
        config_format: "flat" states `global_head_dim` and `num_global_key_value_heads`,
            as the released folders and transformers 5.6 do; "per-layer" states
            `per_layer_config`, as transformers 5.19 does, which reads both.
        overwrite: replace a folder that this function wrote with other arguments.
        max_shard_bytes: size of a safetensors file, unless one weight is larger.

    Returns:
        True if the folder was written, False if it was there already, made with the
        same arguments.

    Raises:
        CheckpointError: the arguments exclude each other, `out` holds something else,
            or the disk is too small. Nothing was changed.
    """
    forms = None
    if fp8 is not None:
        # It travels with the tests of patches about FP8 alone.
        from gemma4 import fp8_forms as forms
    for kind, name, known in (
        ("shape", shape, SHAPES),
        ("dtype", dtype, DTYPES),
        ("config format", config_format, CONFIG_FORMATS),
        ("form of FP8", fp8, (None,) if forms is None else forms.FORMS),
    ):
        if name not in known:
            names = ", ".join(filter(None, known))
            raise CheckpointError(f"Unknown {kind} {name!r}; choose one of {names}.")
    if assistant and text_only:
        raise CheckpointError(
            "An assistant has no vision tower to leave out; drop one of --assistant "
            "and --text-only."
        )
    out = Path(out).absolute()
    recipe = {
        "version": RECIPE_VERSION,
        "shape": shape,
        "assistant": assistant,
        "text_only": text_only,
        "dtype": dtype,
        "seed": seed,
        "weights": weights,
        "config_format": config_format,
        "max_shard_bytes": max_shard_bytes,
    }
    if fp8 is not None:
        recipe["fp8"] = fp8
    if _is_there(out, recipe, overwrite):
        return False

    spec = SHAPES[shape]
    config = (
        draft_config(spec, dtype)
        if assistant
        else target_config(spec, text_only, dtype)
    )
    form = None if fp8 is None else forms.form_of(spec, fp8, assistant)
    tensors = {
        k: v.to(DTYPES[dtype]) if v.is_floating_point() else v
        for k, v in on_meta(config).items()
    }
    if form is not None:
        linears = [
            name
            for name, module in meta_model(config).named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        config.quantization_config = form.config(linears)
    if not weights:
        tensors = {}
    needed = OTHER_FILES_BYTES + sum(
        byte_size(stored_as(form, name, weight)) for name, weight in tensors.items()
    )

    parent = out.parent
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:
            raise CheckpointError(
                f"{e.filename} is not a folder; choose another name for {out}."
            ) from None
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise CheckpointError(
                f"{out} needs {_size(needed)} and {parent} has {_size(free)} free; "
                "make room or choose another folder."
            )
        partial = parent / f".{out.name}.partial"
        with _claim(partial):
            write_files(partial, spec, config, config_format)
            if tensors:
                save_weights(partial, spec, seed, tensors, form, max_shard_bytes)
            write_json(partial / RECIPE_FILE, recipe)
            _publish(partial, out, recipe, overwrite)
    except OSError as e:
        raise CheckpointError(
            f"Cannot write {e.filename or out}: {e.strerror or e}."
        ) from e
    return True


def _is_there(out: Path, recipe: dict, overwrite: bool) -> bool:
    """Whether `out` is what would be written; raises if it is in the way."""
    if not os.path.lexists(out):
        return False
    if not out.is_dir():
        raise CheckpointError(f"{out} is not a folder; choose another name.")
    found = _read_recipe(out)
    if found == recipe:
        return not overwrite
    if found is None:
        if not any(out.iterdir()):
            return False
        raise CheckpointError(
            f"{out} holds files that this program did not write; choose another "
            "folder or remove it yourself."
        )
    if not overwrite:
        changed = ", ".join(
            f"{key} {found.get(key)!r} instead of {recipe.get(key)!r}"
            for key in {**recipe, **found}
            if found.get(key) != recipe.get(key)
        )
        raise CheckpointError(
            f"{out} holds another checkpoint ({changed}); pass --overwrite to replace "
            "it or choose another folder."
        )
    return False


def _publish(partial: Path, out: Path, recipe: dict, overwrite: bool) -> None:
    """Give the whole folder its name."""
    # Something may have appeared there while the weights were written.
    if _is_there(out, recipe, overwrite):
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if _read_recipe(out) is not None:
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
