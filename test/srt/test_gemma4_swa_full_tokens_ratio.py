"""The default of --swa-full-tokens-ratio for Gemma 4, and that a given value is kept.

Real folders go through the real parser, and the pool sizes come from the server's own
configurator.
"""

import contextlib
import io
import logging
import math
import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import transformers

from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))
from gemma4.checkpoint import SHAPES, write_checkpoint  # noqa: E402
from gemma4.pools.plan import kv_cache_configurator  # noqa: E402

register_cpu_ci(est_time=60, suite="base-a-test-cpu")

LOGGER = "sglang.srt.arg_groups.model_overrides.gemma4"
UNIFIED_MEMORY = ["--enable-unified-memory", "--attention-backend", "triton"]

# Bytes left for the KV cache: TP 1 on a 180 GB B200 with MTP, and on a 141 GB H200 at
# --mem-fraction-static 0.85.
B200_KV_BYTES = 109_478_050_000
H200_KV_BYTES = 74_384_050_000

_folders = None


def setUpModule():
    global _folders
    _folders = tempfile.TemporaryDirectory()


def tearDownModule():
    _folders.cleanup()


def gemma4(shape="26b-a4b", text_only=False) -> str:
    """Folder of a Gemma 4 shape without weights."""
    folder = Path(_folders.name) / f"{shape}{'-text' if text_only else ''}"
    write_checkpoint(folder, shape, text_only=text_only, weights=False)
    return str(folder)


def other(config: transformers.PretrainedConfig, arch: str) -> str:
    """Folder of another architecture, its config alone."""
    folder = Path(_folders.name) / arch
    config.architectures = [arch]
    config.save_pretrained(folder)
    return str(folder)


def parse(folder, *argv) -> ServerArgs:
    args = prepare_server_args(["--model-path", folder, "--device", "cpu", *argv])
    args.resolve_once()
    return args


def build(**kwargs) -> ServerArgs:
    args = ServerArgs(device="cpu", **kwargs)
    args.resolve_once()
    return args


def ratio_of(args: ServerArgs) -> float:
    return resolution_result(args, "swa_full_tokens_ratio")


class TestDefault(CustomTestCase):
    def check(self, args, ratio):
        self.assertEqual(ratio_of(args), ratio)

    def test_moe(self):
        for text_only in (False, True):
            with self.subTest(text_only=text_only):
                with self.assertLogs(LOGGER, logging.INFO) as logs:
                    args = parse(gemma4(text_only=text_only))
                self.check(args, 0.15)
                arch = "Gemma4ForCausalLM" if text_only else None
                arch = arch or "Gemma4ForConditionalGeneration"
                said = [x for x in logs.output if "swa_full_tokens_ratio" in x]
                self.assertEqual(len(said), 1, said)
                self.assertIn(
                    f"Setting swa_full_tokens_ratio to 0.15 for {arch}.", said[0]
                )

    def test_dense(self):
        with self.assertLogs(LOGGER, logging.INFO) as logs:
            self.check(parse(gemma4("31b")), 0.3)
        self.assertIn("Setting swa_full_tokens_ratio to 0.3", "".join(logs.output))

    def test_dense_unified(self):
        """12B, which has 31B's kinds of layers and no tower."""
        text = dict(num_hidden_layers=6, hidden_size=64, intermediate_size=64)
        config = transformers.Gemma4UnifiedConfig(text_config=text)
        folder = other(config, "Gemma4UnifiedForConditionalGeneration")
        self.check(parse(folder), 0.3)

    def test_dense_with_shared_layers(self):
        for shape in ("e4b", "e2b"):
            with self.subTest(shape=shape):
                self.check(parse(gemma4(shape)), 0.3)

    def test_block_diffusion(self):
        """One has no decode, for which the pools are balanced."""
        text = dict(num_hidden_layers=6, num_experts=8, top_k_experts=2)
        text.update(hidden_size=64, intermediate_size=64, moe_intermediate_size=32)
        config = transformers.DiffusionGemmaConfig(text_config=text)
        folder = other(config, "DiffusionGemmaForBlockDiffusion")
        self.check(parse(folder), 0.8)

    def test_disaggregated(self):
        """Decode preallocates whole prompts in both pools."""
        for shape in ("26b-a4b", "31b"):
            for mode in ("prefill", "decode"):
                with self.subTest(shape=shape, mode=mode):
                    args = parse(gemma4(shape), "--disaggregation-mode", mode)
                    self.check(args, 0.8)

    def test_unified_memory(self):
        """One buffer holds both kinds of layers; its budget stays what it was."""
        args = parse(gemma4(), *UNIFIED_MEMORY)
        self.assertTrue(resolution_result(args, "enable_unified_memory"))
        self.check(args, 0.8)

    def test_other_architectures(self):
        small = dict(
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=256,
        )
        for config, arch in (
            (transformers.LlamaConfig(**small), "LlamaForCausalLM"),
            (transformers.Qwen3MoeConfig(**small), "Qwen3MoeForCausalLM"),
            (transformers.Gemma3TextConfig(**small), "Gemma3ForCausalLM"),
        ):
            with self.subTest(arch=arch):
                folder = other(config, arch)
                self.check(parse(folder), 0.8)
                self.check(parse(folder, "--swa-full-tokens-ratio", "0.15"), 0.15)


