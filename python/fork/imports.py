"""Imports modules in children of one process that has paid for PyTorch already.

Run as a program in the folder that has the package: reads a JSON list of modules a
line, and answers each with a JSON object of those that failed and why.
"""

import importlib
import json
import os
import sys

SHARED = ("torch", "triton", "transformers")


def main() -> None:
    sys.path[0] = os.getcwd()  # not the folder of this file
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print is not an answer
    for name in SHARED:
        try:
            importlib.import_module(name)
        except Exception:
            pass  # the modules that need it will say so
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    for line in sys.stdin:
        print(json.dumps(import_all(json.loads(line))), file=answers, flush=True)


def import_all(modules: list) -> dict:
    """Returns the error of each module that does not import."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        with os.fdopen(tell, "w") as results:
            for module in modules:
                print(json.dumps([module, error_of(module)]), file=results, flush=True)
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as results:
        errors = dict(json.loads(result) for result in results)
    _, status = os.waitpid(child, 0)
    for module in modules:
        errors.setdefault(module, f"the interpreter died, wait status {status}")
    return {module: error for module, error in errors.items() if error}


def error_of(module: str) -> str:
    try:
        importlib.import_module(module)
    except BaseException as error:  # SystemExit too
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
