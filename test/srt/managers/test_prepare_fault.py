"""A request that the scheduler cannot prepare is refused alone, and leaves nothing."""

import unittest
from types import SimpleNamespace
from unittest import mock

from sglang.srt.managers.io_struct import (
    SessionParams,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome
from sglang.srt.session.session_controller import Session, SessionReqNode
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


def entry(rid, finished=False):
    return SimpleNamespace(
        rid=rid, finished_reason=None, to_finish=None, finished=lambda: finished
    )


class Prepared(CustomTestCase):
    def setUp(self):
        self.scheduler = scheduler = object.__new__(Scheduler)
        scheduler.waiting_queue = [entry("other")]
        scheduler.grammar_manager = SimpleNamespace(grammar_queue=[entry("other")])
        scheduler.session_controller = mock.Mock(get={}.get)
        scheduler.tree_cache = mock.Mock()
        scheduler.sent = []
        scheduler.send_abort_output = lambda abort, _: scheduler.sent.append(abort)

    def handle(self, error, kind="generate", before=lambda: None, **fields):
        """Hand the scheduler a request whose preparation does `before`, and raises."""

        def prepare(*_, **__):
            before()
            raise error

        setattr(self.scheduler, f"_handle_{kind}_request", prepare)
        cls = {
            "generate": TokenizedGenerateReqInput,
            "embedding": TokenizedEmbeddingReqInput,
        }[kind]
        every = {name: None for name in cls.__struct_fields__}
        request = cls(**{**every, "rid": "this", **fields})
        getattr(self.scheduler, f"handle_{kind}_request")(request)

    def check_refused(self, status):
        [abort] = self.scheduler.sent
        self.assertEqual(abort.rid, "this")
        self.assertEqual(abort.finished_reason["type"], "abort")
        self.assertEqual(abort.finished_reason["status_code"], status)
        self.assertIn("what is wrong", abort.finished_reason["message"])
        [(handle, outcome)] = [
            c.args for c in self.scheduler.tree_cache.finish.mock_calls
        ]
        self.assertEqual(handle.rid, "this")
        self.assertIs(outcome, CacheRequestOutcome.ABORT)
        for queue in (
            self.scheduler.waiting_queue,
            self.scheduler.grammar_manager.grammar_queue,
        ):
            self.assertEqual([req.rid for req in queue], ["other"])


class TestPrepareFault(Prepared):
    def test_refused(self):
        for kind in ("generate", "embedding"):
            for error, status in (
                (RuntimeError("what is wrong"), 500),
                (AssertionError("what is wrong"), 500),
                (ValueError("what is wrong"), 400),
            ):
                with self.subTest(kind=kind, error=error):
                    self.setUp()
                    self.handle(error, kind)
                    self.check_refused(status)

    def test_queued_before_it_failed(self):
        def queue():
            self.scheduler.waiting_queue.append(entry("this"))
            self.scheduler.grammar_manager.grammar_queue.append(entry("this"))

        self.handle(KeyError("what is wrong"), before=queue)
        self.check_refused(500)

    def test_media_are_given_back(self):
        media = MultimodalProcessorOutput(
            mm_items=[MultimodalDataItem(modality=Modality.IMAGE)]
        )
        with mock.patch.object(
            MultimodalDataItem, "release_transport_proxies"
        ) as released:
            self.handle(RuntimeError("what is wrong"), mm_inputs=media)
        self.check_refused(500)
        released.assert_called_with()

    def test_exit_is_no_fault(self):
        with self.assertRaises(KeyboardInterrupt):
            self.handle(KeyboardInterrupt())


class TestSession(Prepared):
    def in_session(self, session, before=lambda: None):
        self.scheduler.session_controller.get = {"s": session}.get
        params = SessionParams(id="s")
        self.handle(RuntimeError("what is wrong"), before=before, session_params=params)
        self.check_refused(500)

    def test_turn_of_a_streaming_session(self):
        session = Session(100, "s", streaming=True)
        self.in_session(session, lambda: setattr(session, "_inflight", True))
        self.assertFalse(session._inflight)

    def test_turn_of_another_request(self):
        session = Session(100, "s", streaming=True)
        session._inflight = True
        self.in_session(session)
        self.assertTrue(session._inflight)

    def test_node(self):
        """The session may go on from the failed request: it is not waited for."""
        session = Session(100, "s")
        node = SessionReqNode(entry("this"))
        self.in_session(session, lambda: session.req_nodes.update(this=node))
        self.assertIsNotNone(node.req.finished_reason)


if __name__ == "__main__":
    unittest.main()
