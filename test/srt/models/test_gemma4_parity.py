"""Gemma 4 over HTTP answers as transformers does, on the CPU engine, and in bfloat16 on
a GPU where there is one.

Every server answers greedy requests of 64 tokens; transformers then scores prompt and
answer in one forward pass without a KV cache. In float32 each answered token must be
transformers' own first choice, and each returned logprob equal to within 1e-3. In
bfloat16, where two correct implementations break near ties differently, each token must
be within the tolerance of the first choice, and each logprob within 3e-2.
"""

import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import requests
import torch
import transformers

from sglang.srt.utils import kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci
from sglang.test.test_utils import (
    CustomTestCase,
    find_available_port,
    popen_launch_server,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import BOS, FIRST_TEXT_TOKEN, SHAPES, write_checkpoint

register_cpu_ci(est_time=240, suite="stage-a-test-cpu")
register_cuda_ci(est_time=240, suite="stage-b-test-1-gpu-small")

TINY = SHAPES["tiny"].text
WINDOW = TINY["sliding_window"]
LENGTHS = (1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 4 * WINDOW)
NEW_TOKENS = 64
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}

# Prompts are chunked within the window and across it, eight requests do not fit one of
# the two pools, and all are admitted nevertheless, so that decoding has to retract some.
CHUNKED = ["--chunked-prefill-size", "24", "--schedule-conservativeness", "0"]
TIGHT_SWA = [*CHUNKED, "--max-total-tokens", "1200"]
TIGHT_FULL = [
    *(*CHUNKED, "--max-total-tokens", "480"),
    *("--swa-full-tokens-ratio", "0.8"),
]
ROOMY = ["--max-total-tokens", "8192"]

CUDA = torch.cuda.is_available()
GPU_ARGS = ["--attention-backend", "triton", "--sampling-backend", "pytorch"]
GPU_ARGS += ["--mem-fraction-static", "0.3", "--cuda-graph-max-bs-decode", "8"]


def _prompt(length: int, seed: int = 0) -> list:
    """`<bos>` and `length - 1` random text tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    high = min(SHAPES["tiny"].multimodal_ids.values())
    text = torch.randint(FIRST_TEXT_TOKEN, high, (length - 1,), generator=generator)
    return [BOS] + text.tolist()


def setUpModule():
    global FOLDERS, THREADS
    # Operations of a tiny model take less time than threads take to meet.
    THREADS = torch.get_num_threads()
    torch.set_num_threads(1)
    FOLDERS = tempfile.mkdtemp(prefix="gemma4-parity-")
    write_checkpoint(f"{FOLDERS}/multimodal")
    write_checkpoint(f"{FOLDERS}/text", text_only=True)


def tearDownModule():
    torch.set_num_threads(THREADS)
    shutil.rmtree(FOLDERS)


class Served:
    """A server, and transformers to compare it with; a subclass names the folder, the
    dtype and the server's arguments."""

    folder: str
    dtype: str
    server_args: list
    variables = {}
    tolerance = TOLERANCE

    @classmethod
    def path(cls) -> str:
        """The checkpoint folder."""
        return f"{FOLDERS}/{cls.folder}"

    @classmethod
    def oracle_path(cls) -> str:
        """That of the same weights for transformers."""
        return cls.path()

    @classmethod
    def setUpClass(cls):
        path, oracle_path = cls.path(), cls.oracle_path()
        config = json.loads(Path(oracle_path, "config.json").read_text())
        model_class = getattr(transformers, config["architectures"][0])
        cls.oracle = model_class.from_pretrained(
            oracle_path,
            dtype=getattr(torch, cls.dtype),
            attn_implementation="eager",
            experts_implementation="eager",
        ).eval()
        cls.process = None
        cls.base_url = f"http://127.0.0.1:{find_available_port(21000)}"
        # The `sglang` of the interpreter that runs the test.
        path_variable = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
        env = {"PATH": os.pathsep.join(path_variable), "OMP_NUM_THREADS": "1"}
        env.update(cls.variables)
        device = "cuda" if CUDA and cls.dtype == "bfloat16" else "cpu"
        if device == "cpu":
            env.update(SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="")
        cls.process = popen_launch_server(
            path,
            cls.base_url,
            timeout=300,
            device=device,
            other_args=[
                *("--device", device),
                *("--dtype", cls.dtype),
                *cls.server_args,
                *(GPU_ARGS if device == "cuda" else []),
                "--skip-server-warmup",
                # Leave the cores to transformers while it computes.
                "--sleep-on-idle",
            ],
            env=env,
        )

    @classmethod
    def tearDownClass(cls):
        if cls.process is not None:
            kill_process_tree(cls.process.pid)
            cls.process.wait()

    def setUp(self):
        response = requests.post(f"{self.base_url}/flush_cache", timeout=60)
        self.assertEqual(response.status_code, 200, response.text)

    def generate(self, prompts, new_tokens=NEW_TOKENS, logprob_start_len=-1) -> list:
        """Send the prompts in one request; returns one answer a prompt."""
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": prompts,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                },
                "return_logprob": True,
                "logprob_start_len": logprob_start_len,
            },
            timeout=300,
        )
        self.assertEqual(response.status_code, 200, response.text)
        return response.json()

    @torch.inference_mode()
    def check(self, name, prompt, answer):
        """Compare an answer with transformers, and say where they part."""
        tokens, meta = answer["output_ids"], answer["meta_info"]
        self.assertEqual(len(tokens), NEW_TOKENS, name)
        logits = self.oracle(input_ids=torch.tensor([prompt + tokens])).logits[0, :-1]
        suppressed = self.oracle.generation_config.suppress_tokens or []
        logits[len(prompt) - 1 :, suppressed] = float("-inf")
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        tolerance = self.tolerance[self.dtype]

        best, choice = logprobs[len(prompt) - 1 :].max(dim=-1)
        chosen = torch.tensor(tokens)
        of_chosen = logprobs[len(prompt) - 1 :].gather(1, chosen[:, None])[:, 0]
        wrong = (
            choice != chosen
            if self.dtype == "float32"
            else best - of_chosen > tolerance
        )
        if wrong.any():
            i = wrong.nonzero()[0].item()
            self.fail(
                f"{name}: {wrong.sum()} of {len(tokens)} tokens differ, the first at "
                f"output {i} (position {len(prompt) + i}): served {tokens[i]}, "
                f"transformers chooses {choice[i]} and finds the served token "
                f"{best[i] - of_chosen[i]:.2e} less likely.\n"
                f"served       {tokens[max(0, i - 3) : i + 5]}\n"
                f"transformers {choice[max(0, i - 3) : i + 5].tolist()}"
            )

        entries = meta["input_token_logprobs"] + meta["output_token_logprobs"]
        entries = [entry for entry in entries if entry[0] is not None]
        served = torch.tensor([entry[0] for entry in entries])
        ids = torch.tensor([entry[1] for entry in entries])
        first = len(prompt) + len(tokens) - len(entries)
        self.assertEqual(ids.tolist(), (prompt + tokens)[first:], name)
        expected = logprobs[first - 1 :].gather(1, ids[:, None])[:, 0]
        difference = (served - expected).abs()
        if difference.isnan().any() or difference.max() > tolerance:
            far = (difference <= tolerance).logical_not().nonzero()[:, 0]
            worst, i = difference.argmax().item(), far[0].item()
            self.fail(
                f"{name}: {len(far)} of {len(entries)} logprobs differ by more than "
                f"{tolerance}, the first at position {first + i} (served "
                f"{served[i]:.5f}, transformers {expected[i]:.5f}), the most at "
                f"{first + worst} by {difference[worst]:.2e}."
            )


