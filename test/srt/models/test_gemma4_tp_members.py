"""Every member of the Gemma 4 family is shared by two ranks as it is by one, and a
--tp that cannot share its heads is refused before anything is loaded.

Small models of 26B-A4B, 31B, E2B, E4B and 12B, whose KV heads do not all divide by two:
then both ranks have the same one. Two ranks of the CPU engine, without a server, answer
prompts longer than the window and encode a picture; transformers, in float32, is the
oracle.
"""

import json
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
import test_gemma4_parity as parity
from gemma4.checkpoint import SHAPES, write_checkpoint
from gemma4.pools.plan import Layout, Load, plan
from picture_cases import PICTURES, random_picture
from two_ranks import ask_ranks

from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.server_args import prepare_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=75, suite="stage-a-test-cpu")

TOLERANCE = 1e-5
NEW_TOKENS = 8


def setUpModule():
    global FOLDERS, THREADS
    # Operations of a tiny model take less time than threads take to meet.
    THREADS = torch.get_num_threads()
    torch.set_num_threads(1)
    FOLDERS = Path(tempfile.mkdtemp(prefix="gemma4-members-"))


def tearDownModule():
    torch.set_num_threads(THREADS)
    shutil.rmtree(FOLDERS)


def _folder(shape: str, text_only=False, assistant=False, weights=True) -> str:
    kind = "-text" * text_only + "-draft" * assistant + "-empty" * (not weights)
    folder = FOLDERS / f"{shape}{kind}"
    write_checkpoint(
        folder,
        shape,
        text_only=text_only,
        assistant=assistant,
        weights=weights,
        dtype="float32",
    )
    return str(folder)


class TestMembers(CustomTestCase):
    def check(self, shape: str, kv_heads: set, text_only=False, tp_size=2):
        """`kv_heads` are those of a rank in a layer of either kind."""
        folder = _folder(shape, text_only)
        config = json.loads(Path(folder, "config.json").read_text())
        oracle = getattr(transformers, config["architectures"][0]).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        picture, soft_tokens = self._picture(folder, oracle)
        prompts = [parity._prompt(n, seed=1) for n in (5, 2 * parity.WINDOW + 3)]

        def question(rank):
            model = getattr(rank.model, "language_model", rank.model.model)
            heads = {layer.self_attn.num_kv_heads for layer in model.layers}
            encoded = picture and rank.model.get_image_feature([picture])
            return heads, rank.generate(prompts, NEW_TOKENS), encoded

        answers = ask_ranks(folder, question, tp_size)
        for rank, (heads, (tokens, logits), encoded) in enumerate(answers):
            with self.subTest(rank=rank):
                self.assertEqual(heads, kv_heads)
                for ids, answer, got in zip(prompts, tokens, logits):
                    self.compare(oracle, ids, answer, got)
                if picture:
                    error = (encoded - soft_tokens).norm() / soft_tokens.norm()
                    self.assertLess(error.item(), TOLERANCE)

    @torch.inference_mode()
    def compare(self, oracle, prompt, tokens, logits):
        ids = torch.tensor([prompt + tokens])
        expected = oracle(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        # What a model may not answer is minus infinity in one of them.
        allowed = torch.ones(expected.shape[-1], dtype=torch.bool)
        allowed[oracle.generation_config.suppress_tokens or []] = False
        self.assertEqual(
            torch.where(allowed, expected, -torch.inf).argmax(dim=-1).tolist(), tokens
        )
        error = (logits - expected)[:, allowed].abs().max().item()
        self.assertLess(error, TOLERANCE)

    @torch.inference_mode()
    def _picture(self, folder: str, oracle):
        """A picture as the model is given it, and what transformers' tower makes of it,
        if the member has one."""
        if not hasattr(oracle.model, "vision_tower"):
            return None, None
        processor = transformers.AutoProcessor.from_pretrained(folder)
        picture = random_picture(*PICTURES["wide"], seed=0)
        read = processor.image_processor([picture], return_tensors="pt")
        pixels, positions = read["pixel_values"], read["image_position_ids"]
        soft_tokens = oracle.model.vision_tower(pixels, positions).last_hidden_state
        soft_tokens = oracle.model.embed_vision(soft_tokens).flatten(end_dim=-2)
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=pixels[0])
        item.set("image_position_ids", positions[0])
        return item, soft_tokens

    def test_26b_a4b(self):
        """The one KV head of a full layer is in both ranks, and widths are padded."""
        self.check("tiny", {1})

    def test_26b_a4b_text_only(self):
        self.check("tiny", {1}, text_only=True)

    def test_31b(self):
        self.check("tiny-31b", {1, 2})

    def test_e2b(self):
        """One KV head in all layers."""
        self.check("tiny-e2b", {1})

    def test_e4b(self):
        self.check("tiny-e4b", {1})

    def test_12b(self):
        self.check("tiny-12b", {1})

    def test_pools_are_those_planned(self):
        """31B has other KV heads in its full layers, of which a rank gets a copy."""
        folder = _folder("tiny-31b")

        def question(rank):
            pool = rank.runner.token_to_kv_pool
            pools = pool.full_kv_pool, pool.swa_kv_pool
            # Besides the tokens there is a page that nobody reads.
            return [sum(p.get_kv_size_bytes()) / (p.size + p.page_size) for p in pools]

        for tp_size in (1, 2):
            load, layout = Load(8, 8, None), Layout(tp_size=tp_size)
            found = plan(folder, 10**6, None, load, layout)
            planned = [found.full_bytes_per_token, found.swa_bytes_per_token]
            more_args = ["--dtype", "bfloat16"]
            for rank, held in enumerate(
                ask_ranks(folder, question, tp_size, more_args)
            ):
                with self.subTest(tp=tp_size, rank=rank):
                    self.assertEqual(held, planned)

    def test_three_ranks(self):
        """The CPU engine adds heads to a text model until three ranks can share them."""
        self.check("tiny", {1}, text_only=True, tp_size=3)


