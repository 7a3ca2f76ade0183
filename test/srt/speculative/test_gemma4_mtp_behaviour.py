"""What a server with Gemma 4's MTP assistant does beside answering, on the CPU.

Aborts while drafting, ends within an accepted run (by length, by a stop string, at the
end of the context), grammars, logprobs of accepted tokens, and many requests in pools
too small for them. The oracle is transformers in float32, under a grammar with the
tokens masked that the grammar does not allow. The server checks its pools whenever it
is idle, and dies of a slot that is neither free nor in the cache.
"""

import importlib.util
import json
import re
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch
import xgrammar
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

spec = importlib.util.spec_from_file_location(
    "gemma4_mtp", Path(__file__).with_name("test_gemma4_mtp.py")
)
mtp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mtp)
parity = mtp.parity

from gemma4.checkpoint import EOS, TOOL_RESPONSE, TURN_END  # noqa: E402

register_cpu_ci(est_time=50, suite="stage-a-test-cpu")

CONTEXT = 224
# Of the hidden state in what the assistant is fed, the rest is the last token.
HIDDEN_SHARE = 0.1
END_TOKENS = [EOS, TURN_END, TOOL_RESPONSE]
REGEX = "(ab){8}[0-9]{6}(xxxx|yyyy){3}z*"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,12}$"},
            "known": {"type": "boolean"},
            "sizes": {
                "type": "array",
                "items": {"type": "string", "pattern": "^0{8}[0-9]{2}$"},
                "minItems": 2,
                "maxItems": 3,
            },
        },
        "required": ["name", "known", "sizes"],
        "additionalProperties": False,
    }
)


def setUpModule():
    mtp.setUpModule()
    # The copycat knows the last token alone; here it is fed the hidden state, too.
    path = Path(parity.FOLDERS) / "draft" / "model.safetensors"
    weights = load_file(path)
    project = weights["pre_projection.weight"]
    half = project.shape[1] // 2
    project[:, half:] = HIDDEN_SHARE * project[:, :half]
    save_file(weights, path, metadata={"format": "pt"})


def tearDownModule():
    mtp.tearDownModule()


