"""--max-running-requests of a server with Gemma 4's MTP assistant."""

import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

from sglang.srt.arg_groups import memory_hook
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.server_args import prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=20, suite="base-a-test-cpu")

CHAIN = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
CHAIN += ["--speculative-num-draft-tokens", "4"]


class TestMaxRunningRequests(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folders = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folders.cleanup)
        cls.target, cls.draft = f"{folders.name}/target", f"{folders.name}/draft"
        write_checkpoint(cls.target, "tiny", weights=False)
        write_checkpoint(cls.draft, "tiny", assistant=True, weights=False)

    def resolve(self, *argv, gpu_memory=None, algorithm="NEXTN"):
        """(requests, largest batch of a decode graph) of a GPU with so many MiB, or of
        the CPU."""
        argv = ["--model-path", self.target, *argv]
        argv += ["--device", "cpu" if gpu_memory is None else "cuda"]
        if algorithm is not None:
            argv += ["--speculative-algorithm", algorithm, *CHAIN]
            argv += ["--speculative-draft-model-path", self.draft]
        with patch.object(
            memory_hook, "get_device_memory_capacity", return_value=gpu_memory
        ):
            args = prepare_server_args(argv)
            args.resolve_once()
        graphs = resolution_result(args, "cuda_graph_config")
        requests = resolution_result(args, "max_running_requests")
        return requests, graphs.decode.max_bs

    def test_as_many_as_a_graph_holds(self):
        for gpu_memory in (143_771, 183_359):  # H200, B200
            with self.subTest(gpu_memory=gpu_memory):
                requests, max_bs = self.resolve(gpu_memory=gpu_memory)
                self.assertEqual(requests, max_bs)
                self.assertGreaterEqual(requests, 256)
        for max_bs in (64, 100):
            argv = ["--cuda-graph-max-bs-decode", str(max_bs)]
            self.assertEqual(self.resolve(*argv, gpu_memory=143_771), (max_bs, max_bs))

    def test_graphs_are_those_without_it(self):
        """The number does not change the graphs, which are chosen before."""
        _, max_bs = self.resolve(gpu_memory=143_771, algorithm=None)
        self.assertEqual(self.resolve(gpu_memory=143_771)[1], max_bs)

    def test_never_less_than_upstreams(self):
        argv = ["--cuda-graph-max-bs-decode", "8"]
        self.assertEqual(self.resolve(*argv, gpu_memory=143_771), (48, 8))
        self.assertEqual(self.resolve()[0], 48)
        argv = ["--disable-cuda-graph"]
        self.assertGreaterEqual(self.resolve(*argv, gpu_memory=143_771)[0], 48)

    def test_a_given_number_is_kept(self):
        for given in (1, 48, 80, 500):
            argv = ["--max-running-requests", str(given)]
            self.assertEqual(self.resolve(*argv, gpu_memory=143_771)[0], given)
            self.assertEqual(self.resolve(*argv)[0], given)


if __name__ == "__main__":
    unittest.main()
