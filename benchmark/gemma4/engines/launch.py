"""Serves one model on this machine as a user would; Ctrl-C ends it.

    python -m gemma4 launch
    python -m gemma4 launch --port 30000 --model google/gemma-4-26B-A4B-it

Without --model it is a tiny one with random weights, written by the first call.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Tuple

from gemma4.engines.host import (
    CACHE,
    HOST,
    TINY_POOL_TOKENS,
    check_port,
    has_gpu,
    inherited_path,
)
from gemma4.errors import UserError


def arguments(parser) -> None:
    parser.add_port()
    parser.add("--model", "A checkpoint's folder, or its name on Hugging Face.", "")


def run(args) -> None:
    """Becomes SGLang's server."""
    command, env = prepare(args.port, args.model)
    print(f"Serving on http://{HOST}:{args.port}; Ctrl-C ends it.", flush=True)
    os.execve(command[0], command, env)


def prepare(port: int, model: str) -> Tuple[List[str], Dict[str, str]]:
    """The command of a server and its environment.

    Raises:
        UserError: The port is in use, or the model's folder is not there.
    """
    check_port(port)
    folder = Path(model).expanduser() if model else tiny_model()
    if folder.is_dir():
        path = str(folder.resolve())
    elif model.startswith((".", "/", "~")):
        raise UserError(f"The model {model} is no folder: give a checkpoint's.")
    else:
        path = model
    command = [sys.executable, "-m", "sglang.launch_server", "--host", HOST]
    command += ["--port", str(port), "--model-path", path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(inherited_path())}
    if not model:
        command += ["--max-total-tokens", str(TINY_POOL_TOKENS)]
    if not has_gpu():
        command += ["--device", "cpu"]
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    return command, env


def tiny_model() -> Path:
    """The folder of the tiny random model of this environment's series. One whose
    patches hold their tests has a factory of its own, for its transformers."""
    from fork.base import installed
    from fork.complete import home

    project = installed()
    folder = CACHE / f"gemma-4-tiny-{project.series}"
    if not folder.is_dir():
        program = ["-m", "gemma4", "checkpoint"]
        if project.complete():
            program = [str(home(project) / "benchmark" / "gemma4" / "checkpoint.py")]
        command = [sys.executable, *program, str(folder), "--shape", "tiny"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise UserError("The tiny checkpoint was not written; it says why above.")
    return folder