class TestSetMeansSet(CustomTestCase):
    ratios = (0.05, 0.15, 0.8, 1.0)

    def each(self, build):
        """build(folder, ratio) takes the ratio and says nothing of another."""
        for folder in (gemma4(), gemma4(text_only=True), gemma4("31b")):
            for ratio in self.ratios:
                with self.subTest(folder=folder, ratio=ratio):
                    with patch.object(logging.getLogger(LOGGER), "info") as info:
                        args = build(folder, ratio)
                    self.assertEqual(ratio_of(args), ratio)
                    self.assertNotIn("swa_full_tokens_ratio", str(info.mock_calls))

    def test_command_line(self):
        self.each(
            lambda folder, ratio: parse(folder, "--swa-full-tokens-ratio", str(ratio))
        )

    def test_config_file(self):
        config = Path(_folders.name) / "config.yaml"

        def build(folder, ratio):
            config.write_text(f"swa-full-tokens-ratio: {ratio}\n")
            return parse(folder, "--config", str(config))

        self.each(build)

    def test_server_args(self):
        self.each(
            lambda folder, ratio: build(model_path=folder, swa_full_tokens_ratio=ratio)
        )

    def test_engine(self):
        from sglang.srt.entrypoints.engine import Engine

        class Stop(Exception):
            pass

        def build(folder, ratio):
            # Engine makes its ServerArgs and hands them to the processes it starts.
            with patch.object(
                Engine, "_launch_subprocesses", side_effect=Stop
            ) as launch:
                with self.assertRaises(Stop):
                    Engine(
                        model_path=folder,
                        device="cpu",
                        log_level="info",
                        swa_full_tokens_ratio=ratio,
                    )
            args = launch.call_args.kwargs["server_args"]
            args.resolve_once()
            return args

        self.each(build)

    def test_command_line_wins_over_config_file(self):
        config = Path(_folders.name) / "both.yaml"
        config.write_text("swa-full-tokens-ratio: 0.3\n")
        args = parse(
            gemma4(), "--config", str(config), "--swa-full-tokens-ratio", "0.8"
        )
        self.assertEqual(ratio_of(args), 0.8)

    def test_where_the_default_is_another(self):
        """Also under disaggregation and with one buffer."""
        for argv in (["--disaggregation-mode", "decode"], UNIFIED_MEMORY):
            args = parse(gemma4(), "--swa-full-tokens-ratio", "0.4", *argv)
            self.assertEqual(ratio_of(args), 0.4)

    def test_resolved_value_is_kept(self):
        args = parse(gemma4())
        again = build(model_path=gemma4(), swa_full_tokens_ratio=ratio_of(args))
        self.assertEqual(ratio_of(again), 0.15)


