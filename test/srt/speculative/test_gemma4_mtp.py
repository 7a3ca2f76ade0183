"""Gemma 4 with its MTP assistant over HTTP answers as transformers does, on the CPU.

The cases are those of the parity test: alone and together, with cached prefixes,
chunked prefill and retraction, each token transformers' own first choice in float32.
The assistant drafts the token before once more: right where an answer repeats itself,
wrong elsewhere, so that steps accept none, some and all of a draft.
"""

import importlib.util
import os
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import requests
import torch
from safetensors.torch import load_file, save_file

from sglang.srt.configs.gemma4_assistant import Gemma4AssistantConfig
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.eagle_utils import (
    build_tree_kernel_efficient,
    verify_tree_greedy_func,
)
from sglang.srt.speculative.frozen_kv_mtp_worker import FrozenKVMTPWorker
from sglang.srt.speculative.frozen_kv_mtp_worker_v2 import FrozenKVMTPWorkerV2
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.utils.hf_transformers_utils import get_config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

TESTS = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location(
    "gemma4_parity", TESTS / "models" / "test_gemma4_parity.py"
)
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

from checkpoint import write_checkpoint  # noqa: E402

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


def server_args() -> list:
    """Of a server that drafts, in pools too small for all requests."""
    return [
        *parity.TIGHT_FULL,
        *("--speculative-algorithm", "NEXTN"),
        *("--speculative-draft-model-path", f"{parity.FOLDERS}/draft"),
        *("--speculative-num-steps", str(STEPS)),
        *("--speculative-num-draft-tokens", str(STEPS + 1)),
        *("--speculative-eagle-topk", "1"),
    ]


class TestMTPFloat32Tight(parity.Parity, CustomTestCase):
    folder, dtype = "multimodal", "float32"

    @classmethod
    def setUpClass(cls):
        cls.server_args = server_args()
        cls.accepted = set()
        super().setUpClass()

    def generate(self, *args, **kwargs):
        answers = super().generate(*args, **kwargs)
        for answer in answers if isinstance(answers, list) else [answers]:
            histogram = answer["meta_info"].get("spec_accept_histogram", [])
            type(self).accepted |= {n for n, count in enumerate(histogram) if count}
        return answers

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


class TestStart(CustomTestCase):
    def test_config_of_the_assistant(self):
        config = get_config(f"{parity.FOLDERS}/draft", trust_remote_code=False)
        self.assertIsInstance(config, Gemma4AssistantConfig)
        self.assertEqual(config.text_config.num_hidden_layers, 4)
        self.assertEqual(config.backbone_hidden_size, parity.TINY["hidden_size"])

    def test_max_running_requests_follow_the_graphs(self):
        for given, graphs, expected in ((None, 256, 256), (None, 8, 48), (7, 256, 7)):
            with mock.patch.object(ServerArgs, "__post_init__", lambda self: None):
                args = ServerArgs(model_path="target", max_running_requests=given)
            args.speculative_algorithm = "NEXTN"
            args.speculative_draft_model_path = f"{parity.FOLDERS}/draft"
            args.cuda_graph_max_bs = graphs
            args._handle_speculative_decoding()
            self.assertEqual(args.max_running_requests, expected)

    def test_chains_overlap_with_the_scheduler(self):
        """Drafts with branches wait for each step (spec v1), as does what needs the
        host to know the lengths or what was accepted, or the draft's hidden states."""
        chain = dict(steps=3, topk=1, tokens=4)
        for changed, overlaps in (
            ({}, True),
            (dict(steps=None, topk=None, tokens=None), True),
            (dict(steps=1, tokens=2), True),
            (dict(tokens=3), True),
            (dict(tokens=None), True),
            (dict(topk=2, tokens=5), False),
            (dict(dp=True), False),
            (dict(env="0"), False),
            (dict(disaggregation="prefill"), False),
            (dict(backend="triton"), True),
            (dict(backend="fa3"), False),
            (dict(backend="triton", decode="flashinfer"), False),
            (dict(backend="triton", draft="flashinfer"), False),
            (dict(processor=True), False),
            (dict(hidden_states=True), False),
        ):
            given = {**chain, **changed}
            with mock.patch.object(ServerArgs, "__post_init__", lambda self: None):
                args = ServerArgs(
                    model_path="target",
                    speculative_algorithm="NEXTN",
                    speculative_draft_model_path=f"{parity.FOLDERS}/draft",
                    speculative_num_steps=given["steps"],
                    speculative_eagle_topk=given["topk"],
                    speculative_num_draft_tokens=given["tokens"],
                    enable_dp_attention=given.get("dp", False),
                    disaggregation_mode=given.get("disaggregation", "null"),
                    attention_backend=given.get("backend"),
                    decode_attention_backend=given.get("decode"),
                    speculative_draft_attention_backend=given.get("draft"),
                    enable_custom_logit_processor=given.get("processor", False),
                    enable_return_hidden_states=given.get("hidden_states", False),
                )
            env = {"SGLANG_ENABLE_SPEC_V2": given.get("env", "1")}
            with mock.patch.dict(os.environ, env):
                args._handle_speculative_decoding()
            with self.subTest(**changed):
                self.assertEqual(args.disable_overlap_schedule, not overlaps)
                if args.speculative_eagle_topk == 1:
                    steps = given["steps"] or 3
                    self.assertEqual(args.speculative_num_steps, steps)
                    self.assertEqual(args.speculative_num_draft_tokens, steps + 1)
                worker = SpeculativeAlgorithm.FROZEN_KV_MTP.create_worker(args)
                expected = FrozenKVMTPWorkerV2 if overlaps else FrozenKVMTPWorker
                self.assertIs(worker, expected)


