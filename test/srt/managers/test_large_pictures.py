"""No chunk of a prefill ends within a picture, however large, where its tokens attend to
each other, and the pools stay sound."""

import sys
import unittest
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from picture_requests import (  # noqa: E402
    CONTEXT_LEN,
    PictureRequests,
    cuts,
    spans_of,
)
from pool_checker import PoolChecker  # noqa: E402

from sglang.srt.managers.picture_chunks import whole_pictures_len  # noqa: E402
from sglang.test.ci.ci_register import register_cpu_ci  # noqa: E402
from sglang.test.test_utils import CustomTestCase  # noqa: E402

register_cpu_ci(est_time=50, suite="stage-a-test-cpu")


class TestWholePicturesLen(CustomTestCase):
    @given(st.data())
    def test_more_than_the_limit_one_by_one(self, data):
        length = data.draw(st.integers(1, 60))
        spans = data.draw(spans_of(length, 30))
        start = data.draw(st.integers(0, length - 1))
        limit = data.draw(st.integers(1, 40))
        fits = [n for n in range(1, limit + 1) if not cuts(spans, start + n)]
        more = next(n for n in range(limit, 99) if not cuts(spans, start + n))
        got = whole_pictures_len(spans, start, limit, may_exceed=True)
        self.assertEqual(got, max(fits, default=more))

    @given(st.data())
    def test_pages_beyond_the_limit(self, data):
        page_size = data.draw(st.sampled_from([2, 4, 16]))
        length = data.draw(st.integers(1, 90))
        spans = data.draw(spans_of(length, 30))
        start = page_size * data.draw(st.integers(0, (length - 1) // page_size))
        limit = page_size * data.draw(st.integers(1, 4))
        ends = range(start + page_size, 400, page_size)
        whole = [end - start for end in ends if not cuts(spans, end)]
        fits = [n for n in whole if n <= limit]
        got = whole_pictures_len(
            spans, start, limit, page_size=page_size, may_exceed=True
        )
        self.assertEqual(got, max(fits, default=whole[0]))


class TestScheduler(PictureRequests, CustomTestCase):
    LONGEST = 40

    def checker(self, scheduler):
        return PoolChecker(scheduler)

    @settings(max_examples=settings().max_examples // 4)
    @given(st.data())
    def test_no_chunk_ends_in_a_picture(self, data):
        requests = []
        for _ in range(data.draw(st.integers(1, 5))):
            length = data.draw(st.integers(1, CONTEXT_LEN - 30))
            pattern = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
            spans = data.draw(spans_of(length, self.LONGEST))
            # Prompts of one pattern share a prefix, with pictures in other places.
            requests.append(
                ((pattern * length)[:length], spans, data.draw(st.integers(0, 9)))
            )
        all_ends = self.run_requests(
            requests,
            chunk=data.draw(st.sampled_from([8, 16, 64])),
            page_size=data.draw(st.sampled_from([1, 1, 4])),
            mixed=data.draw(st.booleans()),
            overlap=data.draw(st.booleans()),
        )
        for (prompt, spans, _), ends in zip(requests, all_ends):
            for end in ends:
                self.assertFalse(cuts(spans, end), f"{ends} in {spans}")

    def test_a_chunk_ends_before_a_picture_or_is_one(self):
        prompt, spans = [0, 1, 2] * 10, [(5, 9), (12, 27)]
        for whole, expected in (
            (True, [5, 12, 28, 30]),
            (False, [8, 16, 24, 30]),
        ):
            ends = self.run_requests([(prompt, spans, 3)], whole=whole, chunk=8)
            self.assertEqual(ends, [expected])


if __name__ == "__main__":
    unittest.main()
