"""Answers of the trained model beside transformers', and when an arm has failed."""

import concurrent.futures
import dataclasses
import math
from pathlib import Path
from typing import Dict, List

from gemma4.engines.host import has_gpu
from gemma4.engines.servers import Server
from gemma4.quality import tasks
from gemma4.report.results import Results

FILLERS = (100, 3000)  # between the records and the question
# How much farther from float32 than transformers in bfloat16 an arm may be.
ROOM = 3.0
# The tokens whose logprobs are compared, where a value is answered.
VALUES = list(range(tasks.ANSWER, tasks.ANSWER + tasks.VALUES))
REFERENCE, NOISE = "transformers, float32", "transformers, bfloat16"


@dataclasses.dataclass
class Answer:
    """Tokens that an arm answered.

    Attributes:
        logprobs: For each token, of every value that an answer may have. The right one
            alone would say little: it is near zero, whatever moves the others.
    """

    tokens: List[int]
    logprobs: List[List[float]]


def prompts(count: int) -> List[tasks.Prompt]:
    return [
        tasks.prompt(task, seed, fillers)
        for fillers in FILLERS
        for task in tasks.TASKS
        for seed in range(count)
    ]


def ask(server: Server, asked: List[tasks.Prompt], timeout: float) -> List[Answer]:
    """The server's greedy answers, all asked for at once.

    Raises:
        UserError: A prompt was not answered within `timeout` seconds.
    """

    def one(prompt: tasks.Prompt) -> Answer:
        data = {
            "input_ids": prompt.tokens,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": len(prompt.answer),
                "ignore_eos": True,
            },
            "return_logprob": True,
            "token_ids_logprob": VALUES,
        }
        found = server.answer("/generate", data, timeout)["meta_info"]
        return Answer(
            [token for _, token, _ in found["output_token_logprobs"]],
            [
                [logprob for logprob, _, _ in given]
                for given in found["output_token_ids_logprobs"]
            ],
        )

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


class Reference:
    """transformers, which reads prompt and answer in one pass.

    Attributes:
        dtype: float32 for what is right, bfloat16 for what rounding does.
    """

    def __init__(self, model: Path, dtype: str = "float32"):
        import torch
        from transformers import Gemma4ForConditionalGeneration

        self.device = "cuda" if has_gpu() else "cpu"
        self.model = Gemma4ForConditionalGeneration.from_pretrained(
            model,
            **dict(dtype=getattr(torch, dtype), attn_implementation="sdpa"),
            experts_implementation="eager",
        ).to(self.device)
        self.model.eval()

    def logprobs(self, prompt: List[int], answer: List[int]):
        """Of every token of the vocabulary at each of the answer's places, float32."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([prompt + answer], device=self.device)
            keep = len(answer) + 1
            logits = self.model(input_ids=tokens, logits_to_keep=keep).logits[0, :-1]
            return torch.log_softmax(logits.float(), dim=-1).cpu()


@dataclasses.dataclass
class Difference:
    """One answer beside float32: for each token, a number.

    Attributes:
        right: The token is the right one, up to the first that is not.
        chosen: It is transformers' own first choice after the same tokens.
        behind: How much less likely than its choice transformers finds it.
        apart: Where a value is asked for: how far the logprobs of the values are from
            transformers', on average.
    """

    right: List[bool]
    chosen: List[bool]
    behind: List[float]
    apart: List[float]


def differ(prompt: tasks.Prompt, answer: Answer, logprobs) -> Difference:
    """`logprobs` are float32's, after the prompt and what the arm answered."""
    best, choice = logprobs.max(dim=-1)
    own = [logprobs[i, token].item() for i, token in enumerate(answer.tokens)]
    return Difference(
        right=[a == b for a, b in zip(answer.tokens, prompt.answer)],
        chosen=[a == b for a, b in zip(answer.tokens, choice.tolist())],
        behind=[b - a for a, b in zip(own, best.tolist())],
        apart=[
            _mean([abs(a - b) for a, b in zip(given, logprobs[i, VALUES].tolist())])
            for i, given in enumerate(answer.logprobs)
            if prompt.answer[i] in VALUES
        ],
    )


def case(prompt: tasks.Prompt) -> Dict[str, object]:
    """The task, and how far back a record may be."""
    longest = max(len(prompt.tokens) // 1000 * 1000, 100)
    return {"task": prompt.task, "tokens": f"{longest}+"}


def record(results: Results, arm: str, asked, found: List[Difference]) -> None:
    groups: Dict[tuple, List[Difference]] = {}
    for prompt, difference in zip(asked, found):
        groups.setdefault(tuple(case(prompt).items()), []).append(difference)
    for key, differences in groups.items():

        def share(name: str) -> List[float]:
            return [100 * sum(getattr(d, name)) / len(d.right) for d in differences]

        where = dict(key)
        mean = sum(share("right")) / len(differences)
        results.add(where, arm, "right", "%", [round(mean, 3)])
        mean = sum(share("chosen")) / len(differences)
        results.add(where, arm, "transformers' choice", "%", [round(mean, 3)])
        apart = [x for d in differences for x in d.apart]
        results.add(
            *(where, arm, "distance of logprobs", "mean of nats"),
            [round(sum(apart) / len(apart), 6)],
        )


def judge(arm: str, asked, answers, found, noise: List[Difference]) -> List[str]:
    """What is wrong with an arm, in words; nothing if it agrees with transformers."""
    said = []
    allowed = ROOM * _mean([x for d in noise for x in d.apart])
    for task in dict.fromkeys(prompt.task for prompt in asked):
        mine = [d for p, d in zip(asked, found) if p.task == task]
        apart = _mean([x for d in mine for x in d.apart])
        limit = ROOM * _mean(
            [x for p, d in zip(asked, noise) if p.task == task for x in d.apart]
        )
        limit = max(limit, allowed / 2)
        if not apart <= limit:
            said.append(
                f"{arm}: {task}: its logprobs are {apart:.2e} from float32's, and "
                f"{limit:.2e} would be rounding"
            )
    # A near tie may break either way: by the distance that rounding can make up.
    tie = 2 * ROOM * max(x for d in noise for x in d.apart)
    for prompt, answer, difference in zip(asked, answers, found):
        for i, behind in enumerate(difference.behind):
            if behind > tie:
                said.append(
                    f"{arm}: {prompt.task} after {len(prompt.tokens)} tokens: output {i}"
                    f" is {answer.tokens[i]}, which float32 finds {behind:.2f} nats less"
                    f" likely than its own choice (right: {prompt.answer[i]})"
                )
                break
    return said


def _mean(values: List[float]) -> float:
    return math.fsum(values) / len(values)
