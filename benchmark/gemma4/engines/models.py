"""The checkpoints that are served."""

import argparse
from pathlib import Path

from gemma4.engines.host import CACHE
from gemma4.errors import UserError


def check_model(folder: Path, option: str = "--model") -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{option} {folder} is no checkpoint: it has no config.json.")


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def prepare_model(args: argparse.Namespace, mtp: bool) -> None:
    """Makes folders of --model and --draft, or of --shape, which is written into the
    cache; `mtp` says whether a draft is needed.

    Raises:
        UserError: One is no checkpoint, or cannot be written.
    """
    if args.model:
        check_model(args.model)
        if args.draft:
            check_model(args.draft, "--draft")
        elif mtp:
            raise UserError("With --model, MTP needs the draft's folder: --draft.")
        args.model, args.draft = (p and p.resolve() for p in (args.model, args.draft))
        return
    from gemma4.checkpoint import CheckpointError, write_checkpoint

    tiny = args.shape == "tiny"
    args.model = CACHE / f"gemma-4-{args.shape}{'' if tiny else '-no-weights'}"
    if mtp:
        args.draft = args.model.with_name(f"{args.model.name}-draft")
    try:
        for folder in (args.model, *([args.draft] if mtp else [])):
            if not (folder / "config.json").exists():
                assistant = folder != args.model
                write_checkpoint(folder, args.shape, assistant=assistant, weights=tiny)
    except CheckpointError as e:
        raise UserError(str(e)) from None
