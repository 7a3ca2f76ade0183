"""What a request gives to index the vocabulary, or to compute with in float32, is
refused outside its bound by a sentence with the field, the value and the bound."""

import asyncio
import unittest
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.field_validators import check_token_ids
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

VOCAB = 1000
FLOAT32_MAX = float.fromhex("0x1.fffffep127")
NAN, INFINITY = float("nan"), float("inf")

# Ids on both sides of each end of the vocabulary, and of what 64 bits hold.
OUTSIDE = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=VOCAB),
    st.sampled_from([-1, VOCAB, -(2**63), 2**63 - 1, 2**63, 2**80]),
)
INSIDE = st.one_of(st.integers(0, VOCAB - 1), st.sampled_from([0, VOCAB - 1]))


def manager() -> TokenizerManager:
    """A TokenizerManager with what its checks read."""
    manager = object.__new__(TokenizerManager)
    manager.model_config = SimpleNamespace(vocab_size=VOCAB, hidden_size=8)
    return manager


class TestTokenIds(CustomTestCase):
    @settings(deadline=None)
    @given(st.lists(INSIDE, max_size=20))
    def test_inside(self, ids):
        check_token_ids("ids", ids, VOCAB)
        check_token_ids("ids", set(ids), VOCAB)

    @settings(deadline=None)
    @given(st.lists(INSIDE, max_size=20), OUTSIDE, st.data())
    def test_outside(self, ids, wrong, data):
        ids.insert(data.draw(st.integers(0, len(ids))), wrong)
        for given_ids in (ids, set(ids)):
            with self.assertRaises(ValueError) as refused:
                check_token_ids("ids", given_ids, VOCAB)
            for part in ("ids", str(wrong), str(VOCAB)):
                self.assertIn(part, str(refused.exception))

    def test_not_ids(self):
        for wrong in (5, [1.0], ["1"], [None], [[1]]):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "ids"):
                check_token_ids("ids", wrong, VOCAB)
        check_token_ids("ids", None, VOCAB)


class TestSamplingParams(CustomTestCase):
    def verify(self, **fields):
        params = SamplingParams(max_new_tokens=4, **fields)
        params.normalize(None)
        params.verify(VOCAB)

    def refused(self, name, value, *parts, **fields):
        with self.assertRaises(ValueError) as refused:
            self.verify(**{name: value}, **fields)
        for part in (name, *parts):
            self.assertIn(str(part), str(refused.exception))

    @settings(deadline=None)
    @given(st.lists(INSIDE), OUTSIDE)
    def test_stop_token_ids(self, ids, wrong):
        self.verify(stop_token_ids=ids)
        self.refused("stop_token_ids", [*ids, wrong], wrong, VOCAB)

    @settings(deadline=None)
    @given(INSIDE, OUTSIDE)
    def test_logit_bias_keys(self, token_id, wrong):
        self.verify(logit_bias={str(token_id): 1.0})
        self.refused("logit_bias", {str(wrong): 1.0}, wrong, VOCAB - 1)

    def test_logit_bias_key_is_no_number(self):
        self.refused("logit_bias", {"a": 1.0}, "a", VOCAB - 1)

    @settings(deadline=None)
    @given(st.floats(width=64))
    def test_logit_bias_values(self, bias):
        """What is let through is finite in float32 after the smallest repetition
        penalty and temperature have divided it."""
        if abs(bias) <= 1e26:
            self.verify(logit_bias={"1": bias})
        elif abs(bias) <= FLOAT32_MAX * 1e-12:
            pass
        else:
            self.refused("logit_bias", {"1": bias}, bias)

    @settings(deadline=None)
    @given(st.floats(width=64))
    def test_floats(self, value):
        """Nothing that float32 turns to zero, infinity or NaN where it divides."""
        for name, inside in {
            "temperature": 0 <= value <= FLOAT32_MAX,
            "repetition_penalty": 1e-6 <= value <= 2,
            "frequency_penalty": -2 <= value <= 2,
            "presence_penalty": -2 <= value <= 2,
            "top_p": 0 < value <= 1,
            "min_p": 0 <= value <= 1,
        }.items():
            if inside:
                self.verify(**{name: value})
            else:
                self.refused(name, value, value)

    def test_ends(self):
        for name, inside, outside in [
            ("top_k", [-1, 1, 2**30], [0, -2, 2**30 + 1, 2**31, 2**80]),
            ("temperature", [0, FLOAT32_MAX], [-0.1, FLOAT32_MAX * 2, NAN, INFINITY]),
            ("repetition_penalty", [1e-6, 2], [0, 1e-45, 2.1, NAN, INFINITY]),
            ("stream_interval", [0, 1, 2**80], [-1]),
            ("min_new_tokens", [0], [-1]),
        ]:
            for value in inside:
                with self.subTest(name, value=value):
                    self.verify(**{name: value})
            for value in outside:
                with self.subTest(name, value=value):
                    self.refused(name, value, value)


class TestRequest(CustomTestCase):
    """The checks of TokenizerManager on one request, or one of a batch."""

    def refused(self, name, value, bound):
        obj = GenerateReqInput(text="a", **{name: value})
        obj.normalize_batch_and_arguments()
        with self.assertRaises(ValueError) as refused:
            manager()._validate_logprob_params(obj)
        for part in (name, value, bound):
            self.assertIn(str(part).strip("[]"), str(refused.exception))

    @settings(deadline=None)
    @given(OUTSIDE)
    def test_logprob_params(self, wrong):
        if wrong != VOCAB:
            self.refused("top_logprobs_num", wrong, VOCAB)
        self.refused("token_ids_logprob", [wrong], VOCAB)
        if wrong < -1:
            self.refused("logprob_start_len", wrong, -1)

    @settings(deadline=None)
    @given(INSIDE)
    def test_inside(self, token_id):
        obj = GenerateReqInput(
            text="a",
            top_logprobs_num=token_id + 1,
            token_ids_logprob=[token_id],
            logprob_start_len=token_id - 1,
        )
        obj.normalize_batch_and_arguments()
        manager()._validate_logprob_params(obj)

    @settings(deadline=None)
    @given(st.lists(INSIDE, min_size=1, max_size=5), OUTSIDE)
    def test_prompt_before_anything_reads_it(self, ids, wrong):
        """Ids that the caller gave, with a picture and without one."""
        if not -(2**63) <= wrong < 2**63:
            return
        for media in ({}, {"image_data": "a"}):
            obj = GenerateReqInput(input_ids=[*ids, wrong], **media)
            obj.normalize_batch_and_arguments()
            with self.assertRaisesRegex(ValueError, rf"input_ids.*{wrong}.*{VOCAB}"):
                asyncio.run(manager()._tokenize_one_request(obj))

    def test_text_of_a_longer_tokenizer(self):
        """A tokenizer may know more tokens than the model."""
        obj = GenerateReqInput(text="a")
        obj.normalize_batch_and_arguments()
        with self.assertRaisesRegex(ValueError, rf"input_ids.*{VOCAB}"):
            manager()._validate_prompt_ids(obj, [1, VOCAB])
        manager()._validate_prompt_ids(obj, [0, VOCAB - 1])


if __name__ == "__main__":
    unittest.main()
