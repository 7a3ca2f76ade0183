"""Ranks of the CPU engine without a server: each a process, forked from one that has
imported the engine, as importing it takes longer than what a tiny model is asked."""

import multiprocessing
import os
import pickle
import traceback
from array import array
from typing import Callable, List
from unittest import mock

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch

from sglang.benchmark import one_batch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, prepare_server_args


def ask_ranks(
    folder: str, question: Callable, tp_size: int = 2, more_args: List[str] = ()
) -> list:
    """What question(rank) answers in each rank, a `Rank` of the model in the folder."""
    argv = [*("--model-path", folder), *("--device", "cpu"), *("--dtype", "float32")]
    argv += [*("--tp", str(tp_size)), *("--max-total-tokens", "1024")]
    argv += [*("--log-level", "error"), *more_args]
    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    port_args = PortArgs.init_new(server_args)
    fork = multiprocessing.get_context("fork")
    cores = sorted(os.sched_getaffinity(0))
    cores = [cores[rank % len(cores)] for rank in range(tp_size)]
    bind = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    ranks, pipes = [], []
    with mock.patch.dict(os.environ, bind):
        for rank in range(tp_size):
            pipe, writer = fork.Pipe(duplex=False)
            arguments = server_args, port_args, rank, question, writer
            ranks.append(fork.Process(target=_be_a_rank, args=arguments))
            ranks[-1].start()
            writer.close()
            pipes.append(pipe)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            try:
                answer, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                answer, error = None, "it ended without an answer"
            if error:
                raise RuntimeError(f"Rank {rank} of {tp_size}: {error}")
            answers.append(answer)
        return answers
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _be_a_rank(server_args, port_args, rank, question, writer):
    try:
        ranks = SpawnRanks(world_rank=rank, gpu_id=rank)
        publish(server_args, role="scheduler", ranks=ranks)
        one_batch._init_process_global_configs()
        runner, _ = one_batch.load_model(server_args, port_args, rank, rank)
        with torch.inference_mode():
            answer = question(Rank(runner)), None
    except BaseException:
        answer = None, traceback.format_exc()
    # Connection.send would leave the tensors here, and this process ends.
    writer.send_bytes(pickle.dumps(answer))


class Rank:
    """One rank, which holds a part of the model."""

    def __init__(self, runner):
        self._runner = runner
        self.runner = runner.torch_runner
        self.model = self.runner.model

    def generate(self, prompts: List[List[int]], new_tokens: int):
        """Greedy tokens, [prompts, new_tokens], and the logits each was chosen by."""
        requests = [self._request(i, ids) for i, ids in enumerate(prompts)]
        self._runner.clear()
        tokens, logits, batch = self._runner.extend(requests)
        all_tokens, all_logits = [tokens], [logits]
        for _ in range(new_tokens - 1):
            tokens, logits = self._runner.decode(tokens, batch)
            all_tokens.append(tokens)
            all_logits.append(logits)
        return torch.stack(all_tokens, 1).tolist(), torch.stack(all_logits, 1)

    @staticmethod
    def _request(rid: int, ids: List[int]) -> Req:
        request = Req(
            rid=rid,
            origin_input_text="",
            origin_input_ids=array("q", ids),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=64),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.extend_end = len(ids)
        return request
