"""Property test of the unified radix cache under the scheduler's own code, on a CPU.

Requests are added, aborted, retracted and paused in any order, in every mode of the
scheduler: with mixed chunks, with the overlap scheduler, with Frozen-KV MTP, whose slots
are allocated ahead of the tokens that it accepts.

After each turn every slot is either free or held by exactly one owner, the tree locks
what a running request reads and nothing else, and each running request still holds its
whole prompt and its whole sliding window (cache_scheduler.py). At the end nothing is held
but by the tree, and evicting the tree fills both pools again.

The Rust core and the Python core run alone, and in lockstep under the same operations.
"""

import logging
import os
import sys
from pathlib import Path
from typing import List
from unittest.mock import patch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import lockstep_tree_core  # noqa: F401  # registers the core
import pytest
from cache_scheduler import CONTEXT_LEN, SequenceIds
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from mtp_scheduler import MTPScheduler
from pool_checker import PoolChecker

from sglang.srt.environ import envs
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=90, suite="stage-a-test-cpu")

MODES = {
    "plain": {},
    "mixed": dict(mixed=True),
    "overlap": dict(overlap=True),
    "overlap-mixed": dict(overlap=True, mixed=True),
    "mtp": dict(draft_tokens=4),
    "mtp-mixed": dict(draft_tokens=4, mixed=True),
    "overlap-mtp": dict(draft_tokens=4, overlap=True),
    "overlap-mtp-mixed": dict(draft_tokens=4, overlap=True, mixed=True),
}


class UnifiedRadixCacheMachine(RuleBasedStateMachine):
    core = "rust"

    @initialize(
        mode=st.sampled_from(list(MODES)),
        page_size=st.sampled_from([1, 4, 1, 2]),
        window=st.integers(3, 12),
        chunk=st.sampled_from([8, 16, 32]),
        interval=st.sampled_from([1, 4, 128]),
        release=st.booleans(),
        free_early=st.sampled_from([True, True, False]),
        needs_cpu_seq_lens=st.booleans(),
        draft_tokens=st.sampled_from([2, 4, 12]),
        more_swa=st.integers(0, 6),
        more_full=st.integers(0, 2),
    )
    def start(
        self,
        mode,
        page_size,
        window,
        chunk,
        interval,
        release,
        free_early,
        needs_cpu_seq_lens,
        draft_tokens,
        more_swa,
        more_full,
    ):
        event(f"mode {mode}")
        self.overrides = [
            envs.SGLANG_SWA_EVICTION_INTERVAL.override(interval),
            envs.SGLANG_OPT_RELEASE_PREFILL_SWA.override(release),
            envs.SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS.override(free_early),
            envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(1),
        ]
        for override in self.overrides:
            override.__enter__()
        if "mtp" not in mode:
            draft_tokens = 0
        # One chunk in flight, one to be allocated, and some windows beside them.
        swa_size = 2 * chunk + (2 + more_swa) * (window + 2 * page_size + draft_tokens)
        full_size = max(swa_size, CONTEXT_LEN) + more_full * 64
        self.scheduler = MTPScheduler(
            core=self.core,
            page_size=page_size,
            window=window,
            full_size=full_size // page_size * page_size,
            swa_size=swa_size // page_size * page_size,
            chunk=chunk,
            mixed="mixed" in mode,
            overlap="overlap" in mode,
            draft_tokens=draft_tokens,
            needs_cpu_seq_lens=needs_cpu_seq_lens,
        )
        self.checker = PoolChecker(self.scheduler)
        self.prompts: List[List[int]] = []
        self.num_requests = 0

    # One rule, as Hypothesis leaves rules out of whole examples: without requests, or
    # without turns of the scheduler, nothing happens.
    @rule(
        data=st.data(),
        act=st.sampled_from(["add", "run", "add", "run", "abort", "evict", "retract"]),
    )
    def act(self, data, act):
        getattr(self, act)(data.draw)
        self.checker.check()

    def add(self, draw):
        pattern = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        length = draw(st.integers(1, 60))
        prompt = (pattern * length)[:length]
        if self.prompts and draw(st.integers(0, 3)):
            # Share a prefix, go on with an earlier answer, or repeat a prompt.
            base = draw(st.sampled_from(self.prompts))
            kept = draw(st.integers(0, len(base)))
            prompt = base[:kept] + draw(st.sampled_from([[], prompt]))
        prompt = (prompt or [0])[: CONTEXT_LEN - 10]
        self.num_requests += 1
        req = self.scheduler.add_request(
            f"{self.num_requests}.",  # a request is aborted by the start of its id
            prompt,
            max_new_tokens=draw(st.sampled_from([0, 1, 5, 20, 50, CONTEXT_LEN])),
            stop=draw(st.booleans()),
        )
        answer = list(prompt)
        for _ in range(req.sampling_params.max_new_tokens):
            answer.append(SequenceIds.next_token(answer))
        self.prompts += [prompt, answer]

    def run(self, draw):
        for _ in range(draw(st.integers(1, 16))):
            self.scheduler.step()
            self.checker.check()

    def abort(self, draw):
        reqs = self.scheduler.live_requests() + self.scheduler.waiting_queue
        chunked_req = self.scheduler.chunked_req
        if chunked_req is not None and draw(st.booleans()):
            reqs = [chunked_req]
        if reqs:
            req = draw(st.sampled_from(reqs))
            self.scheduler.abort_request(AbortReq(rid=req.rid))

    def evict(self, draw):
        self.scheduler.evict(draw(st.integers(0, 40)), draw(st.integers(0, 40)))

    def retract(self, draw):
        if draw(st.integers(0, 3)):
            # A step that decodes, and retracts as if the pools were full.
            with (
                patch.object(scheduler_module, "TEST_RETRACT", True),
                patch.object(scheduler_module, "TEST_RETRACT_INTERVAL", 1),
                patch.object(scheduler_module, "TEST_RETRACT_NO_PREFILL_BS", 0),
            ):
                self.scheduler.step()
        else:
            # All requests, as before an update of the weights.
            self.scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
            self.checker.check()
            resume = ContinueGenerationReqInput(torch_empty_cache=False)
            self.scheduler.continue_generation(resume)

    def finish(self):
        for _ in range(4000):
            ran = self.scheduler.step()
            self.checker.check()
            if not ran and not self.scheduler.has_work():
                break
        self.checker.check_idle()
        event(f"retracted: {self.scheduler.retracted > 0}")

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        try:
            if sys.exc_info()[0] is None:  # no rule has failed
                self.finish()
        finally:
            self.scheduler.close()
            for override in reversed(self.overrides):
                override.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


