"""Arms that are wrong on purpose, to show that they fail."""

import json
import os
import shlex
from pathlib import Path
from typing import Dict, List

from gemma4.errors import UserError
from gemma4.quality import tasks


def wrong_model(model: Path, folder: Path, **text) -> Path:
    """The same weights under a config that was changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        link = folder / file.name
        if file.name != "config.json" and not link.exists():
            os.symlink(file.resolve(), link)
    config = json.loads((model / "config.json").read_text())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wrong_arms(names: List[str], model: Path, folder: Path) -> Dict[str, tuple]:
    """Name -> (the model to serve, flags of the server)."""
    experts = tasks.SHAPE.text["top_k_experts"] - 1
    pools = "--swa-full-tokens-ratio 0.005"
    known = {
        "window": [
            (f"window {tasks.WINDOW + by:d}", {"sliding_window": tasks.WINDOW + by})
            for by in (1, -1)
        ],
        "experts": [(f"{experts} experts", {"top_k_experts": experts})],
        "pools": [("pools too small", {})],
    }
    arms = {}
    for name in names:
        if name not in known:
            raise UserError(f"--wrong {name}: choose of {', '.join(known)}.")
        for title, text in known[name]:
            where = wrong_model(model, folder / title.replace(" ", "-"), **text)
            flags = shlex.split(pools) if name == "pools" else []
            arms[title] = (where, flags)
    return arms
