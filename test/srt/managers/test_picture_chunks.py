"""No chunk of a prefill ends within a picture, whose tokens attend to each other.

The scheduler is the real one over small pools (cache_scheduler.py); only its model is
replaced, which checks that each request is computed whole and in order.
"""

import logging
import os
import sys
import unittest
from pathlib import Path
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "mem_cache"))

from cache_scheduler import CONTEXT_LEN, CacheScheduler, PoolChecker
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.managers.picture_chunks import picture_spans, whole_pictures_len
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="stage-a-test-cpu")


@st.composite
def spans_of(draw, length: int, longest: int):
    """Pictures of a prompt, at most `longest` tokens each, in order."""
    spans, end = [], 0
    while True:
        first = end + draw(st.integers(0, 9))
        last = first + draw(st.integers(0, longest - 1))
        if last >= length:
            return spans
        spans.append((first, last))
        end = last + 1


def _cuts(spans, end: int) -> bool:
    return any(first < end <= last for first, last in spans)


class TestWholePicturesLen(CustomTestCase):
    @given(st.data())
    def test_as_tried_one_by_one(self, data):
        length = data.draw(st.integers(1, 60))
        spans = data.draw(spans_of(length, 30))
        start = data.draw(st.integers(0, length - 1))
        limit = data.draw(st.integers(1, 40))
        fits = [n for n in range(1, limit + 1) if not _cuts(spans, start + n)]
        got = whole_pictures_len(spans, start, limit)
        self.assertEqual(got, max(fits, default=0))
        more = next(n for n in range(limit, 99) if not _cuts(spans, start + n))
        got = whole_pictures_len(spans, start, limit, may_exceed=True)
        self.assertEqual(got, max(fits, default=more))

    @given(st.data())
    def test_pages(self, data):
        page_size = data.draw(st.sampled_from([2, 4, 16]))
        length = data.draw(st.integers(1, 90))
        spans = data.draw(spans_of(length, 30))
        start = page_size * data.draw(st.integers(0, (length - 1) // page_size))
        limit = page_size * data.draw(st.integers(1, 4))
        ends = range(start + page_size, 400, page_size)
        whole = [end - start for end in ends if not _cuts(spans, end)]
        fits = [n for n in whole if n <= limit]
        got = whole_pictures_len(spans, start, limit, page_size=page_size)
        self.assertEqual(got, max(fits, default=0))
        got = whole_pictures_len(
            spans, start, limit, page_size=page_size, may_exceed=True
        )
        self.assertEqual(got, max(fits, default=whole[0]))

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


class TestScheduler(CustomTestCase):
    LONGEST = 40

    def setUp(self):
        logging.disable(logging.WARNING)
        self.addCleanup(logging.disable, logging.NOTSET)

    def run_requests(self, requests, whole=True, **config):
        """Serve (prompt, pictures, tokens to answer), and return for each request where
        its chunks ended."""
        config = dict(
            dict(core="rust", page_size=1, window=4, chunk=8),
            full_size=3 * CONTEXT_LEN,
            swa_size=2 * CONTEXT_LEN,
            **config,
        )
        scheduler = CacheScheduler(attends_within_pictures=whole, **config)
        try:
            ends, forward = {}, scheduler.worker.forward_target

            def observe(batch):
                if batch.forward_mode.is_extend():
                    for req, end in zip(batch.reqs, batch.seq_lens.tolist()):
                        ends.setdefault(req.rid, []).append(end)
                return forward(batch)

            with mock.patch.object(scheduler.worker, "forward_target", observe):
                checker = PoolChecker(scheduler)
                for i, (prompt, spans, new_tokens) in enumerate(requests):
                    req = scheduler.add_request(f"{i}.", prompt, new_tokens)
                    items = [
                        MultimodalDataItem(modality=Modality.IMAGE, offsets=[span])
                        for span in spans
                    ]
                    req.multimodal_inputs = MultimodalInputs(mm_items=items)
                for _ in range(1000):
                    ran = scheduler.step()
                    checker.check()
                    if not ran and not scheduler.has_work():
                        break
                checker.check_idle()
            self.assertEqual(len(ends), len(requests))
            return [ends[f"{i}."] for i in range(len(requests))]
        finally:
            scheduler.close()

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
                self.assertFalse(_cuts(spans, end), f"{ends} in {spans}")

    def test_chunks_of_text_are_as_they_were(self):
        ends = self.run_requests([([0, 1, 2] * 10, [], 3)], chunk=8)
        self.assertEqual(ends, [[8, 16, 24, 30]])

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
