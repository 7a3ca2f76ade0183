"""No chunk of a prefill ends within a picture that fits in a chunk, where the picture's
tokens attend to each other."""

import sys
import unittest
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from picture_requests import PictureRequests, cuts, spans_of  # noqa: E402

from sglang.srt.managers.picture_chunks import (  # noqa: E402
    picture_spans,
    whole_pictures_len,
)
from sglang.srt.managers.schedule_batch import (  # noqa: E402
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)
from sglang.test.ci.ci_register import register_cpu_ci  # noqa: E402
from sglang.test.test_utils import CustomTestCase  # noqa: E402

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


class TestWholePicturesLen(CustomTestCase):
    @given(st.data())
    def test_as_tried_one_by_one(self, data):
        length = data.draw(st.integers(1, 60))
        spans = data.draw(spans_of(length, 30))
        start = data.draw(st.integers(0, length - 1))
        limit = data.draw(st.integers(1, 40))
        fits = [n for n in range(1, limit + 1) if not cuts(spans, start + n)]
        got = whole_pictures_len(spans, start, limit)
        self.assertEqual(got, max(fits, default=0))

    @given(st.data())
    def test_pages(self, data):
        page_size = data.draw(st.sampled_from([2, 4, 16]))
        length = data.draw(st.integers(1, 90))
        spans = data.draw(spans_of(length, 30))
        start = page_size * data.draw(st.integers(0, (length - 1) // page_size))
        limit = page_size * data.draw(st.integers(1, 4))
        ends = range(start + page_size, 400, page_size)
        whole = [end - start for end in ends if not cuts(spans, end)]
        fits = [n for n in whole if n <= limit]
        got = whole_pictures_len(spans, start, limit, page_size=page_size)
        self.assertEqual(got, max(fits, default=0))

    def test_spans(self):
        """Of pictures and frames, not of sounds."""
        items = [
            MultimodalDataItem(modality=Modality.IMAGE, offsets=[(1, 4)]),
            MultimodalDataItem(modality=Modality.AUDIO, offsets=[(6, 7)]),
            MultimodalDataItem(modality=Modality.VIDEO, offsets=[(9, 9), (11, 15)]),
        ]
        self.assertEqual(
            picture_spans(MultimodalInputs(mm_items=items)), [(1, 4), (9, 9), (11, 15)]
        )
        self.assertEqual(picture_spans(None), [])


class TestScheduler(PictureRequests, CustomTestCase):
    def test_chunks_of_text_are_as_they_were(self):
        ends = self.run_requests([([0, 1, 2] * 10, [], 3)], chunk=8)
        self.assertEqual(ends, [[8, 16, 24, 30]])

    def test_a_chunk_ends_before_a_picture(self):
        prompt, spans = [0, 1, 2] * 10, [(5, 9), (12, 18)]
        for whole, expected in (
            (True, [5, 12, 20, 28, 30]),
            (False, [8, 16, 24, 30]),
        ):
            ends = self.run_requests([(prompt, spans, 3)], whole=whole, chunk=8)
            self.assertEqual(ends, [expected])


if __name__ == "__main__":
    unittest.main()