class Parity(Served):
    """The cases."""

    def test_alone(self):
        for length in LENGTHS:
            with self.subTest(length=length):
                prompt = _prompt(length)
                answer = self.generate(prompt, logprob_start_len=0)
                self.assertEqual(
                    len(answer["meta_info"]["input_token_logprobs"]), length
                )
                self.check(f"prompt of {length} tokens", prompt, answer)

    def test_eight_at_once(self):
        prompts = [_prompt(n, seed=1) for n in (*LENGTHS, 2 * WINDOW, WINDOW // 2)]
        answers = self.generate(prompts)
        retractions = [a["meta_info"]["num_retractions"] for a in answers]
        if self.server_args is ROOMY:
            self.assertEqual(sum(retractions), 0)
        else:
            self.assertGreater(sum(retractions), 0)
        for prompt, answer, n in zip(prompts, answers, retractions):
            with self.subTest(length=len(prompt)):
                self.check(
                    f"prompt of {len(prompt)} tokens, retracted {n} times",
                    prompt,
                    answer,
                )

    def test_prefix_cache_hit(self):
        start = _prompt(3 * WINDOW, seed=2)
        self.generate(start, new_tokens=1)
        for length in (1, 5, WINDOW + 1):
            with self.subTest(new=length):
                prompt = start + _prompt(length + 1, seed=3)[1:]
                answer = self.generate(prompt)
                self.assertGreaterEqual(
                    answer["meta_info"]["cached_tokens"], len(start)
                )
                self.check(f"{length} tokens after a cached prefix", prompt, answer)

    def test_continued_answer(self):
        prompt = _prompt(WINDOW, seed=4)
        answer = self.generate(prompt)
        self.check("first turn", prompt, answer)
        prompt = prompt + answer["output_ids"] + _prompt(8, seed=5)[1:]
        answer = self.generate(prompt)
        # The last token of an answer has no KV yet.
        self.assertGreaterEqual(
            answer["meta_info"]["cached_tokens"], WINDOW + NEW_TOKENS - 1
        )
        self.check("second turn", prompt, answer)


class TestFloat32(Parity, CustomTestCase):
    folder, dtype, server_args = "multimodal", "float32", ROOMY


class TestFloat32Tight(Parity, CustomTestCase):
    folder, dtype, server_args = "multimodal", "float32", TIGHT_SWA


class TestBFloat16Tight(Parity, CustomTestCase):
    folder, dtype, server_args = "multimodal", "bfloat16", TIGHT_FULL


@pytest.mark.gpu
@unittest.skipUnless(CUDA, "what is compiled are the GPU's paths")
class TestBFloat16Compiled(Parity, CustomTestCase):
    """--enable-torch-compile takes other paths of the norms."""

    folder, dtype = "multimodal", "bfloat16"
    server_args = [*TIGHT_FULL, "--enable-torch-compile", "--torch-compile-max-bs", "8"]
    # The default tries many tiles of each product, which takes minutes.
    variables = {"SGLANG_TORCH_COMPILE_MODE": "default"}


class TestTextOnlyFloat32Tight(Parity, CustomTestCase):
    folder, dtype, server_args = "text", "float32", TIGHT_FULL


class TestTextOnlyBFloat16Tight(Parity, CustomTestCase):
    folder, dtype, server_args = "text", "bfloat16", TIGHT_SWA


if __name__ == "__main__":
    unittest.main()
