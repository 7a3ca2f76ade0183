"""Imports modules in children of one process that has paid for PyTorch already.

Run as a program in the folder that has their package: reads a JSON list of modules a
line, and answers each with a JSON object of those that failed and why.
"""

import importlib
import json
import os
import sys

SHARED = ["torch", "triton", "transformers"]


def main() -> None:
    sys.path[0] = os.getcwd()  # not the folder of this file
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print is no answer
    share(SHARED)
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    shared = False
    for line in sys.stdin:
        modules = json.loads(line)
        errors, loaded = import_all(modules)
        print(json.dumps(errors), file=answers, flush=True)
        if not shared:
            package = modules[0].split(".")[0]
            share([name for name in loaded if name.split(".")[0] != package], package)
            shared = True


def share(modules: list, without: str = "") -> None:
    """Imports here what the children would import each, but not their package."""
    sys.modules[without] = None
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:
            pass  # a child that needs it will say so
    del sys.modules[without]


def import_all(modules: list) -> tuple:
    """Returns why modules do not import, by module, and what a child has loaded."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        with os.fdopen(tell, "w") as results:
            for module in modules:
                print(json.dumps([module, why_not(module)]), file=results, flush=True)
            print(json.dumps(["", list(sys.modules)]), file=results, flush=True)
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as results:
        errors = dict(json.loads(result) for result in results)
    _, status = os.waitpid(child, 0)
    loaded = errors.pop("", [])
    for module in modules:
        errors.setdefault(module, f"the interpreter died, wait status {status}")
    return {module: error for module, error in errors.items() if error}, loaded


def why_not(module: str) -> str:
    try:
        importlib.import_module(module)
    except BaseException as error:  # SystemExit too
        return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    return ""


if __name__ == "__main__":
    main()
