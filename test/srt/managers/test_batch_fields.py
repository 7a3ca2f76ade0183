"""What a batch of requests states once holds for each of them as for a request alone."""

import dataclasses
import typing
import unittest

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")

# Fields that one value cannot be stated of for several requests.
EACH = {
    # Prompts, and lists with an entry a request.
    *("text", "input_ids", "input_embeds", "modalities", "mm_hashes"),
    *("mm_content_hashes", "embed_overrides", "positional_embed_overrides"),
    *("multi_item_delimiter_indices", "token_indices_to_pool", "decision_layout"),
    # Each request has one of its own.
    *("rid", "bootstrap_room"),
    # Another name of routed_dp_rank.
    "data_parallel_rank",
    # The server sets them.
    *("lora_id", "need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls"),
}
# Values of a form of their own.
VALUES = {
    "token_ids_logprob": [3],
    "kv_hints": {"protocol_version": "1", "message_id": "a"},
}
# What another field needs.
WITH = {"return_flat_raw_top_logprobs_b64": {"return_flat_raw_top_logprobs": True}}


def a_value(annotation, default):
    """A value of the type, other than the default and no list, or None."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation) or annotation
    if origin is bool:
        return not default
    if origin in (int, float, str, dict, typing.Any):
        return {int: 3, float: 0.5, dict: {"a": "b"}}.get(origin, "a")
    if origin is typing.Literal:
        return arguments[-1]
    if origin is list:
        return None
    values = (a_value(argument, default) for argument in arguments)
    return next((value for value in values if value is not None), None)


def requests(cls, **fields):
    """The requests that the server makes of one."""
    request = cls(**fields)
    request.normalize_batch_and_arguments()
    if request.is_single:
        return [request]
    count = request.batch_size * getattr(request, "parallel_sample_num", 1)
    return [request[i] for i in range(count)]


def as_list(value):
    """A prompt or media: one, or a list of one."""
    return value if isinstance(value, list) else [value]


class TestBatchFields(CustomTestCase):
    def check(self, cls, name, value):
        fields = {name: value, **WITH.get(name, {})}
        (alone,) = requests(cls, text="a", **fields)
        expected = getattr(alone, name)
        self.assertTrue(expected or expected is False)
        many = requests(cls, text=["a", "b"], **fields)
        self.assertEqual([as_list(request.text) for request in many], [["a"], ["b"]])
        if cls is GenerateReqInput and name != "sampling_params":
            samples = requests(cls, text="a", sampling_params={"n": 2}, **fields)
            self.assertEqual([request.text for request in samples], ["a", "a"])
            many += samples
        for request in many:
            self.assertEqual(as_list(getattr(request, name)), as_list(expected))

    def test_every_field(self):
        for cls in (GenerateReqInput, EmbeddingReqInput):
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                name = field.name
                if name in EACH:
                    continue
                with self.subTest(cls.__name__, name=name):
                    value = VALUES.get(name, a_value(hints[name], field.default))
                    self.assertIsNotNone(value)
                    self.check(cls, name, value)


if __name__ == "__main__":
    unittest.main()