class TestMTPBehaviour(mtp.Drafting, CustomTestCase):
    more_args = [
        *("--context-length", str(CONTEXT)),
        "--constrained-json-disable-any-whitespace",
    ]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tokenizer = AutoTokenizer.from_pretrained(f"{parity.FOLDERS}/{cls.folder}")
        compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo.from_huggingface(
                cls.tokenizer,
                vocab_size=parity.TINY["vocab_size"],
                stop_token_ids=END_TOKENS,
            )
        )
        cls.grammars = {
            "regex": compiler.compile_regex(REGEX),
            "json_schema": compiler.compile_json_schema(SCHEMA, any_whitespace=False),
        }

    def ask(self, prompt, stream=False, **sampling_params):
        """Send one request; returns its answer, or the response that streams it."""
        top_level = {
            key: sampling_params.pop(key)
            for key in (
                *("rid", "return_logprob", "top_logprobs_num"),
                "token_ids_logprob",
            )
            if key in sampling_params
        }
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": parity.NEW_TOKENS,
                    "ignore_eos": True,
                    **sampling_params,
                },
                "stream": stream,
                **top_level,
            },
            stream=stream,
            timeout=600,
        )
        self.assertEqual(response.status_code, 200, response.text if not stream else "")
        return response if stream else response.json()

    def idle(self) -> dict:
        """Wait until no request runs; returns the load, counts of requests and tokens."""
        for _ in range(1200):
            self.assertIsNone(self.process.poll(), "the server died, see its log")
            response = requests.get(f"{self.base_url}/v1/loads", timeout=60)
            self.assertEqual(response.status_code, 200, response.text)
            (load,) = response.json()["loads"]
            if load["num_running_reqs"] == load["num_waiting_reqs"] == 0:
                return load
            time.sleep(0.05)
        self.fail(f"requests still run: {load}")

    def setUp(self):
        """The cache is kept from one test to the next, for prefixes to be hit."""

    def tearDown(self):
        # Nothing but the cache holds a token.
        self.assertEqual(self.idle()["num_used_tokens"], 0)

    def all_at_once(self, *calls) -> list:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(c) for c in calls]]

    @staticmethod
    def chunks(response):
        """What a streamed answer holds so far, after each step."""
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line[len(b"data: ") :])

    def aborted(self, prompt, rid, **sampling_params) -> dict:
        """Abort a request behind its first tokens; returns what it answered."""
        response = self.ask(prompt, stream=True, rid=rid, **sampling_params)
        aborted = False
        for chunk in self.chunks(response):
            if not aborted and chunk["meta_info"]["completion_tokens"] > 1:
                sent = requests.post(
                    f"{self.base_url}/abort_request", json={"rid": rid}, timeout=60
                )
                self.assertEqual(sent.status_code, 200, sent.text)
                aborted = True
        self.assertEqual(chunk["meta_info"]["finish_reason"]["type"], "abort")
        return chunk

    @torch.inference_mode()
    def check_constrained(self, kind, prompt, answer):
        """Each token is the first choice among those the grammar allows there."""
        tokens, grammar = answer["output_ids"], self.grammars[kind]
        logits = self.oracle(input_ids=torch.tensor([prompt + tokens])).logits[0]
        logits = logits[len(prompt) - 1 : -1].float()
        matcher = xgrammar.GrammarMatcher(grammar)
        mask = xgrammar.allocate_token_bitmask(len(tokens), logits.shape[-1])
        for i, token in enumerate(tokens):
            matcher.fill_next_token_bitmask(mask, i)
            self.assertTrue(matcher.accept_token(token), f"{kind}: output {i}")
        xgrammar.apply_token_bitmask_inplace(logits, mask)
        self.assertEqual(logits.argmax(dim=-1).tolist(), tokens)

        self.assertEqual(answer["meta_info"]["finish_reason"]["type"], "stop")
        self.assertIn(tokens[-1], END_TOKENS)
        if kind == "regex":
            self.assertIsNotNone(re.fullmatch(REGEX, answer["text"]), answer["text"])
        else:
            value = json.loads(answer["text"])
            self.assertEqual(list(value), ["name", "known", "sizes"])

    def constrained(self, kind, prompt, **kwargs):
        patterns = {"regex": REGEX, "json_schema": SCHEMA}
        return self.ask(
            prompt,
            max_new_tokens=150,
            ignore_eos=False,
            **{kind: patterns[kind]},
            **kwargs,
        )

    def test_grammar(self):
        drafted = []
        for kind in self.grammars:
            for length in (1, 5, parity.WINDOW + 1):
                with self.subTest(kind=kind, length=length):
                    prompt = parity._prompt(length, seed=20)
                    answer = self.constrained(kind, prompt)
                    self.check_constrained(kind, prompt, answer)
                    drafted += answer["meta_info"]["spec_correct_drafts_histogram"][1:]
        self.assertGreater(sum(drafted), 0, "no draft was accepted under a grammar")

    def test_grammar_beside_others(self):
        """Some with a grammar, some without, some of both end before their time."""
        prompts = [parity._prompt(4 + i, seed=21) for i in range(9)]
        kinds = ["regex", "json_schema", None] * 3

        def call(i):
            if kinds[i] is None:
                return self.ask(prompts[i], return_logprob=True)
            return self.constrained(kinds[i], prompts[i])

        def aborted():
            prompt = parity._prompt(7, seed=22)
            self.aborted(prompt, "cut", regex="(ab){99}", max_new_tokens=150)

        calls = [lambda i=i: call(i) for i in range(len(prompts))]
        answers = self.all_at_once(*calls, aborted)
        for kind, prompt, answer in zip(kinds, prompts, answers):
            if kind is None:
                self.check("beside a grammar", prompt, answer)
            else:
                self.check_constrained(kind, prompt, answer)

    def test_abort_while_drafting(self):
        prompts = [parity._prompt(9 + i, seed=23) for i in range(4)]

        def disconnected(i):
            response = self.ask(prompts[i], stream=True, max_new_tokens=100)
            for chunk in self.chunks(response):
                if chunk["meta_info"]["completion_tokens"] > 1:
                    break
            response.close()
            return chunk

        def undisturbed(i):
            return self.ask(prompts[i], max_new_tokens=100)

        answers = self.all_at_once(
            lambda: self.aborted(prompts[0], "first", max_new_tokens=100),
            lambda: disconnected(1),
            lambda: undisturbed(2),
            lambda: self.aborted(prompts[3], "last", max_new_tokens=100),
        )
        expected = self.all_at_once(*(lambda i=i: undisturbed(i) for i in range(4)))
        for i, answer in enumerate(answers):
            tokens = answer["output_ids"]
            self.assertEqual(tokens, expected[i]["output_ids"][: len(tokens)])
            self.assertEqual(len(tokens) == 100, i == 2)

    def test_length_within_an_accepted_run(self):
        prompt = parity._prompt(5, seed=6)
        expected = self.ask(prompt)["output_ids"]
        within = 0
        answers = self.all_at_once(
            *(lambda n=n: self.ask(prompt, max_new_tokens=n) for n in range(1, 25))
        )
        for n, answer in enumerate(answers, 1):
            meta = answer["meta_info"]
            self.assertEqual(answer["output_ids"], expected[:n])
            self.assertEqual(meta["completion_tokens"], n)
            self.assertEqual(meta["finish_reason"], {"type": "length", "length": n})
            verified = sum(
                count * (1 + drafts)
                for drafts, count in enumerate(
                    meta.get("spec_correct_drafts_histogram", [])
                )
            )
            within += 1 + verified > n
        self.assertGreater(within, 0)

    def test_stop_strings(self):
        prompt = parity._prompt(5, seed=24)
        whole = self.ask(prompt)
        text, tokens = whole["text"], whole["output_ids"]
        words = text.split()
        stops = sorted({word for word in words if len(word) > 1}, key=words.index)[:12]
        self.assertGreater(len(stops), 4)
        answers = self.all_at_once(
            *(lambda stop=stop: self.ask(prompt, stop=stop) for stop in stops)
        )
        for stop, answer in zip(stops, answers):
            with self.subTest(stop=stop):
                self.assertEqual(answer["text"], text[: text.index(stop)])
                self.assertEqual(
                    answer["meta_info"]["finish_reason"],
                    {"type": "stop", "matched": stop},
                )
                got = answer["output_ids"]
                self.assertEqual(got, tokens[: len(got)])
                # As many tokens as it takes to hold the stop string.
                self.assertIn(stop, self.tokenizer.decode(got))
                self.assertNotIn(stop, self.tokenizer.decode(got[:-1]))

    def test_end_of_the_context(self):
        prompts = [parity._prompt(n, seed=25) for n in (CONTEXT - 9, 100, CONTEXT - 60)]
        answers = self.all_at_once(
            *(lambda p=p: self.ask(p, max_new_tokens=None) for p in prompts)
        )
        for prompt, answer in zip(prompts, answers):
            tokens = answer["output_ids"]
            # Not every scheduler uses the last two positions of the context.
            self.assertIn(len(prompt) + len(tokens), (CONTEXT - 2, CONTEXT))
            self.assertEqual(answer["meta_info"]["finish_reason"]["type"], "length")
            with torch.inference_mode():
                logits = self.oracle(input_ids=torch.tensor([prompt + tokens])).logits
            best = logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
            self.assertEqual(best.tolist(), tokens)

    @torch.inference_mode()
    def test_logprobs_of_accepted_tokens(self):
        """Some in a batch ask for them, some for the best four of each place."""
        prompts = [parity._prompt(6 + i, seed=26) for i in range(4)]
        wanted = (
            {},
            {"return_logprob": True},
            {"return_logprob": True, "top_logprobs_num": 4},
            {},
        )
        answers = self.all_at_once(
            *(lambda p=p, w=w: self.ask(p, **w) for p, w in zip(prompts, wanted))
        )
        self.check("logprobs", prompts[1], answers[1])
        self.check("best four", prompts[2], answers[2])
        accepted = answers[2]["meta_info"]["spec_correct_drafts_histogram"][1:]
        self.assertGreater(sum(accepted), 0)
        sequence = prompts[2] + answers[2]["output_ids"]
        logits = self.oracle(input_ids=torch.tensor([sequence])).logits[0, :-1]
        best = torch.log_softmax(logits.float(), dim=-1)[len(prompts[2]) - 1 :].topk(4)
        served = answers[2]["meta_info"]["output_top_logprobs"]
        ids = torch.tensor([[entry[1] for entry in place] for place in served])
        values = torch.tensor([[entry[0] for entry in place] for place in served])
        self.assertEqual(ids.tolist(), best.indices.tolist())
        self.assertLess((values - best.values).abs().max().item(), 1e-3)

    def test_logprobs_of_given_tokens(self):
        """One in a batch asks for those of two tokens, one for its own tokens' alone."""
        prompts = [parity._prompt(n, seed=27) for n in (6, 9)]
        wanted = ({"token_ids_logprob": [7, 5]}, {})
        answers = self.all_at_once(
            *(
                lambda p=p, w=w: self.ask(p, return_logprob=True, **w)
                for p, w in zip(prompts, wanted)
            )
        )
        for prompt, answer in zip(prompts, answers):
            self.check("given tokens", prompt, answer)
        sequence = prompts[0] + answers[0]["output_ids"]
        logits = self.oracle(input_ids=torch.tensor([sequence])).logits[0, :-1]
        expected = torch.log_softmax(logits.float(), -1)[len(prompts[0]) - 1 :, [7, 5]]
        served = answers[0]["meta_info"]["output_token_ids_logprobs"]
        values = torch.tensor([[entry[0] for entry in place] for place in served])
        self.assertLess((values - expected).abs().max().item(), 1e-3)

    def test_more_requests_than_fit(self):
        """Shared prefixes, retraction, and each third one aborted."""
        start = parity._prompt(parity.WINDOW + 5, seed=27)
        prompts = [
            start[: 8 + 3 * i] + parity._prompt(10, seed=28 + i)[1:] for i in range(18)
        ]

        # A request that ignores the end of text is admitted with room for all of its
        # answer. None of these chooses to end.
        def call(i):
            if i % 3 == 0:
                return self.aborted(prompts[i], f"many-{i}", ignore_eos=False)
            return self.ask(prompts[i], return_logprob=True, ignore_eos=False)

        answers = self.all_at_once(*(lambda i=i: call(i) for i in range(len(prompts))))
        retractions = 0
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            if i % 3:
                self.check(f"request {i}", prompt, answer)
                retractions += answer["meta_info"]["num_retractions"]
        self.assertGreater(retractions, 0)

    def test_zz_all_of_the_pools_is_free(self):
        """A prompt fits that takes as much of the context as there is."""
        prompt = parity._prompt(CONTEXT - 12, seed=30)
        answer = self.ask(prompt, max_new_tokens=8)
        self.assertEqual(len(answer["output_ids"]), 8)


if __name__ == "__main__":
    unittest.main()
