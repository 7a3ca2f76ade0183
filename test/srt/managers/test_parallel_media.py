"""A single request with `n` above 1 gives each of its samples all that it was given:
pictures, videos, audio, and what tells of them.

What a sample gets is compared with what the request itself has with `n` 1.
"""

import os
import unittest

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

MEDIA = ("image_data", "video_data", "audio_data")
PROMPTS = (
    {"text": "look"},
    {"input_ids": [2, 3, 4]},
    {"input_embeds": [[0.5, 1.0], [1.5, 2.0]]},
)
names = st.text("abc", min_size=1, max_size=3)
urls = names.map("http://localhost/{}".format)
payloads = st.one_of(urls, urls.map(lambda url: {"url": url}))
one_or_more = st.one_of(payloads, st.lists(payloads, max_size=3))


def _as_list(value) -> list:
    """The media of a request: what is stated without a list is a list of one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _samples(n: int, **fields) -> list:
    request = GenerateReqInput(sampling_params={"n": n}, **fields)
    request.normalize_batch_and_arguments()
    if request.is_single:
        return [request]
    return [request[i] for i in range(request.batch_size * n)]


class TestParallelMedia(CustomTestCase):
    @given(
        st.sampled_from(PROMPTS),
        st.dictionaries(st.sampled_from(MEDIA), one_or_more),
        st.integers(2, 4),
    )
    def test_each_sample_gets_all_media(self, prompt, media, n):
        (alone,) = _samples(1, **prompt, **media)
        samples = _samples(n, **prompt, **media)
        self.assertEqual(len(samples), n)
        for sample in samples:
            for name in MEDIA:
                self.assertEqual(
                    _as_list(getattr(sample, name)), _as_list(getattr(alone, name))
                )
            for name, value in prompt.items():
                self.assertEqual(getattr(sample, name), value)

    @given(st.lists(urls, min_size=1, max_size=3), st.integers(2, 4))
    def test_hashes_go_with_their_pictures(self, pictures, n):
        hashes = [f"{i:016x}" for i in range(len(pictures))]
        for name in ("mm_hashes", "mm_content_hashes"):
            for given_as in (hashes, [hashes]):
                fields = {"image_data": pictures, name: given_as}
                for sample in _samples(n, text="look", **fields):
                    self.assertEqual(sample.image_data, pictures)
                    self.assertEqual(getattr(sample, name), hashes)

    @given(st.lists(urls, min_size=1, max_size=3), st.integers(2, 4))
    def test_a_list_of_one_request(self, pictures, n):
        """The form of a batch, of one."""
        for sample in _samples(n, text="look", image_data=[pictures]):
            self.assertEqual(sample.image_data, pictures)

    @given(
        st.lists(st.lists(urls, min_size=1, max_size=3), min_size=2, max_size=3),
        st.integers(1, 3),
    )
    def test_a_batch_is_as_it_was(self, pictures, n):
        texts = [f"look {i}" for i in range(len(pictures))]
        samples = _samples(n, text=texts, image_data=pictures, video_data=pictures)
        for i, sample in enumerate(samples):
            self.assertEqual(sample.text, texts[i % len(texts)])
            self.assertEqual(sample.image_data, pictures[i % len(texts)])
            self.assertEqual(sample.video_data, pictures[i % len(texts)])

    def test_what_is_not_one_entry_a_request_is_refused(self):
        for name in MEDIA:
            with self.assertRaisesRegex(ValueError, name):
                _samples(2, text="look", **{name: [["a"], ["b"]]})


if __name__ == "__main__":
    unittest.main()
