"""Gemma 4 answers prompts with pictures as transformers does, on the CPU engine.

Small models of 26B-A4B, 31B and 12B, in which the tokens of a picture see each other in
the layers with a sliding window, and of E2B, which is causal, are served in float32. A
picture takes up to 70 tokens, more than the window's 32. Each answered token must be
transformers' own first choice, and each logprob equal to within 1e-5; transformers
scores prompt and answer in one forward pass without a KV cache.

The masks are those of `create_masks_for_generate`, whichever way transformers itself
takes: they are Gemma's own (huggingface/transformers#46711). Up to transformers 5.19 the
forward pass of 12B still lets a picture see itself in full layers and beyond the window.
"""

import base64
import io
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import requests
import torch
import transformers
from PIL import Image

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parent))
import test_gemma4_parity as parity

# That module has found the factory.
from gemma4.checkpoint import write_checkpoint
from picture_cases import PICTURES, random_picture

register_cpu_ci(est_time=640, suite="stage-a-test-cpu")

NEW_TOKENS = 16
TOLERANCE = 1e-5
MARK = "<|image|>"
WORDS = "look at this ba be bi bo bu da de di do du fa fe fi fo fu".split()


def setUpModule():
    global FOLDERS, THREADS
    # Operations of a tiny model take less time than threads take to meet.
    THREADS = torch.get_num_threads()
    torch.set_num_threads(1)
    FOLDERS = Path(tempfile.mkdtemp(prefix="gemma4-pictures-"))


def tearDownModule():
    torch.set_num_threads(THREADS)
    shutil.rmtree(FOLDERS)


def _picture(name: str, seed: int = 0) -> Image.Image:
    """Random colors, of a size in `PICTURES`."""
    return Image.fromarray(random_picture(*PICTURES[name], seed), "RGB")


def _text(words: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, words))


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Asking(parity.Served):
    """Prompts with pictures; a subclass names the server's arguments."""

    dtype = "float32"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.processor = transformers.AutoProcessor.from_pretrained(cls.path())

    def ask(self, *prompts, **sampling) -> list:
        """Send (text, pictures) in one request; returns one list of answers a prompt,
        of `n` samples each."""
        n = sampling.get("n", 1)
        single = len(prompts) == 1
        texts = [text for text, _ in prompts]
        pictures = [[_data_url(p) for p in pictures] for _, pictures in prompts]
        logprob_start_len = sampling.pop("logprob_start_len", -1)
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "text": texts[0] if single else texts,
                "image_data": pictures[0] if single else pictures,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": NEW_TOKENS,
                    "ignore_eos": True,
                    **sampling,
                },
                "return_logprob": True,
                "logprob_start_len": logprob_start_len,
            },
            timeout=300,
        )
        self.assertEqual(response.status_code, 200, response.text)
        answers = response.json()
        answers = [answers] if isinstance(answers, dict) else answers
        self.assertEqual(len(answers), n * len(prompts))
        return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]

    def read(self, text, pictures):
        """What transformers' processor makes of a prompt."""
        return self.processor(
            text=text, images=pictures or None, return_tensors="pt"
        ).to(torch.float32)

    @torch.inference_mode()
    def check(self, name, prompt, answer):
        inputs = self.read(*prompt)
        tokens, meta = answer["output_ids"], answer["meta_info"]
        length = inputs["input_ids"].shape[1]
        self.assertEqual(meta["prompt_tokens"], length, name)
        self.assertEqual(len(tokens), NEW_TOKENS, name)
        chosen = torch.tensor(tokens)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen[None]], dim=1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat(
                [types, types.new_zeros(1, NEW_TOKENS)], dim=1
            )
        ids = inputs["input_ids"]
        inputs["attention_mask"] = self.oracle.create_masks_for_generate(
            self.oracle.config,
            inputs_embeds=self.oracle.get_input_embeddings()(ids),
            attention_mask=torch.ones_like(ids),
            past_key_values=None,
            position_ids=torch.arange(ids.shape[1])[None],
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
        )
        logits = self.oracle(**inputs).logits[0, length - 1 : -1]
        suppressed = self.oracle.generation_config.suppress_tokens or []
        logits[:, suppressed] = float("-inf")
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        choice = logprobs.argmax(dim=-1)
        of_chosen = logprobs.gather(1, chosen[:, None])[:, 0]
        served = torch.tensor([entry[0] for entry in meta["output_token_logprobs"]])
        worst = (served - of_chosen).abs().max().item()
        wrong = (choice != chosen).sum().item()
        self.assertEqual(wrong, 0, f"{name}: tokens differ, logprobs by {worst:.1e}")
        self.assertLessEqual(worst, TOLERANCE, f"{name}: logprobs differ")

    def check_all(self, name, *prompts, **sampling):
        for prompt, answers in zip(prompts, self.ask(*prompts, **sampling)):
            for answer in answers:
                self.check(name, prompt, answer)


