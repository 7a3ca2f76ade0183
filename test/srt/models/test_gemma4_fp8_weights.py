"""The CPU engine serves FP8 checkpoints of Gemma 4 as if their weights had been multiplied
by their scales.

Each form and each member of the family is loaded in this process, and has the same
parameters as a checkpoint in float32 that the test multiplied itself. Two are served and
compared with transformers, which reads that checkpoint (test_gemma4_parity.py).
Quantized inputs are not simulated.
"""

import os
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import test_gemma4_parity as parity
import torch
import transformers
from fp8_models import can_build_models, load, write_without_fp8

# That module has found the factory.
from gemma4.checkpoint import write_checkpoint
from gemma4.fp8_forms import FORMS

from sglang.srt.model_loader.fp8_dequantize import dequantize
from sglang.srt.model_loader.gemma4_checkpoint import Fp8Scheme
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=120, suite="stage-a-test-cpu")

WINDOW = parity.WINDOW
SHAPES = ("tiny", "tiny-31b", "tiny-e2b", "tiny-e4b", "tiny-12b")


def setUpModule():
    global FOLDERS, THREADS
    # Operations of a tiny model take less time than threads take to meet.
    THREADS = torch.get_num_threads()
    torch.set_num_threads(1)
    FOLDERS = Path(tempfile.mkdtemp(prefix="gemma4-fp8-"))


def tearDownModule():
    torch.set_num_threads(THREADS)
    shutil.rmtree(FOLDERS)


