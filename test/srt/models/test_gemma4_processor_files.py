"""A Gemma 4 folder that lacks what its processor needs is refused by name of the file."""

import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from sglang.srt.utils.hf_transformers_utils import get_processor
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

from gemma4.checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")


class TestGemma4ProcessorFiles(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = Path(cls.temporary.name) / "tiny"
        write_checkpoint(cls.folder, "tiny", weights=False)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def test_whole_folder(self):
        processor = get_processor(str(self.folder))
        self.assertEqual(type(processor).__name__, "Gemma4Processor")

    def test_missing_file(self):
        for name in (
            "processor_config.json",
            "tokenizer_config.json",
            "tokenizer.json",
        ):
            with self.subTest(name=name):
                folder = self.folder.parent / f"without-{name}"
                shutil.copytree(self.folder, folder)
                (folder / name).unlink()
                with self.assertRaisesRegex(FileNotFoundError, f"no {name}.* needs"):
                    get_processor(str(folder))


if __name__ == "__main__":
    unittest.main()