class TestRefused(CustomTestCase):
    """A range that a given value has to be in is upstream's own check."""

    def test_command_line_and_config_file(self):
        config = Path(_folders.name) / "bad.yaml"
        for text in ("0", "-0.1", "1.01", "8", "nan", "inf"):
            config.write_text(f'swa-full-tokens-ratio: "{text}"\n')
            for argv in (
                [f"--swa-full-tokens-ratio={text}"],
                ["--config", str(config)],
            ):
                with self.subTest(argv=argv, text=text):
                    with self.assertRaisesRegex(ValueError, r"range \(0, 1.0\]"):
                        parse(gemma4(), *argv)

    def test_no_number(self):
        for text in ("half", "0.5.1", ""):
            with self.subTest(text=text):
                error = io.StringIO()
                with contextlib.redirect_stderr(error):
                    with self.assertRaises(SystemExit) as caught:
                        parse(gemma4(), f"--swa-full-tokens-ratio={text}")
                self.assertEqual(caught.exception.code, 2)
                self.assertIn("argument --swa-full-tokens-ratio", error.getvalue())

    def test_built_in_code(self):
        for ratio in (0, 0.0, -0.1, 1.01, math.nan, math.inf):
            with self.subTest(ratio=ratio):
                with self.assertRaisesRegex(ValueError, r"range \(0, 1.0\]"):
                    build(model_path=gemma4(), swa_full_tokens_ratio=ratio)


class TestPoolSizes(CustomTestCase):
    def solve(self, args: ServerArgs, kv_bytes: int):
        with kv_cache_configurator(args) as configurator:
            return configurator.config_from_budget(kv_bytes)

    def check(self, args, kv_bytes, full, swa):
        config = self.solve(args, kv_bytes)
        self.assertEqual(config.full_max_total_num_tokens, full)
        self.assertEqual(config.swa_max_total_num_tokens, swa)
        self.assertEqual(config.max_total_num_tokens, full)

    def test_b200(self):
        args = parse(gemma4(), "--swa-full-tokens-ratio", "0.8")
        self.check(args, B200_KV_BYTES, 593_956, 475_164)
        self.check(parse(gemma4()), B200_KV_BYTES, 2_138_243, 320_736)

    def test_h200(self):
        args = parse(gemma4(), "--swa-full-tokens-ratio", "0.8")
        self.check(args, H200_KV_BYTES, 403_559, 322_847)
        self.check(parse(gemma4()), H200_KV_BYTES, 1_452_813, 217_921)

    def test_text_only(self):
        args = parse(gemma4(text_only=True))
        self.check(args, H200_KV_BYTES, 1_452_813, 217_921)

    def test_pools_fit_the_memory(self):
        for shape in ("26b-a4b", "31b"):
            text = SHAPES[shape].text
            num_full = text["num_hidden_layers"] // 6
            # Keys and values of two bytes a number.
            full_bytes = 4 * num_full * text["num_global_key_value_heads"] * 512
            swa_bytes = 4 * 5 * num_full * text["num_key_value_heads"] * 256
            for ratio in (0.05, 0.3, 1.0):
                for page_size in (1, 64):
                    with self.subTest(shape=shape, ratio=ratio, page_size=page_size):
                        argv = ["--swa-full-tokens-ratio", str(ratio)]
                        argv += ["--page-size", str(page_size)]
                        config = self.solve(parse(gemma4(shape), *argv), H200_KV_BYTES)
                        full = config.full_max_total_num_tokens
                        swa = config.swa_max_total_num_tokens
                        used = full * full_bytes + swa * swa_bytes
                        self.assertLessEqual(used, H200_KV_BYTES)
                        page_bytes = page_size * (full_bytes + swa_bytes)
                        self.assertLess(H200_KV_BYTES - used, 2 * page_bytes)
                        self.assertEqual(full % page_size + swa % page_size, 0)


if __name__ == "__main__":
    unittest.main()