# Most examples run both cores at once.
@pytest.mark.hypothesis
@pytest.mark.parametrize("core, share", [("lockstep", 2), ("rust", 6), ("python", 6)])
def test_unified_radix_cache_stateful(core, share):
    machine = type("Machine", (UnifiedRadixCacheMachine,), {"core": core})
    run_state_machine_as_test(
        machine,
        settings=settings(
            stateful_step_count=30, max_examples=settings().max_examples // share
        ),
    )


@pytest.fixture
def make_scheduler():
    schedulers = []

    def make(**kwargs) -> MTPScheduler:
        config = dict(page_size=1, window=4, full_size=2 * CONTEXT_LEN, chunk=64)
        schedulers.append(MTPScheduler(**{**config, "swa_size": 128, **kwargs}))
        return schedulers[-1]

    yield make
    for scheduler in schedulers:
        scheduler.close()


@pytest.mark.parametrize("core", ["rust", "python"])
def test_revived_tombstone_keeps_full_slots_of_a_running_request(core, make_scheduler):
    """A prompt computed again may bring SWA slots back, not replace the full ones."""
    scheduler = make_scheduler(core=core)
    checker = PoolChecker(scheduler)
    prompt = [0, 1, 2] * 8
    # A node that ends before the window of the request which holds it.
    scheduler.add_request("0.", prompt[:10], 1)
    while scheduler.step():
        checker.check()
    first = scheduler.add_request("first.", prompt, 30)
    scheduler.step()
    evicted = scheduler.evict(full=0, swa=20)
    assert evicted.swa_num_tokens_evicted > 0
    assert len(checker.tree_slots()) > len(checker.tree_slots(swa=True))
    slots = scheduler.row(first, 10)

    scheduler.add_request("second.", prompt[:10] + [5, 5, 5], 30)
    scheduler.step()
    checker.check()
    assert scheduler.row(first, 10) == slots
    assert checker.tree_slots(swa=True).issuperset(slots[6:])
    while scheduler.step():
        checker.check()
    checker.check_idle()


@pytest.mark.parametrize("mode", ["plain", "overlap", "mtp", "overlap-mtp"])
@pytest.mark.parametrize("window", [3, 7, 32])
def test_window_is_released(window, mode, make_scheduler):
    """A request holds its prompt's window and its answer's, and what is not due yet.

    The interval counts tokens, also where a step of MTP accepts several.
    """
    interval = 5
    mode = MODES[mode]
    scheduler = make_scheduler(core="rust", window=window, swa_size=320, **mode)
    checker, held = PoolChecker(scheduler), []
    with envs.SGLANG_SWA_EVICTION_INTERVAL.override(interval):
        scheduler.add_request("1.", [0, 1, 2] * 15, 100)
        while scheduler.step():
            checker.check()
            if (
                scheduler.live_requests()
                and scheduler.last_batch.forward_mode.is_decode()
            ):
                held.append(scheduler.swa_held())
    checker.check_idle()
    # The prompt's window, the answer's, the token that is written, what is not due yet.
    bound = window + window + 1 + interval
    if "draft_tokens" in mode:
        # The slots of two steps ahead, the first of which may be accepted already.
        bound += 2 * mode["draft_tokens"]
    if "overlap" in mode:
        # Tokens that the host does not know yet.
        bound += mode.get("draft_tokens", 1)
    assert bound - 2 * interval < max(held) <= bound


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
