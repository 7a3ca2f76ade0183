"""Requests with pictures, served by the real scheduler over small pools.

Only its model is replaced, which checks that each request is computed whole and in order
(cache_scheduler.py).
"""

import logging
import os
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "mem_cache"))

from cache_scheduler import CONTEXT_LEN, CacheScheduler, Quiet
from hypothesis import strategies as st

from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
)


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


def cuts(spans, end: int) -> bool:
    return any(first < end <= last for first, last in spans)


class PictureRequests:
    """For tests that serve requests with pictures."""

    def checker(self, scheduler):
        """What checks the pools between two turns of the scheduler."""
        return Quiet()

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
                checker = self.checker(scheduler)
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
