"""The config of a text-only Gemma 4 folder is the text config of the multimodal one,
whichever transformers wrote it."""

import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from sglang.srt.utils.hf_transformers_utils import get_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))

from gemma4.checkpoint import SHAPES, write_checkpoint  # noqa: E402

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

# What SGLang reads; its names mean full attention, those with swa_ a window.
NAMES = (
    *("head_dim", "v_head_dim", "num_key_value_heads"),
    *("swa_head_dim", "swa_v_head_dim", "swa_num_key_value_heads"),
)


class TestGemma4TextOnly(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.folder = Path(cls.temporary.name)
        for name in ("multimodal", "text"):
            write_checkpoint(cls.folder / name, text_only=name == "text", weights=False)
        text = SHAPES["tiny"].text
        cls.expected = (
            *(text["global_head_dim"],) * 2,
            text["num_global_key_value_heads"],
            *(text["head_dim"],) * 2,
            text["num_key_value_heads"],
        )

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def check(self, name, text):
        config = get_config(str(self.folder / name), trust_remote_code=False)
        config = text(config)
        self.assertEqual(tuple(getattr(config, n) for n in NAMES), self.expected)
        return config

    def test_as_written(self):
        text = self.check("text", lambda config: config)
        multimodal = self.check("multimodal", lambda config: config.text_config)
        self.assertEqual(text.architectures, ["Gemma4ForCausalLM"])
        self.assertEqual(text.layer_types, multimodal.layer_types)

    def test_written_with_global_head_dim(self):
        """As transformers did before it wrote per_layer_config."""
        for name, text in (
            ("text", lambda config: config),
            ("multimodal", lambda config: config["text_config"]),
        ):
            path = self.folder / name / "config.json"
            written = path.read_text()
            config = json.loads(written)
            shape = SHAPES["tiny"].text
            text(config).pop("per_layer_config", None)
            for key in ("global_head_dim", "num_global_key_value_heads"):
                text(config)[key] = shape[key]
            path.write_text(json.dumps(config))
            try:
                with self.subTest(name):
                    self.check(name, lambda c: getattr(c, "text_config", c))
            finally:
                path.write_text(written)


if __name__ == "__main__":
    unittest.main()
