"""Every member of the Gemma 4 family answers as transformers does, whichever release of
transformers wrote its config.json.

Small models of 26B-A4B (experts), 31B (dense), E2B and E4B (layers that share keys and
values, per-layer embeddings, a wider MLP) and 12B (Gemma 4 Unified) are served on the
CPU engine in float32, each as a multimodal and as a text-only folder. The comparison is
that of test_gemma4_parity.py, with logprobs equal to within 1e-5.
"""

import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import torch

from sglang.srt.utils.hf_transformers import get_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
import test_gemma4_parity as parity

# That module has found the factory.
from gemma4.checkpoint import CONFIG_FORMATS, SHAPES, write_checkpoint

register_cpu_ci(est_time=300, suite="stage-a-test-cpu")

WINDOW = SHAPES["tiny"].text["sliding_window"]
SHAPES_OF_THE_FAMILY = ("tiny", "tiny-31b", "tiny-e2b", "tiny-e4b", "tiny-12b")


def setUpModule():
    global FOLDERS, THREADS
    # Operations of a tiny model take less time than threads take to meet.
    THREADS = torch.get_num_threads()
    torch.set_num_threads(1)
    FOLDERS = Path(tempfile.mkdtemp(prefix="gemma4-family-"))


def tearDownModule():
    torch.set_num_threads(THREADS)
    shutil.rmtree(FOLDERS)


class TestConfigFormats(CustomTestCase):
    """The engine reads the same from a config.json of either format."""

    def test_both_formats_read_alike(self):
        for shape in SHAPES_OF_THE_FAMILY:
            for kind in ({}, {"text_only": True}, {"assistant": True}):
                with self.subTest(shape=shape, **kind):
                    read = []
                    for config_format in CONFIG_FORMATS:
                        folder = FOLDERS / f"{shape}-{'-'.join(kind)}-{config_format}"
                        write_checkpoint(
                            folder,
                            shape,
                            weights=False,
                            config_format=config_format,
                            **kind,
                        )
                        read.append(self._read(folder))
                    self.assertEqual(*read)
                    text = SHAPES[shape].text
                    self.assertEqual(read[0]["head_dim"], text["global_head_dim"])
                    self.assertEqual(read[0]["swa_head_dim"], text["head_dim"])
                    self.assertEqual(
                        read[0]["swa_num_key_value_heads"], text["num_key_value_heads"]
                    )
                    self.assertEqual(
                        read[0]["num_key_value_heads"],
                        text["num_global_key_value_heads"]
                        or text["num_key_value_heads"],
                    )

    def _read(self, folder) -> dict:
        """What the model is built from; what is absent is as what is None, False or 0."""
        config = get_config(str(folder), trust_remote_code=False)
        text = vars(getattr(config, "text_config", config))
        return {k: v for k, v in text.items() if v and not k.startswith("_")}


class Family(parity.Served):
    """The cases; a subclass names the shape, the kind of folder and its format."""

    shape: str
    text_only: bool
    config_format: str
    dtype = "float32"
    server_args = parity.ROOMY
    tolerance = {"float32": 1e-5}

    @classmethod
    def path(cls):
        folder = FOLDERS / cls.__name__
        write_checkpoint(
            folder,
            cls.shape,
            text_only=cls.text_only,
            config_format=cls.config_format,
            dtype="float32",
        )
        return str(folder)

    def test_alone(self):
        for length in (5, 4 * WINDOW):
            with self.subTest(length=length):
                prompt = parity._prompt(length)
                answer = self.generate(prompt, logprob_start_len=0)
                self.assertEqual(
                    len(answer["meta_info"]["input_token_logprobs"]), length
                )
                self.check(f"prompt of {length} tokens", prompt, answer)

    def test_several_at_once(self):
        lengths = (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)
        prompts = [parity._prompt(n, seed=1) for n in lengths]
        for prompt, answer in zip(prompts, self.generate(prompts)):
            with self.subTest(length=len(prompt)):
                self.check(f"prompt of {len(prompt)} tokens", prompt, answer)

    def test_prefix_cache_hit(self):
        start = parity._prompt(3 * WINDOW, seed=2)
        self.generate(start, new_tokens=1)
        prompt = start + parity._prompt(8, seed=3)[1:]
        answer = self.generate(prompt)
        self.assertGreaterEqual(answer["meta_info"]["cached_tokens"], len(start))
        self.check("7 tokens after a cached prefix", prompt, answer)


class Test26BA4B(Family, CustomTestCase):
    shape, text_only, config_format = "tiny", False, "per-layer"


class Test26BA4BTextOnly(Family, CustomTestCase):
    shape, text_only, config_format = "tiny", True, "flat"


class Test31B(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-31b", False, "flat"


class Test31BTextOnly(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-31b", True, "per-layer"


class TestE2B(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-e2b", False, "per-layer"


class TestE2BTextOnly(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-e2b", True, "flat"


class TestE4B(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-e4b", False, "flat"


class TestE4BTextOnly(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-e4b", True, "per-layer"


class Test12B(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-12b", False, "per-layer"


class Test12BTextOnly(Family, CustomTestCase):
    shape, text_only, config_format = "tiny-12b", True, "flat"


if __name__ == "__main__":
    unittest.main()
