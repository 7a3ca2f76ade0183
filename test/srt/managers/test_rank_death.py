"""A server of which one rank dies ends within 30 s, says which one it was, and leaves no
process behind.

Servers of two ranks on the CPU engine, one with tensor and one with data parallelism.
Requests run when a rank is killed. The other rank is stopped before, as a GPU's rank would
wait for its peer and say nothing.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import psutil
import requests

from sglang.srt.utils import kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import (
    CustomTestCase,
    find_available_port,
    popen_launch_server,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import BOS, FIRST_TEXT_TOKEN, write_checkpoint

register_cpu_ci(est_time=130, suite="stage-a-test-cpu")

SECONDS = 30
REQUESTS = 4


class TestRankDeath(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="gemma4-rank-death-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        write_checkpoint(f"{cls.folder}/model", text_only=True, dtype="float32")

    def launch(self, *argv):
        self.url = f"http://127.0.0.1:{find_available_port(21000)}"
        self.log = Path(self.folder, f"{self._testMethodName}.log")
        cores = sorted(os.sched_getaffinity(0))
        # Written to until the server's last word has been read.
        log = self.enterContext(open(self.log, "w"))
        env = {
            "PATH": os.pathsep.join(
                [os.path.dirname(sys.executable), os.environ["PATH"]]
            ),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        }
        self.server = popen_launch_server(
            f"{self.folder}/model",
            self.url,
            timeout=300,
            device="cpu",
            other_args=[
                *("--device", "cpu", "--max-total-tokens", "4096"),
                *("--skip-server-warmup", *argv),
            ],
            env=env,
            return_stdout_stderr=(log, log),
        )
        self.addCleanup(self._end)

    def _end(self):
        if self.server.poll() is None:
            kill_process_tree(self.server.pid)
            self.server.wait()

    def _read_log(self) -> str:
        """What the server wrote, once its last lines have been copied."""
        size = -1
        while self.log.stat().st_size > size:
            size = self.log.stat().st_size
            time.sleep(1)
        return self.log.read_text(errors="replace")

    def ask(self, i: int):
        try:
            response = requests.post(
                f"{self.url}/generate",
                json={
                    "input_ids": [BOS] + [FIRST_TEXT_TOKEN + i] * 20,
                    "sampling_params": {"max_new_tokens": 900, "ignore_eos": True},
                },
                timeout=300,
            )
            self.outcomes.append(response.status_code)
        except requests.ConnectionError:
            self.outcomes.append("connection closed")

    def check(self, victim: str, other: str, name: str):
        """Kill the process of one title, and stop another's first."""
        self.outcomes = []
        threads = [threading.Thread(target=self.ask, args=[i]) for i in range(REQUESTS)]
        for thread in threads:
            thread.start()
        # Until all run.
        time.sleep(3)
        self.assertEqual(self.outcomes, [])
        processes = psutil.Process(self.server.pid).children(recursive=True)
        titled = {" ".join(p.cmdline()).strip(): p for p in processes}
        titled[f"sglang::{other}"].suspend()
        titled[f"sglang::{victim}"].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        self.server.wait(timeout=2 * SECONDS)
        left = psutil.wait_procs(processes, timeout=SECONDS)[1]
        took = time.monotonic() - killed
        for thread in threads:
            thread.join()
        log = self._read_log()
        self.assertLess(took, SECONDS, log[-2000:])
        self.assertEqual(left, [])
        self.assertEqual(self.outcomes, ["connection closed"] * REQUESTS)
        pid = titled[f"sglang::{victim}"].pid
        said = f"The {name} (pid {pid}) was killed by SIGKILL; the server cannot go on"
        self.assertEqual(log.count(said), 1, log[-2000:])

    def test_tensor_parallel(self):
        self.launch("--tp", "2")
        self.check("scheduler_TP1", "scheduler_TP0", "scheduler of rank TP1")

    def test_data_parallel(self):
        self.launch("--dp", "2")
        self.check("scheduler_DP1", "scheduler_DP0", "scheduler of rank DP1 TP0")


if __name__ == "__main__":
    unittest.main()
