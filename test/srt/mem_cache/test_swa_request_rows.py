"""The table of requests is as long as the smaller pool of a hybrid SWA model allows.

It keeps a row of the context's length for each request that may run.
"""

import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.server_args import prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint  # noqa: E402
from gemma4.pools.plan import kv_cache_configurator  # noqa: E402

register_cpu_ci(est_time=30, suite="base-a-test-cpu")

# A 141 GB H200 at --mem-fraction-static 0.85. At a ratio of 0.8 that is 403,559 tokens
# in the full and 322,847 in the SWA pool, at 0.15 1,452,813 and 217,921.
KV_BYTES = 74_384_050_000


class TestRequestRows(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folders = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folders.cleanup)
        cls.folder = f"{folders.name}/26b-a4b"
        write_checkpoint(cls.folder, "26b-a4b", weights=False)

    def rows(self, ratio, context, *argv) -> int:
        args = prepare_server_args(
            [
                *("--model-path", self.folder, "--device", "cpu"),
                *("--swa-full-tokens-ratio", str(ratio)),
                *("--context-length", str(context), *argv),
            ]
        )
        with (
            kv_cache_configurator(args) as configurator,
            patch.object(
                KVCacheConfigurator, "_profile_available_bytes", return_value=KV_BYTES
            ),
        ):
            return configurator._resolve_memory_pool_config(0).max_running_requests

    def test_as_many_at_a_small_ratio(self):
        """The small SWA pool of a small ratio makes the full pool larger."""
        for ratio in (0.15, 0.8):
            for context, rows in ((16_384, 4096), (131_072, 2048)):
                with self.subTest(ratio=ratio, context=context):
                    self.assertEqual(self.rows(ratio, context), rows)

    def test_a_given_number_is_kept(self):
        for rows in (80, 4096):
            argv = ("--max-running-requests", str(rows))
            self.assertEqual(self.rows(0.15, 131_072, *argv), rows)

    def test_shared_buffer(self):
        """With one buffer for both kinds of layers neither pool is the smaller one."""
        argv = ("--enable-unified-memory", "--attention-backend", "triton")
        self.assertEqual(self.rows(0.15, 131_072, *argv), 4096)


if __name__ == "__main__":
    unittest.main()
