"""Runs SGLang's benchmark.serving for each line of stdin, a JSON list of its arguments.

What it prints goes to stderr; stdout gets `done` or the error, a line for each. Its
imports take longer than many a load, so they are done once, while a server starts.
"""

import json
import os
import sys

from sglang.benchmark.serving import cli_main


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        sys.argv = ["bench_serving", *json.loads(line)]
        print(f"$ {' '.join(sys.argv)}", flush=True)
        try:
            cli_main()
            said = "done"
        except SystemExit as e:
            said = f"exit status {e.code}" if e.code else "done"
        except Exception as e:
            said = " ".join(f"{type(e).__name__}: {e}".split())
        sys.stdout.flush()
        print(said, file=answers)


if __name__ == "__main__":
    main()
