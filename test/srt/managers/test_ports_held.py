"""Servers that start at the same moment choose different ports for their ranks.

The order in which free ports are tried is made the same for all, so that they choose the
same one unless whoever chose first keeps it.
"""

import contextlib
import multiprocessing
import os
import socket
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from datetime import timedelta

from torch.distributed import TCPStore

from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils import network
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

SERVERS = 8


def _choose() -> int:
    """The port that a server chooses for the store of its ranks."""
    server_args = ServerArgs(model_path="dummy", device="cpu")
    in_order = mock.patch.object(network.random, "sample", lambda ports, n: ports[:n])
    with in_order:
        return PortArgs.init_new(server_args).nccl_port


def _be_a_server(pipe):
    """Choose a port, say which, and hold it until told to end."""
    pipe.send(_choose())
    pipe.recv()


def _listen(port: int, use_libuv: bool, pipe):
    """What rank 0 does."""
    try:
        store = TCPStore(
            *("127.0.0.1", port, 1, True, timedelta(seconds=20)), use_libuv=use_libuv
        )
        store.set("key", "value")
        pipe.send(store.get("key"))
    except BaseException as error:
        pipe.send(error)


class TestPortsHeld(CustomTestCase):
    @contextlib.contextmanager
    def server(self):
        """Yields the port that another process has chosen, which ends then."""
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_be_a_server, args=[theirs])
        process.start()
        try:
            yield ours.recv()
        finally:
            process.kill()
            process.join()

    def test_servers_that_start_at_once(self):
        with contextlib.ExitStack() as stack:
            ports = [stack.enter_context(self.server()) for _ in range(SERVERS)]
            self.assertEqual(len(set(ports)), SERVERS, ports)

    def test_threads(self):
        with ThreadPoolExecutor(SERVERS) as pool:
            ports = list(
                pool.map(lambda _: network.get_free_port_below_ephemeral(), range(100))
            )
        self.assertEqual(len(set(ports)), len(ports))

    def test_a_port_is_free_when_its_server_has_ended(self):
        with self.server() as port:
            with self.assertRaises(OSError):
                network.try_bind_socket("0.0.0.0", port, reuse_addr=False)
        with self.server() as again:
            self.assertEqual(again, port)

    def test_its_ranks_can_listen_on_it(self):
        fork = multiprocessing.get_context("fork")
        for use_libuv in (True, False):
            with self.subTest(libuv=use_libuv), self.server() as port:
                ours, theirs = fork.Pipe()
                rank = fork.Process(target=_listen, args=[port, use_libuv, theirs])
                rank.start()
                try:
                    self.assertEqual(ours.recv(), b"value")
                finally:
                    rank.kill()
                    rank.join()

    def test_the_controller_of_dp_ranks_can_hold_it_too(self):
        port = _choose()
        with network.bind_port(port):
            self.assertNotEqual(_choose(), port)

    def test_where_no_port_of_the_range_is_free(self):
        taken = mock.patch.object(network, "hold_port", side_effect=self._taken)
        with taken:
            port = _choose()
        with socket.socket() as other, self.assertRaises(OSError):
            other.bind(("0.0.0.0", port))

    def _taken(self, port):
        if port:
            raise OSError("taken")
        from sglang.srt.utils.held_ports import hold_port

        return hold_port(port)


if __name__ == "__main__":
    unittest.main()
