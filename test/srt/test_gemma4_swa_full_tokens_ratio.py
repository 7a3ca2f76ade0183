"""KV pool defaults of Gemma 4: --swa-full-tokens-ratio and the window release.

Real folders go through the real parser, and the pool sizes come from the real solver.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch
import transformers

from sglang.srt.arg_groups.deepseek_v4_hook import apply_deepseek_v4_defaults
from sglang.srt.environ import envs
from sglang.srt.model_executor import pool_configurator
from sglang.srt.model_executor.model_runner_kv_cache_mixin import (
    ModelRunnerKVCacheMixin,
)
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark" / "gemma4"))
from checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

SPLIT_LEAF = envs.SGLANG_OPT_SWA_SPLIT_LEAF_ON_INSERT
INTERVAL = envs.SGLANG_SWA_EVICTION_INTERVAL_MULTIPLIER
RELEASE_ENVS = (SPLIT_LEAF, INTERVAL)

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
    return prepare_server_args(["--model-path", folder, "--device", "cpu", *argv])


class Runner(ModelRunnerKVCacheMixin):
    """The part of a model runner that sizes the pools, on a GPU with this much left."""

    mambaish_config = None

    def __init__(self, server_args: ServerArgs, available_bytes: int):
        self.server_args = server_args
        self.model_config = server_args.get_model_config()
        self.is_hybrid_swa = self.model_config.is_hybrid_swa
        self.sliding_window_size = self.model_config.hf_text_config.sliding_window - 1
        self.kv_cache_dtype = torch.bfloat16
        self.pp_size = self.dp_size = 1
        self.available_bytes = available_bytes

    def _profile_available_bytes(self, pre_model_load_memory: int) -> int:
        return self.available_bytes


def solve(server_args: ServerArgs, available_bytes: int, page_size: int = 1):
    server_args.page_size = page_size
    # The parallel groups exist only in a running server.
    with patch.object(pool_configurator, "get_attention_tp_size", lambda: 1):
        runner = Runner(server_args, available_bytes)
        configurator = pool_configurator.create_memory_pool_configurator(runner)
        assert isinstance(configurator, pool_configurator.HybridSWAPoolConfigurator)
        return runner._resolve_memory_pool_config(0)


class _Case(CustomTestCase):
    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        for env in RELEASE_ENVS:  # restored afterwards, unset during the test
            self.stack.enter_context(env.override(None))
            env.clear()


class TestDefault(_Case):
    def test_moe(self):
        for text_only in (False, True):
            with self.subTest(text_only=text_only):
                with self.assertLogs("sglang.srt.server_args", logging.INFO) as logs:
                    args = parse(gemma4(text_only=text_only))
                arch = args.get_model_config().hf_config.architectures[0]
                self.assertEqual(
                    arch,
                    (
                        "Gemma4ForCausalLM"
                        if text_only
                        else "Gemma4ForConditionalGeneration"
                    ),
                )
                self.assertEqual(args.swa_full_tokens_ratio, 0.15)
                said = [x for x in logs.output if "swa_full_tokens_ratio" in x]
                self.assertEqual(len(said), 1, said)
                self.assertIn(
                    f"Setting swa_full_tokens_ratio to 0.15 for MoE {arch}", said[0]
                )

    def test_disaggregated(self):
        """Both pools hold whole prompts, so that neither is made smaller."""
        for mode in ("prefill", "decode"):
            args = parse(gemma4(), "--disaggregation-mode", mode)
            self.assertEqual(args.swa_full_tokens_ratio, 0.8)

    def test_dense(self):
        with self.assertLogs("sglang.srt.server_args", logging.INFO) as logs:
            self.assertEqual(parse(gemma4("31b")).swa_full_tokens_ratio, 0.3)
        self.assertIn(
            "Setting swa_full_tokens_ratio to 0.3 for dense Gemma4",
            "".join(logs.output),
        )
        args = parse(gemma4("31b"), "--disaggregation-mode", "decode")
        self.assertEqual(args.swa_full_tokens_ratio, 0.8)

    def test_dense_with_shared_layers(self):
        """E2B and E4B keep 0.8."""
        folder = gemma4("31b", text_only=True)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.num_kv_shared_layers = 20
        args = parse(other(config, "Gemma4ForCausalLM"))
        text_config = args.get_model_config().hf_text_config
        self.assertEqual(text_config.num_kv_shared_layers, 20)
        self.assertEqual(args.swa_full_tokens_ratio, 0.8)

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
                self.assertEqual(parse(other(config, arch)).swa_full_tokens_ratio, 0.8)
                args = parse(other(config, arch), "--swa-full-tokens-ratio", "0.15")
                self.assertEqual(args.swa_full_tokens_ratio, 0.15)
                for env in RELEASE_ENVS:
                    self.assertFalse(env.is_set(), env.name)

    def test_deepseek_v4(self):
        for given, taken in ((None, 0.1), (0.8, 0.8), (0.3, 0.3)):
            with self.subTest(given=given):
                args = ServerArgs(model_path="dummy", swa_full_tokens_ratio=given)
                apply_deepseek_v4_defaults(args, "DeepseekV4ForCausalLM")
                self.assertEqual(args.swa_full_tokens_ratio, taken)


class TestSetMeansSet(_Case):
    ratios = (0.05, 0.15, 0.5, 0.8, 1.0)

    def check(self, args, ratio, logs):
        self.assertEqual(args.swa_full_tokens_ratio, ratio)
        said = [x for x in logs.output if "swa_full_tokens_ratio" in x]
        self.assertEqual(len(said), 1, said)
        self.assertIn(f"Use swa_full_tokens_ratio={ratio} as set by the user", said[0])

    def each(self, build):
        for folder in (gemma4(), gemma4(text_only=True), gemma4("31b")):
            for ratio in self.ratios:
                with self.subTest(folder=folder, ratio=ratio):
                    with self.assertLogs(
                        "sglang.srt.server_args", logging.INFO
                    ) as logs:
                        args = build(folder, ratio)
                    self.check(args, ratio, logs)

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
            lambda folder, ratio: ServerArgs(
                model_path=folder, device="cpu", swa_full_tokens_ratio=ratio
            )
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
            return launch.call_args.kwargs["server_args"]

        self.each(build)

    def test_command_line_wins_over_config_file(self):
        config = Path(_folders.name) / "both.yaml"
        config.write_text("swa-full-tokens-ratio: 0.3\n")
        args = parse(
            gemma4(), "--config", str(config), "--swa-full-tokens-ratio", "0.8"
        )
        self.assertEqual(args.swa_full_tokens_ratio, 0.8)

    def test_resolved_value_is_kept(self):
        args = parse(gemma4())
        again = ServerArgs(
            model_path=gemma4(),
            device="cpu",
            swa_full_tokens_ratio=args.swa_full_tokens_ratio,
        )
        self.assertEqual(again.swa_full_tokens_ratio, 0.15)


class TestRefused(_Case):
    def test_command_line_and_config_file(self):
        config = Path(_folders.name) / "bad.yaml"
        for text in ("0", "0.0", "-0.1", "1.01", "8", "nan", "inf", "-inf", "half", ""):
            config.write_text(f'swa-full-tokens-ratio: "{text}"\n')
            for argv in (
                [f"--swa-full-tokens-ratio={text}"],
                ["--config", str(config)],
            ):
                with self.subTest(argv=argv, text=text):
                    error = io.StringIO()
                    with contextlib.redirect_stderr(error):
                        with self.assertRaises(SystemExit) as caught:
                            # Refused before the folder is looked at.
                            parse("/no/such/folder", *argv)
                    self.assertEqual(caught.exception.code, 2)
                    last = error.getvalue().strip().splitlines()[-1]
                    self.assertIn("argument --swa-full-tokens-ratio", last)

    def test_built_in_code(self):
        bad = (0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.5", True, [0.5])
        for ratio in bad:
            with self.subTest(ratio=ratio):
                with self.assertRaisesRegex(
                    ValueError,
                    r"--swa-full-tokens-ratio should be a number in \(0, 1\]",
                ):
                    ServerArgs(
                        model_path="/no/such/folder", swa_full_tokens_ratio=ratio
                    )

    def test_sentence(self):
        error = io.StringIO()
        with contextlib.redirect_stderr(error), self.assertRaises(SystemExit):
            parse("/no/such/folder", "--swa-full-tokens-ratio", "1.5")
        self.assertIn(
            "argument --swa-full-tokens-ratio: should be a number in (0, 1], "
            "but got '1.5'.",
            error.getvalue(),
        )


class TestWindowRelease(_Case):
    def test_on_by_default(self):
        for folder in (gemma4(), gemma4(text_only=True), gemma4("31b")):
            with self.subTest(folder=folder):
                for env in RELEASE_ENVS:
                    env.clear()
                parse(folder)
                self.assertIs(SPLIT_LEAF.get(), True)
                self.assertEqual(INTERVAL.get(), 0.125)

    def test_environment_is_kept(self):
        with SPLIT_LEAF.override("0"), INTERVAL.override("1.0"):
            parse(gemma4())
            self.assertIs(SPLIT_LEAF.get(), False)
            self.assertEqual(INTERVAL.get(), 1.0)

    def test_not_without_the_hybrid_pool(self):
        args = parse(gemma4(), "--disable-hybrid-swa-memory")
        self.assertFalse(args.get_model_config().is_hybrid_swa)
        for env in RELEASE_ENVS:
            self.assertFalse(env.is_set(), env.name)


class TestPoolSizes(_Case):
    def check(self, available_bytes, ratio, full, swa):
        args = parse(gemma4(), "--swa-full-tokens-ratio", str(ratio))
        config = solve(args, available_bytes)
        self.assertEqual(config.full_max_total_num_tokens, full)
        self.assertEqual(config.swa_max_total_num_tokens, swa)
        self.assertEqual(config.max_total_num_tokens, full)

    def test_b200(self):
        self.check(B200_KV_BYTES, 0.8, 593_956, 475_164)
        self.check(B200_KV_BYTES, 0.15, 2_138_243, 320_736)

    def test_h200(self):
        self.check(H200_KV_BYTES, 0.8, 403_559, 322_847)
        self.check(H200_KV_BYTES, 0.15, 1_452_813, 217_921)

    def test_default(self):
        config = solve(parse(gemma4()), H200_KV_BYTES)
        self.assertEqual(config.full_max_total_num_tokens, 1_452_813)
        self.assertEqual(config.swa_max_total_num_tokens, 217_921)

    def test_requests(self):
        """As many at 0.15 as at 0.8: a row of the context's length is kept for each."""
        for ratio in (0.15, 0.8):
            for context, requests in ((16_384, 4096), (131_072, 2048)):
                with self.subTest(ratio=ratio, context=context):
                    argv = ["--swa-full-tokens-ratio", str(ratio)]
                    argv += ["--context-length", str(context)]
                    config = solve(parse(gemma4(), *argv), H200_KV_BYTES)
                    self.assertEqual(config.max_running_requests, requests)
        for requests in (80, 4096):
            argv = ["--max-running-requests", str(requests)]
            config = solve(
                parse(gemma4(), *argv, "--context-length", "131072"), H200_KV_BYTES
            )
            self.assertEqual(config.max_running_requests, requests)

    def test_chunks_fit_the_pool(self):
        """Two of them beside a window of 1024 and one more, in whole pages."""
        for argv, page_size, chunk in (
            ([], 1, 8192),
            (["--max-total-tokens", "50000"], 1, 2726),
            (["--max-total-tokens", "50000"], 16, 2704),
            (["--max-total-tokens", "50000", "--chunked-prefill-size", "512"], 1, 512),
            (["--max-total-tokens", "50000", "--chunked-prefill-size", "-1"], 1, -1),
            (["--max-total-tokens", "10000"], 64, 64),
        ):
            with self.subTest(argv=argv, page_size=page_size):
                args = parse(gemma4(), "--chunked-prefill-size", "8192", *argv)
                solve(args, H200_KV_BYTES, page_size)
                self.assertEqual(args.chunked_prefill_size, chunk)

    def test_pool_smaller_than_a_window(self):
        args = parse(gemma4(), "--max-total-tokens", "6000")
        with self.assertRaisesRegex(ValueError, "SWA pool of 900 tokens is smaller"):
            solve(args, H200_KV_BYTES)

    def test_pools_fit_the_memory(self):
        for shape, full_bytes, swa_bytes in (
            ("26b-a4b", 20_480, 204_800),
            ("31b", 81_920, 819_200),
        ):
            for ratio in (0.05, 0.15, 0.5, 0.8, 1.0):
                for page_size in (1, 16, 64):
                    with self.subTest(shape=shape, ratio=ratio, page_size=page_size):
                        args = parse(
                            gemma4(shape), "--swa-full-tokens-ratio", str(ratio)
                        )
                        config = solve(args, H200_KV_BYTES, page_size)
                        full = config.full_max_total_num_tokens
                        swa = config.swa_max_total_num_tokens
                        used = full * full_bytes + swa * swa_bytes
                        self.assertLessEqual(used, H200_KV_BYTES)
                        page_bytes = page_size * (full_bytes + swa_bytes)
                        self.assertLess(H200_KV_BYTES - used, 2 * page_bytes)
                        self.assertEqual(full % page_size + swa % page_size, 0)


if __name__ == "__main__":
    unittest.main()