class TestNativeTree(CustomTestCase):
    """The CPU's tree and its verification, on a tree that was drawn by hand.

        0 (bonus) -> 1, 2;  1 -> 3, 4;  2 -> 5

    Candidates are numbered as two drafts of topk = 2: 0, 1 first, then 2, 3 from the
    first of these and 4, 5 from the second.
    """

    def test_by_hand(self):
        seq_len, num = 3, 6
        parents = torch.tensor([[-1, 0, 1]])
        selected = torch.tensor([[0, 1, 2, 3, 4]])
        tokens = torch.tensor([[11, 12, 13, 14, 15]])
        mask, positions, index, child, sibling, draft = build_tree_kernel_efficient(
            torch.tensor([10]),
            parents,
            selected,
            tokens,
            torch.tensor([seq_len]),
            seq_len,
            2,
            2,
            num,
        )
        sees = mask.view(num, seq_len + num)
        self.assertTrue(sees[:, :seq_len].all())
        expected = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 2, 5}]
        got = [set(row.nonzero()[:, 0].tolist()) for row in sees[:, seq_len:]]
        self.assertEqual(got, expected)
        self.assertEqual(positions.tolist(), [3, 4, 4, 5, 5, 5])
        self.assertEqual(draft.tolist(), [10, 11, 12, 13, 14, 15])

        for predicted, path in (
            ([12, 0, 15, 0, 0, 9], [0, 2, 5]),
            ([11, 14, 0, 0, 7, 0], [0, 1, 4]),
            ([99, 0, 0, 0, 0, 0], [0]),
        ):
            predicts = torch.full((num + 1,), -1, dtype=torch.int32)
            accept = torch.full((1, 3), -1, dtype=torch.int32)
            count = torch.empty(1, dtype=torch.int32)
            verify_tree_greedy_func(
                predicts,
                accept,
                count,
                draft.view(1, num),
                index,
                child,
                sibling,
                torch.tensor([predicted]),
                topk=2,
            )
            self.assertEqual(accept[0][accept[0] >= 0].tolist(), path)
            self.assertEqual(count.item(), len(path) - 1)
            for node in path:
                self.assertEqual(predicts[node].item(), predicted[node])


if __name__ == "__main__":
    unittest.main()