class Pictures(Asking):
    """The cases; a subclass names the shape and the size of a chunk."""

    shape: str
    chunk: int
    drafts = False

    @classmethod
    def path(cls):
        folder = FOLDERS / cls.shape
        write_checkpoint(folder, cls.shape, dtype="float32")
        return str(folder)

    @classmethod
    def setUpClass(cls):
        cls.server_args = [
            *("--max-total-tokens", "8192"),
            *("--chunked-prefill-size", str(cls.chunk)),
        ]
        if cls.drafts:
            draft = FOLDERS / f"{cls.shape}-draft"
            write_checkpoint(draft, cls.shape, assistant=True, dtype="float32")
            cls.server_args += ["--speculative-algorithm", "NEXTN"]
            cls.server_args += ["--speculative-draft-model-path", str(draft)]
        super().setUpClass()

    def test_one_in_the_middle(self):
        for name in PICTURES:
            with self.subTest(name):
                text = f"{_text(9)} {MARK} {_text(7, seed=1)}"
                self.check_all(name, (text, [_picture(name)]))

    def test_one_at_the_end(self):
        for name in ("square", "wide"):
            with self.subTest(name):
                self.check_all(name, (f"{_text(40)} {MARK}", [_picture(name)]))

    def test_another_with_the_same_text(self):
        text = f"{_text(9)} {MARK} {_text(7, seed=1)}"
        for seed in range(3):
            with self.subTest(seed=seed):
                self.check_all(f"{seed}", (text, [_picture("tall", seed)]))

    def test_several(self):
        text = f"{_text(5)} {MARK} {_text(3)} {MARK} {_text(60, seed=2)} {MARK} go"
        names = ("wide", "tall", "small")
        self.check_all("three", (text, [_picture(name) for name in names]))
        for same in ("square", "small"):
            with self.subTest(same=same):
                self.check_all("the same", (text, [_picture(same)] * 3))
        text = f"{MARK}{MARK}"
        self.check_all("no text", (text, [_picture("square"), _picture("tall")]))

    def test_eight_at_once(self):
        prompts = []
        for i, name in enumerate([*PICTURES, "tall"]):
            text = f"{_text(5 + 11 * i, seed=i)} {MARK} {_text(3, seed=i)}"
            prompts.append((text, [_picture(name, seed=i)]))
        text = f"{MARK} {_text(20, seed=9)} {MARK}"
        prompts.append((text, [_picture("wide", 7), _picture("small", 8)]))
        prompts.append((_text(50, seed=10), []))
        self.check_all("eight", *prompts)

    def test_behind_a_cached_prefix(self):
        start, pictures = f"{_text(50)} ", [_picture("square")]
        whole = f"{start}{MARK} {_text(9, seed=1)}"
        self.ask((start, []))
        for name, prompt in (
            ("text cached", (whole, pictures)),
            ("picture cached", (f"{whole} {_text(9, seed=2)}", pictures)),
            (
                "another picture behind",
                (f"{whole} {MARK} {_text(5)}", pictures + [_picture("tall")]),
            ),
        ):
            with self.subTest(name):
                ((answer,),) = self.ask(prompt)
                self.assertGreater(answer["meta_info"]["cached_tokens"], 40)
                self.check(name, prompt, answer)

    def test_behind_a_part_of_a_picture(self):
        """Input logprobs from a position on keep what is behind it from the cache."""
        prompt = (f"{_text(9)} {MARK} {_text(9, seed=1)}", [_picture("square")])
        ids = self.read(*prompt)["input_ids"][0].tolist()
        first = ids.index(self.processor.image_token_id)
        last = len(ids) - 1 - ids[::-1].index(self.processor.image_token_id)
        self.ask(prompt)
        all_cached = []
        for start in (first, first + 1, (first + last) // 2, last, last + 1):
            with self.subTest(start=start - first):
                ((answer,),) = self.ask(prompt, logprob_start_len=start)
                all_cached.append(answer["meta_info"]["cached_tokens"])
                self.assertLessEqual(all_cached[-1], start)
                self.check("from a picture on", prompt, answer)
        self.assertTrue(
            any(first < cached <= last for cached in all_cached), all_cached
        )

    def test_n(self):
        one = (f"{_text(9)} {MARK} go", [_picture("wide")])
        two = (f"{MARK} {_text(9)} {MARK}", [_picture("wide"), _picture("small")])
        three = (
            f"{MARK} {MARK} {_text(9)} {MARK}",
            [_picture("tall"), _picture("wide"), _picture("tall")],
        )
        for n in (2, 3):
            for prompt in (one, two, three):
                with self.subTest(n=n, pictures=len(prompt[1])):
                    self.check_all(f"n {n}", prompt, n=n)


class Test26BA4B(Pictures, CustomTestCase):
    """Chunks are smaller than pictures."""

    shape, chunk = "tiny", 24


class Test31B(Pictures, CustomTestCase):
    """A chunk takes a picture or two, and answers are drafted (MTP)."""

    shape, chunk, drafts = "tiny-31b", 128, True


class TestE2B(Pictures, CustomTestCase):
    shape, chunk = "tiny-e2b", 24


class Test12B(Pictures, CustomTestCase):
    """Without a vision tower, with chunks smaller than pictures, and drafted answers."""

    shape, chunk, drafts = "tiny-12b", 24, True


if __name__ == "__main__":
    unittest.main()