class TestFp8Weights(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        can_build_models(cls)
        # What is not loaded is NaN.
        torch.use_deterministic_algorithms(True)
        cls.addClassCleanup(torch.use_deterministic_algorithms, False)

    def check(self, shape, fp8, dtype="float32", **kind):
        name = "-".join([shape, fp8, dtype, *kind])
        folder, plain = FOLDERS / name, FOLDERS / f"{name}-plain"
        write_checkpoint(folder, shape, fp8=fp8, dtype=dtype, **kind)
        write_without_fp8(folder, plain)
        with self.assertLogs("sglang.srt.model_loader.fp8_dequantize") as logs:
            got = load(folder, dtype).state_dict()
        self.assertEqual(len(logs.output), 1)
        self.assertIn(f"dequantized to torch.{dtype}", logs.output[0])
        expected = load(plain, dtype).state_dict()
        self.assertEqual(got.keys(), expected.keys())
        for name, weight in expected.items():
            # Layers that share keys and values have weights that nothing loads.
            unset = weight.isnan()
            self.assertTrue(torch.equal(got[name].isnan(), unset), name)
            self.assertTrue(not unset.any() or "_proj" in name and "e" in shape, name)
            self.assertTrue(torch.equal(got[name][~unset], weight[~unset]), name)

    def test_forms_and_members(self):
        for shape in SHAPES:
            for form in FORMS:
                with self.subTest(shape=shape, form=form):
                    self.check(shape, form)

    def test_text_only_and_bfloat16(self):
        for form in FORMS:
            with self.subTest(form=form):
                self.check("tiny", form, dtype="bfloat16", text_only=True)

    def test_blocks_at_the_ends(self):
        """26B-A4B's experts are 5.5 blocks of 128 wide; these, half and 1.5."""
        with mock.patch("gemma4.fp8_forms.TINY_BLOCK", 64):
            self.check("tiny", "fp8-fine-grained", dtype="bfloat16")

    def test_what_it_cannot_have(self):
        plain, int8 = FOLDERS / "16-bits", FOLDERS / "int8"
        write_checkpoint(plain, "tiny")
        write_checkpoint(int8, "tiny", fp8="fp8-dynamic")
        text = (int8 / "config.json").read_text().replace('"float"', '"int"')
        (int8 / "config.json").write_text(text)
        amx = "sglang.srt.model_loader.fp8_dequantize.cpu_has_amx_support"
        for folder, method in ((plain, "fp8"), (int8, "compressed-tensors")):
            sentence = f"cannot quantize to, or read, {method}"
            with mock.patch(amx, return_value=False), self.subTest(method):
                with self.assertRaisesRegex(ValueError, sentence):
                    load(folder, quantization=method)

    def test_experts_of_the_real_width(self):
        scheme = Fp8Scheme.from_config(
            {"quant_method": "fp8", "weight_block_size": [128, 128]}
        )
        generator = torch.Generator().manual_seed(0)
        for rows, columns in ((2 * 704, 256), (256, 704)):
            weight = torch.randn(2, rows, columns, generator=generator)
            weight = weight.to(torch.float8_e4m3fn)
            down, across = -(-rows // 128), -(-columns // 128)
            scale = torch.rand(2, down, across, generator=generator)
            got = dequantize(weight, scale, scheme, torch.float32)
            of_each = scale[:, torch.arange(rows) // 128]
            of_each = of_each[..., torch.arange(columns) // 128]
            self.assertTrue(torch.equal(got, weight.float() * of_each))


class TestWhatParitySees(CustomTestCase):
    """A wrong scale, a transposed one and one that is left out change the answers of
    transformers by more than a server may differ from it."""

    def logprobs(self, folder):
        model = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.inference_mode():
            tokens = torch.tensor([parity._prompt(4 * WINDOW)])
            return model(input_ids=tokens).logits[0].log_softmax(-1)

    def test_scales(self):
        folder = FOLDERS / "scales"
        write_checkpoint(folder, "tiny", fp8="fp8-fine-grained", dtype="float32")
        write_without_fp8(folder, FOLDERS / "right")
        right = self.logprobs(FOLDERS / "right")
        # A norm behind each of these layers hides what all of its scales have in common.
        first = torch.zeros(4, 4)
        first[0, 0] = 0.1
        changes = {
            "wrong": ("7.self_attn.o_proj", lambda scale: scale * (1 + first)),
            "transposed": ("7.self_attn.o_proj", lambda scale: scale.mT[:4].clone()),
            "left out": ("7.mlp.down_proj", torch.ones_like),
            "of another expert": (
                "7.experts.down_proj",
                lambda scale: scale.roll(1, 0),
            ),
        }
        for change, (layer, other) in changes.items():
            with self.subTest(change):
                out = FOLDERS / change.replace(" ", "-")
                write_without_fp8(
                    folder,
                    out,
                    lambda name, scale: other(scale) if layer in name else scale,
                )
                moved = (self.logprobs(out) - right).abs().max().item()
                self.assertGreater(moved, 2 * parity.TOLERANCE["float32"])


class Served(parity.Served):
    """The cases; a subclass names the shape and the form."""

    shape: str
    fp8: str
    dtype = "float32"
    server_args = parity.ROOMY

    @classmethod
    def path(cls):
        folder = FOLDERS / cls.__name__
        write_checkpoint(folder, cls.shape, fp8=cls.fp8, dtype="float32")
        return str(folder)

    @classmethod
    def oracle_path(cls):
        out = FOLDERS / f"{cls.__name__}-plain"
        write_without_fp8(cls.path(), out)
        return str(out)

    def test_alone(self):
        for length in (5, 4 * WINDOW):
            with self.subTest(length=length):
                prompt = parity._prompt(length)
                answer = self.generate(prompt, logprob_start_len=0)
                self.check(f"prompt of {length} tokens", prompt, answer)

    def test_several_at_once(self):
        prompts = [parity._prompt(n, seed=1) for n in (1, WINDOW + 1, 3 * WINDOW)]
        for prompt, answer in zip(prompts, self.generate(prompts)):
            with self.subTest(length=len(prompt)):
                self.check(f"prompt of {len(prompt)} tokens", prompt, answer)


class TestServedBlocksAndTensors(Served, CustomTestCase):
    """Of 26B-A4B: the attention in blocks, the experts with static scales."""

    shape, fp8 = "tiny", "fp8-block"


class TestServedChannels(Served, CustomTestCase):
    """Of E2B, whose per-layer projections are FP8, too."""

    shape, fp8 = "tiny-e2b", "fp8-dynamic"


if __name__ == "__main__":
    unittest.main()
