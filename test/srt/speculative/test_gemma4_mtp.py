"""Gemma 4 with its MTP assistant over HTTP answers as transformers does, on the CPU.

The cases are those of the parity test: alone and together, with cached prefixes,
chunked prefill and retraction, each token transformers' own first choice in float32.
The assistant drafts the token before once more: right where an answer repeats itself,
wrong elsewhere, so that steps accept none, some and all of a draft.
"""

import importlib.util
import threading
import time
import unittest
from pathlib import Path

import requests
import torch
from safetensors.torch import load_file, save_file

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

TESTS = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "gemma4_parity", TESTS / "models" / "test_gemma4_parity.py"
)
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

from gemma4.checkpoint import write_checkpoint  # noqa: E402

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

STEPS = 3


def _make_copycat(folder: Path, target: Path):
    """Give the assistant's weights a purpose: its layers add nothing, and its head
    compares what it is fed, a projection of the last token's embedding, with that of
    every token."""
    embeddings = {
        name: weight
        for name, weight in load_file(target / "model.safetensors").items()
        if name.endswith("language_model.embed_tokens.weight")
    }
    (embed,) = embeddings.values()
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"]
    hidden, width = head.shape[1], embed.shape[1]
    project = torch.randn(hidden, width, generator=torch.Generator().manual_seed(0))
    dtype = head.dtype
    weights["model.embed_tokens.weight"] = (embed.float() @ project.T).to(dtype)
    weights["pre_projection.weight"] = torch.cat(
        [project, torch.zeros_like(project)], dim=1
    ).to(dtype)
    for name, weight in weights.items():
        if "post_attention_layernorm" in name or "post_feedforward" in name:
            weights[name] = torch.zeros_like(weight)
        elif name == "model.norm.weight":
            weights[name] = torch.ones_like(weight)
    save_file(weights, path, metadata={"format": "pt"})


def setUpModule():
    parity.setUpModule()
    draft = Path(parity.FOLDERS) / "draft"
    write_checkpoint(draft, assistant=True)
    _make_copycat(draft, Path(parity.FOLDERS) / "multimodal")


def tearDownModule():
    parity.tearDownModule()


class Drafting(parity.Served):
    """A server that drafts, in pools too small for all requests."""

    folder, dtype = "multimodal", "float32"
    draft_args = [
        *("--speculative-num-steps", str(STEPS)),
        *("--speculative-num-draft-tokens", str(STEPS + 1)),
        *("--speculative-eagle-topk", "1"),
    ]
    more_args = []

    @classmethod
    def setUpClass(cls):
        cls.server_args = [
            *parity.TIGHT_FULL,
            *("--speculative-algorithm", "NEXTN"),
            *("--speculative-draft-model-path", f"{parity.FOLDERS}/draft"),
            *cls.draft_args,
            *cls.more_args,
        ]
        cls.accepted = set()
        super().setUpClass()

    def generate(self, *args, **kwargs):
        answers = super().generate(*args, **kwargs)
        for answer in answers if isinstance(answers, list) else [answers]:
            histogram = answer["meta_info"].get("spec_correct_drafts_histogram", [])
            type(self).accepted |= {n for n, count in enumerate(histogram) if count}
        return answers


class DraftingParity(Drafting, parity.Parity):
    """The cases of the parity test, and some of drafts."""

    def test_prefix_cache_hit(self):
        """As there, but the cache of a server that drafts knows pairs of tokens, and
        so one token fewer of a sequence."""
        start = parity._prompt(3 * parity.WINDOW, seed=2)
        self.generate(start, new_tokens=1)
        prompt = start + parity._prompt(6, seed=3)[1:]
        answer = self.generate(prompt)
        self.assertGreaterEqual(answer["meta_info"]["cached_tokens"], len(start) - 1)
        self.check("5 tokens after a cached prefix", prompt, answer)

    def test_continued_answer(self):
        prompt = parity._prompt(parity.WINDOW, seed=4)
        answer = self.generate(prompt)
        self.check("first turn", prompt, answer)
        prompt = prompt + answer["output_ids"] + parity._prompt(8, seed=5)[1:]
        answer = self.generate(prompt)
        # Neither the last token of an answer nor the last pair is in the cache.
        cached = answer["meta_info"]["cached_tokens"]
        self.assertGreaterEqual(cached, parity.WINDOW + parity.NEW_TOKENS - 2)
        self.check("second turn", prompt, answer)

    def test_zz_steps_accept_none_some_and_all(self):
        self.assertIn(0, self.accepted)
        self.assertIn(STEPS, self.accepted)

    def test_a_request_while_the_last_one_finishes(self):
        """Each request ends in its first verify step, while the next one arrives."""
        prompt = parity._prompt(5, seed=6)
        answer = self.generate(prompt)
        self.check("alone", prompt, answer)
        answers = [None] * 40

        def ask(i):
            # At first several in a step, at last one in many.
            time.sleep(0.001 * i * i)
            answers[i] = self.generate(prompt, new_tokens=2)["output_ids"]

        threads = [threading.Thread(target=ask, args=[i]) for i in range(len(answers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(answers, [answer["output_ids"][:2]] * len(answers))

    def test_stop_within_an_accepted_run(self):
        prompt = parity._prompt(5)
        tokens = self.generate(prompt)["output_ids"]
        repeated = next(b for a, b in zip(tokens, tokens[1:]) if a == b)
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": parity.NEW_TOKENS,
                    "stop_token_ids": [repeated],
                },
            },
            timeout=60,
        )
        # Its second, which the first was drafted with, is not answered.
        end = tokens.index(repeated) + 1
        self.assertEqual(response.json()["output_ids"], tokens[:end])


class TestMTPFloat32Tight(DraftingParity, CustomTestCase):
    """With the overlap scheduler, which is the default."""


if __name__ == "__main__":
    unittest.main()
