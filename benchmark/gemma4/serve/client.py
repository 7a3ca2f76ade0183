"""SGLang's bench_serving, which sends the loads to every arm."""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import List

from gemma4.engines.host import own_environment
from gemma4.engines.process import spawn, stop
from gemma4.engines.servers import Server
from gemma4.errors import UserError


class Client:
    """SGLang's bench_serving, imported once and run for each load.

    It is the one of this interpreter for every arm: what sends does not differ.
    """

    def __init__(self, log: Path):
        self.log = log

    @contextlib.contextmanager
    def running(self) -> Iterator["Client"]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as output:
            self.process = spawn(
                [sys.executable, "-m", "gemma4.serve.worker"],
                **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output),
                **dict(
                    env=own_environment(), cwd=self.log.parent, text=True, bufsize=1
                ),
            )
        try:
            yield self
        finally:
            stop(self.process)
            self.process.stdin.close()
            self.process.stdout.close()

    def send(
        self,
        arguments: List[str],
        server: Server,
        timeout: float,
        tick=lambda: None,
    ) -> dict:
        """Runs bench_serving with these arguments; returns its result.

        `tick` is called a few times a second meanwhile.

        Raises:
            UserError: It failed, the server died, or it took longer than `timeout`.
        """
        with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
            output = Path(folder) / "result.jsonl"
            line = json.dumps([*arguments, "--output-file", str(output)])
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            start = time.monotonic()
            while not select.select([self.process.stdout], [], [], 0.2)[0]:
                tick()
                server.check_alive("under load")
                if time.monotonic() - start > timeout:
                    raise UserError(
                        f"The load took longer than {timeout:.0f} s: see {self.log}."
                    )
            tick()
            said = self.process.stdout.readline().strip()
            server.check_alive("under load")
            if said != "done" or not output.exists():
                raise UserError(
                    f"bench_serving failed ({said or 'it died'}): see {self.log}."
                )
            return json.loads(output.read_text().splitlines()[-1])