class TestRefused(CustomTestCase):
    """At the command line, with the sizes of the released models."""

    def parse(self, folder: str, *argv) -> str:
        """What the command is refused with, or nothing."""
        argv = ["--model-path", folder, "--log-level", "error", *argv]
        try:
            prepare_server_args(argv).resolve_once()
        except ValueError as error:
            return str(error)
        return ""

    def test_what_cannot_be_shared(self):
        small = "8 attention heads, {} KV head{} a layer, 12 heads in its vision tower"
        small += " and 8 heads in its audio tower"
        cases = {
            ("26b-a4b", 3): "16 attention heads, 8 or 2 KV heads a layer and 16 heads "
            "in its vision tower; choose --tp 1, 2, 4, 8 or 16.",
            ("26b-a4b", 32): "choose --tp 1, 2, 4, 8 or 16.",
            ("31b", 6): "32 attention heads, 16 or 4 KV heads a layer and 16 heads "
            "in its vision tower; choose --tp 1, 2, 4, 8 or 16.",
            ("31b", 32): "choose --tp 1, 2, 4, 8 or 16.",
            ("e2b", 8): small.format(1, "") + "; choose --tp 1, 2 or 4.",
            ("e4b", 16): small.format(2, "s") + "; choose --tp 1, 2 or 4.",
            ("12b", 5): "choose --tp 1, 2, 4, 8 or 16.",
        }
        for (shape, tp_size), reason in cases.items():
            for device in ("cpu", "cuda"):
                with self.subTest(shape=shape, tp=tp_size, device=device):
                    error = self.parse(
                        _folder(shape, weights=False),
                        *("--tp", str(tp_size), "--device", device),
                    )
                    self.assertTrue(
                        error.startswith(f"--tp {tp_size} cannot share"), error
                    )
                    self.assertTrue(error.endswith(reason), error)
                    self.assertNotIn("\n", error)

    def test_text_only(self):
        folder = _folder("26b-a4b", text_only=True, weights=False)
        error = self.parse(folder, "--tp", "3", "--device", "cuda")
        self.assertTrue(
            error.endswith(
                "16 attention heads and 8 or 2 KV heads a layer; choose --tp 1, 2, 4, "
                "8 or 16."
            ),
            error,
        )
        self.assertEqual(self.parse(folder, "--tp", "3", "--device", "cpu"), "")

    def test_what_can(self):
        for shape, sizes in {
            "26b-a4b": (1, 2, 4, 8, 16),
            "31b": (2, 16),
            "e2b": (2, 4),
            "12b": (2,),
        }.items():
            for tp_size in sizes:
                with self.subTest(shape=shape, tp=tp_size):
                    folder = _folder(shape, weights=False)
                    argv = ("--tp", str(tp_size), "--device", "cpu")
                    self.assertEqual(self.parse(folder, *argv), "")

    def test_a_draft_that_cannot(self):
        """Of a model that can: the assistant of E4B has half as many heads."""
        text = SHAPES["e4b"].draft["num_attention_heads"]
        self.assertEqual(text, 4)
        draft = _folder("e4b", assistant=True, weights=False)
        folder = _folder("26b-a4b", weights=False)
        argv = ["--speculative-algorithm", "NEXTN", "--device", "cpu"]
        argv += ["--speculative-draft-model-path", draft]
        error = self.parse(folder, *argv, "--tp", "8")
        self.assertTrue(
            error.startswith("--tp 8 cannot share the heads of Gemma4Assistant"), error
        )
        self.assertTrue(error.endswith("choose --tp 1, 2 or 4."), error)
        self.assertEqual(self.parse(folder, *argv, "--tp", "4"), "")


if __name__ == "__main__":
    unittest.main()
