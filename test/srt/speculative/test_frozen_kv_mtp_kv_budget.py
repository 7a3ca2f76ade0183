"""A draft that reads the target's KV cache takes nothing of the target's KV memory."""

import sys
import tempfile
import unittest
from pathlib import Path

import transformers

from sglang.srt.server_args import prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint  # noqa: E402
from gemma4.pools.plan import kv_cache_configurator  # noqa: E402

register_cpu_ci(est_time=30, suite="base-a-test-cpu")

KV_BYTES = 74_384_050_000
CHAIN = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
CHAIN += ["--speculative-num-draft-tokens", "4"]


class TestKVBudget(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folders = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folders.cleanup)
        cls.parent = Path(folders.name)

    def folder(self, shape, assistant=False) -> str:
        folder = self.parent / f"{shape}{'-assistant' if assistant else ''}"
        write_checkpoint(folder, shape, assistant=assistant, weights=False)
        return str(folder)

    def llama(self, num_layers, arch="LlamaForCausalLM") -> str:
        config = transformers.LlamaConfig(
            num_hidden_layers=num_layers,
            hidden_size=256,
            intermediate_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            dtype="bfloat16",
        )
        config.architectures = [arch]
        folder = self.parent / f"{arch}-{num_layers}"
        config.save_pretrained(folder)
        return str(folder)

    def tokens(self, target, *argv):
        """Tokens of both pools, or of the one there is."""
        argv = ["--model-path", target, "--device", "cpu", *argv]
        with kv_cache_configurator(prepare_server_args(argv)) as configurator:
            config = configurator.config_from_budget(KV_BYTES)
        return config.max_total_num_tokens, config.swa_max_total_num_tokens

    def test_assistant(self):
        for shape in ("26b-a4b", "31b"):
            target, draft = self.folder(shape), self.folder(shape, assistant=True)
            for ratio in ("0.15", "0.8"):
                with self.subTest(shape=shape, ratio=ratio):
                    argv = ["--swa-full-tokens-ratio", ratio]
                    alone = self.tokens(target, *argv)
                    for name in ("NEXTN", "EAGLE"):
                        mtp = ["--speculative-algorithm", name, *CHAIN]
                        mtp += ["--speculative-draft-model-path", draft]
                        self.assertEqual(self.tokens(target, *argv, *mtp), alone)

    def test_draft_with_a_cache_of_its_own(self):
        """An EAGLE draft of one layer beside a target of four takes a fifth."""
        target, draft = self.llama(4), self.llama(1, arch="LlamaForCausalLMEagle")
        alone, _ = self.tokens(target)
        # Keys and values of two heads of 64 in two bytes a number.
        layer_bytes = 2 * 2 * 64 * 2
        self.assertEqual(alone, KV_BYTES // (4 * layer_bytes))
        mtp = ["--speculative-algorithm", "EAGLE", *CHAIN]
        mtp += ["--speculative-draft-model-path", draft]
        beside, _ = self.tokens(target, *mtp)
        self.assertEqual(beside, KV_BYTES // (5 * layer_bytes))


if __name__ == "__main__":
    unittest.main()
