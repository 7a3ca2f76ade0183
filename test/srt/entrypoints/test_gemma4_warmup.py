"""Gemma 4's server answers long prompts before it is ready, and forgets them."""

import io
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path

import requests
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.entrypoints.gemma4_warmup import get_warmup_batches
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils import kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import (
    CustomTestCase,
    find_available_port,
    popen_launch_server,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

CHUNK = 320
PREFILL = re.compile(
    r"Prefill batch, #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)"
)


class TestBatches(CustomTestCase):
    @given(st.integers(1, 20000))
    def test_no_prompt_is_too_long(self, longest):
        for batch in get_warmup_batches(longest):
            self.assertTrue(all(1 <= n <= longest for _, n in batch))


class TestDefault(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        write_checkpoint(Path(cls.folder.name, "tiny"), "tiny", weights=False)

    def warmups(self, *flags):
        model = str(Path(self.folder.name, "tiny"))
        args = prepare_server_args(["--model-path", model, *flags])
        args.resolve_once()
        return resolution_result(args, "warmups")

    def test_only_where_kernels_are_compiled(self):
        self.assertEqual(self.warmups("--device", "cuda"), "gemma4_prefill")
        self.assertIsNone(self.warmups("--device", "cpu"))

    def test_what_the_user_says_is_kept(self):
        given_ = self.warmups("--device", "cuda", "--warmups", "voice_chat")
        self.assertEqual(given_, "voice_chat")
        self.assertIsNone(self.warmups("--device", "cuda", "--skip-server-warmup"))

    def test_embeddings_are_not_generated(self):
        self.assertIsNone(self.warmups("--device", "cuda", "--is-embedding"))


class TestServer(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        write_checkpoint(Path(folder.name, "tiny"), "tiny")
        cls.url = f"http://127.0.0.1:{find_available_port(23000)}"
        path = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
        cls.output = (io.StringIO(), io.StringIO())
        flags = ["--warmups", "gemma4_prefill", "--chunked-prefill-size", str(CHUNK)]
        process = popen_launch_server(
            f"{folder.name}/tiny",
            cls.url,
            timeout=300,
            device="cpu",
            other_args=[
                *("--device", "cpu", "--max-total-tokens", "4096"),
                *("--skip-server-warmup", *flags),
            ],
            env={
                "PATH": os.pathsep.join(path),
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
                "OMP_NUM_THREADS": "1",
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            return_stdout_stderr=cls.output,
        )
        cls.addClassCleanup(kill_process_tree, process.pid)

    def said(self):
        return "".join(stream.getvalue() for stream in self.output)

    def test_each_kind_was_answered_and_nothing_is_left(self):
        before, _, _ = self.said().partition("Uvicorn running")
        batches = [tuple(map(int, numbers)) for numbers in PREFILL.findall(before)]
        alone = [batch[1:] for batch in batches if batch[0] == 1]
        first, half = CHUNK * 9 // 10, CHUNK // 2
        for expected in (first, 0), (CHUNK - first, first), (half, 0):
            self.assertIn(expected, alone)
        self.assertTrue(any(sequences > 1 for sequences, _, _ in batches))
        load = requests.get(f"{self.url}/v1/loads", timeout=30).json()["loads"][0]
        self.assertEqual(load["num_used_tokens"], 0)
        data = {"input_ids": [3] * CHUNK, "sampling_params": {"max_new_tokens": 1}}
        answer = requests.post(f"{self.url}/generate", json=data, timeout=60).json()
        self.assertEqual(answer["meta_info"]["cached_tokens"], 0)


if __name__ == "__main__":
    unittest.main()
