"""A Gemma 4 checkpoint that is not whole, or whose FP8 weights cannot be served as they
are, is refused in one sentence before a model is built."""

import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
from fp8_models import can_build_models, load
from safetensors.torch import load_file, save_file

from sglang.srt.model_loader.gemma4_checkpoint import check_gemma4_checkpoint
from sglang.srt.utils.hf_transformers_utils import get_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint
from gemma4.fp8_forms import FORMS

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

LAYER = "model.language_model.layers.3"
SHAPES = ("tiny", "tiny-31b", "tiny-e2b", "tiny-e4b", "tiny-12b")


class TestCheckpointFiles(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        can_build_models(cls)

    def written(self, fp8=None, shape="tiny", **kind):
        folder = self.folder / "-".join([shape, str(fp8), *kind])
        write_checkpoint(folder, shape, fp8=fp8, **kind)
        return folder

    def changed(self, fp8, change=lambda weights: None, config=lambda config: None):
        """A copy of the tiny folder, with its weights and quantization_config changed."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.written(fp8), out, dirs_exist_ok=True)
        weights = load_file(out / "model.safetensors")
        change(weights)
        save_file(weights, out / "model.safetensors")
        values = json.loads((out / "config.json").read_text())
        config(values)
        (out / "config.json").write_text(json.dumps(values))
        return out

    def refuses(self, folder, sentence):
        """The loader does, and names the file, before it builds a model."""
        build = "sglang.srt.model_loader.loader._initialize_model"
        with mock.patch(build) as build, self.assertRaisesRegex(ValueError, sentence):
            load(folder)
        build.assert_not_called()

    def check(self, folder):
        files = [str(file) for file in folder.glob("*.safetensors")]
        config = get_config(str(folder), trust_remote_code=False)
        check_gemma4_checkpoint(files, config)

    def test_whole_folders_pass(self):
        for shape in SHAPES:
            for kind in ({}, {"text_only": True}, {"assistant": True}):
                for form in (None, *FORMS):
                    with self.subTest(shape=shape, form=form, **kind):
                        self.check(self.written(form, shape, **kind))

    def test_file_cut_short(self):
        out = Path(tempfile.mkdtemp(dir=self.folder))
        for fp8 in (None, "fp8-dynamic"):
            shutil.copytree(self.written(fp8), out, dirs_exist_ok=True)
            file = out / "model.safetensors"
            whole = file.read_bytes()
            for size, sentence in (
                (len(whole) - 1, f"model.safetensors has {len(whole) - 1} bytes"),
                (1000, "no whole safetensors file"),
                (3, "no whole safetensors file"),
                (0, "no whole safetensors file"),
            ):
                with self.subTest(fp8=fp8, size=size):
                    file.write_bytes(whole[:size])
                    self.refuses(out, sentence)

    def test_missing_scale(self):
        for fp8, name in (
            ("fp8-dynamic", f"{LAYER}.experts.5.up_proj.weight_scale"),
            ("fp8-block", f"{LAYER}.self_attn.q_proj.weight_scale"),
            ("fp8-static", f"{LAYER}.mlp.down_proj.input_scale"),
            ("fp8-fine-grained", f"{LAYER}.experts.gate_up_proj_scale_inv"),
        ):
            with self.subTest(fp8=fp8):
                folder = self.changed(fp8, lambda weights: weights.pop(name))
                self.refuses(folder, f"the checkpoint has no {name}")

    def test_scale_of_another_shape(self):
        for fp8, name in (
            ("fp8-dynamic", f"{LAYER}.experts.5.up_proj.weight_scale"),
            ("fp8-block", f"{LAYER}.self_attn.k_proj.weight_scale"),
            ("fp8-fine-grained", f"{LAYER}.mlp.down_proj.weight_scale_inv"),
        ):
            with self.subTest(fp8=fp8):

                def transpose(weights):
                    weights[name] = weights[name].mT.contiguous()

                sentence = f"{name} of shape .* cannot scale a weight"
                self.refuses(self.changed(fp8, transpose), sentence)

    def test_unknown_scheme(self):
        def by_group(config):
            group = config["quantization_config"]["config_groups"]["group_0"]
            group["weights"].update(strategy="group", group_size=32)

        def none(config):
            del config["quantization_config"]

        folder = self.changed("fp8-dynamic", config=by_group)
        self.refuses(folder, "config_groups.group_0 has FP8 weights of .* 'group'")
        folder = self.changed("fp8-dynamic", config=none)
        self.refuses(folder, "is FP8, and config.json has no quantization_config")

    def test_layers_that_cannot_be_fp8(self):
        name = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight"

        def tower(weights):
            weight = weights[name].to(torch.float8_e4m3fn)
            weights[name] = weight
            weights[f"{name}_scale"] = torch.ones(len(weight), 1)

        with self.assertRaisesRegex(ValueError, f"{name} is FP8, and is served in 16"):
            self.check(self.changed("fp8-dynamic", tower))

    def test_layers_that_are_not_fp8(self):
        """Its experts were left as they were, as they are no linear layers there."""
        plain = load_file(self.written() / "model.safetensors")

        def experts(weights):
            for name in [name for name in weights if ".experts." in name]:
                del weights[name]
            weights.update({k: v for k, v in plain.items() if ".experts." in k})

        def ignore(config):
            config["quantization_config"]["ignore"].append("re:.*experts.*")

        sentence = "experts.* is BF16, and quantization_config says FP8"
        with self.assertRaisesRegex(ValueError, sentence):
            self.check(self.changed("fp8-dynamic", experts))
        self.check(self.changed("fp8-dynamic", experts, ignore))
        sentence = "experts.* is F8_E4M3, and quantization_config leaves it out"
        with self.assertRaisesRegex(ValueError, sentence):
            self.check(self.changed("fp8-dynamic", config=ignore))

    def test_blocks_that_are_not_whole(self):
        """26B-A4B's experts are 5.5 blocks of 128 wide; these, half a block."""
        with mock.patch("gemma4.fp8_forms.TINY_BLOCK", 64):
            folder = self.folder / "wide-blocks"
            write_checkpoint(folder, "tiny", fp8="fp8-fine-grained")
        sentence = "has (32|96) rows, no whole number of blocks of 64"
        with self.assertRaisesRegex(ValueError, sentence):
            self.check(folder)


if __name__ == "__main__":
    unittest.main()
