"""Compare the answers of several arms: of a small trained Gemma-4 MoE, and on MMLU.

    python benchmark/gemma4/trained.py .cache/gemma-4-trained
    python benchmark/gemma4/eval_quality.py --arms base,fork
    python benchmark/gemma4/eval_quality.py --wrong window,experts,pools
    python benchmark/gemma4/eval_quality.py --model /models/gemma-4-26B-A4B-it --mmlu mmlu.csv

The trained model (trained.py says on which tasks) answers through each arm's server,
all prompts at once, greedily. transformers, in float32, then reads prompt and answer in
one pass without a cache. For each task: how many tokens are right, how many are
transformers' own first choice, and how far the logprobs are from transformers'.
transformers in bfloat16 is compared in the same way: an arm whose logprobs are more
than three times as far, or which answers a token that float32 finds clearly less
likely than its own choice, has failed, and the program ends with exit status 1.

`--wrong` adds arms that are wrong on purpose, to show that they fail: a window that is
one token too wide or too narrow, a router that drops the last of the chosen experts,
and pools whose sliding part is too small for the window.

MMLU: 500 questions, seed 0, temperature 0, in a prompt of our own. The file is
simple-evals' mmlu.csv with columns Question, A, B, C, D, Answer and Subject; nothing is
downloaded. It needs a checkpoint with weights.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import json
import math
import os
import random
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import serving  # noqa: E402
import trained  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402
from serving import Arm, HouseError, Server, Setup  # noqa: E402

CONTEXT = 6144
FILLERS = (100, 3000)  # between the records and the question
MMLU_QUESTIONS, MMLU_AT_ONCE = 500, 64
MMLU_PROMPT = """\
Which of the four choices answers the question? Reason first, and end with a line that
reads "Answer: X", where X is the letter of the choice.

{Question}

A. {A}
B. {B}
C. {C}
D. {D}
"""
# How much farther from float32 than transformers in bfloat16 an arm may be.
ROOM = 3.0
# The tokens whose logprobs are compared, where a value is answered.
VALUES = list(range(trained.ANSWER, trained.ANSWER + trained.VALUES))
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


def prompts(count: int) -> List[trained.Prompt]:
    return [
        trained.prompt(task, seed, fillers)
        for fillers in FILLERS
        for task in trained.TASKS
        for seed in range(count)
    ]


def ask(server: Server, asked: List[trained.Prompt], timeout: float) -> List[Answer]:
    """The server's greedy answers, all asked for at once.

    Raises:
        HouseError: A prompt was not answered within `timeout` seconds.
    """

    def one(prompt: trained.Prompt) -> Answer:
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
        found = json.load(server.ask("/generate", data, timeout))["meta_info"]
        return Answer(
            [token for _, token, _ in found["output_token_logprobs"]],
            [
                [logprob for logprob, _, _ in given]
                for given in found["output_token_ids_logprobs"]
            ],
        )

    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        try:
            return list(pool.map(one, asked))
        except OSError as e:
            server.check_alive("while it answered")
            raise HouseError(
                f"{server.arm.name} did not answer a prompt ({e}): see {server.log}."
            ) from None


class Reference:
    """transformers, which reads prompt and answer in one pass.

    Attributes:
        dtype: float32 for what is right, bfloat16 for what rounding does.
    """

    def __init__(self, model: Path, dtype: str = "float32"):
        import torch
        from transformers import Gemma4ForConditionalGeneration

        self.device = "cuda" if serving.has_gpu() else "cpu"
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


def differ(prompt: trained.Prompt, answer: Answer, logprobs) -> Difference:
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


def case(prompt: trained.Prompt) -> Dict[str, object]:
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


# Arms that are wrong on purpose ---------------------------------------------


def wrong_model(model: Path, folder: Path, **text) -> Path:
    """The same weights under a config that was changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        link = folder / file.name
        if file.name != "config.json" and not link.exists():
            os.symlink(file.resolve(), link)
    config = json.loads((model / "config.json").read_text())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wrong_arms(names: List[str], model: Path, folder: Path) -> Dict[str, tuple]:
    """Name -> (the model to serve, flags of the server)."""
    experts = trained.SHAPE.text["top_k_experts"] - 1
    pools = "--swa-full-tokens-ratio 0.005"
    known = {
        "window": [
            (f"window {trained.WINDOW + by:d}", {"sliding_window": trained.WINDOW + by})
            for by in (1, -1)
        ],
        "experts": [(f"{experts} experts", {"top_k_experts": experts})],
        "pools": [("pools too small", {})],
    }
    arms = {}
    for name in names:
        for title, text in known[name]:
            where = wrong_model(model, folder / title.replace(" ", "-"), **text)
            flags = shlex.split(pools) if name == "pools" else []
            arms[title] = (where, flags)
    return arms


# The program -----------------------------------------------------------------


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="quality", help="of the result file")
    parser.add_argument("--model", type=Path, default=serving.CACHE / "gemma-4-trained")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: base,fork")
    parser.add_argument("--arm", action="append", default=[], metavar="ARM")
    parser.add_argument("--wrong", default="", help="of window,experts,pools; a list")
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--mmlu", type=Path, metavar="CSV", help="ask these instead")
    parser.add_argument("--flags", default="", help="more for every server")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--start-timeout", type=float, default=900)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--logs", type=Path, default=serving.CACHE / "logs")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    with serving.reported("eval_quality.py"):
        path = args.out / f"{args.name}.json"
        serving.check_new(path)
        if not args.mmlu and not (args.model / "config.json").exists():
            raise HouseError(
                f"{args.model} is not there: `python benchmark/gemma4/trained.py "
                f"{args.model}` trains it."
            )
        serving.check_model(args.model)
        serving.check_port(args.port)
        if not serving.has_weights(args.model):
            raise HouseError(f"--model {args.model} has no weights to ask.")
        if args.mmlu and not args.mmlu.is_file():
            raise HouseError(
                f"--mmlu {args.mmlu} is not there: it is simple-evals' mmlu.csv."
            )
        args.model, args.logs = args.model.resolve(), args.logs.resolve()
        arms = serving.chosen_arms(args.arms, args.arm, ["base", "fork"])
        title = "MMLU" if args.mmlu else "A small trained Gemma-4 MoE"
        results = Results.start(
            *("quality", args.name, title),
            model=args.model.name,
            server=args.flags,
            arms={arm.name: arm.describe() for arm in arms},
        )
        failed = (mmlu if args.mmlu else compare)(args, arms, results)
        for metric in dict.fromkeys(record.metric for record in results.records):
            print(f"\n{table(results, metric)}")
        print(f"\nwrote {results.save(path)}")
        for line in failed:
            print(line, file=sys.stderr)
        if failed:
            sys.exit(1)


def compare(args, arms: List[Arm], results: Results) -> List[str]:
    """Asks the trained model; returns what is wrong with any arm that should be right."""
    asked = prompts(args.prompts)
    names = [name for name in args.wrong.split(",") if name]
    folder = args.logs / args.name
    served = [(arm, args.model, []) for arm in arms]
    for title, (model, flags) in wrong_arms(names, args.model, folder).items():
        wrong = dataclasses.replace(arms[-1], name=f"wrong: {title}")
        served.append((wrong, model, flags))
    answers: Dict[str, List[Answer]] = {}
    silent: Dict[str, str] = {}
    slowest = 0.0
    with tqdm(total=len(served) + 2, unit="arm", disable=None) as bar:
        for arm, model, flags in served:
            bar.set_description(arm.name)
            setup = Setup(
                *(model, args.port),
                context=CONTEXT,
                flags=[*shlex.split(args.flags), *flags],
            )
            log = folder / f"{arm.name.replace(' ', '-')}.server.log"
            server = Server(arm, setup, log)
            # One that is wrong may never answer; it gets the time that others took.
            begin, wrong = time.monotonic(), arm.name.startswith("wrong: ")
            timeout = 60 + 3 * slowest if wrong and slowest else 900
            with server.running(args.start_timeout):
                try:
                    answers[arm.name] = ask(server, asked, timeout)
                except HouseError as e:
                    if not wrong:
                        raise
                    silent[arm.name] = str(e)
            slowest = max(slowest, 0 if wrong else time.monotonic() - begin)
            bar.update()
        bar.set_description(REFERENCE)
        reference = Reference(args.model)
        found = {
            name: [
                differ(p, a, reference.logprobs(p.tokens, a.tokens))
                for p, a in zip(asked, given)
            ]
            for name, given in answers.items()
        }
        bar.update()
        bar.set_description(NOISE)
        rounded = Reference(args.model, "bfloat16")
        answers[NOISE], found[NOISE] = [], []
        for p in asked:
            logprobs = rounded.logprobs(p.tokens, p.answer)
            best, choice = logprobs.max(dim=-1)
            answer = Answer(p.answer, logprobs[:, VALUES].tolist())
            answers[NOISE].append(answer)
            exact = reference.logprobs(p.tokens, p.answer)
            difference = differ(p, answer, exact)
            difference.right = [a == b for a, b in zip(choice.tolist(), p.answer)]
            own = exact.max(dim=-1)[1].tolist()
            difference.chosen = [a == b for a, b in zip(choice.tolist(), own)]
            found[NOISE].append(difference)
        bar.update()
    failed = []
    for name, differences in found.items():
        record(results, name, asked, differences)
        said = judge(name, asked, answers[name], differences, found[NOISE])
        if name.startswith("wrong: "):
            print(f"{name}: {'caught: ' + said[0] if said else 'NOT caught'}")
            failed += [] if said else [f"{name} was not caught"]
        elif name != NOISE:
            failed += said
    for name, said in silent.items():
        print(f"{name}: caught: {said}")
        results.notes.append(f"{name} did not answer at all.")
    return failed


def mmlu_questions(path: Path) -> List[Tuple[str, str]]:
    """(prompt, letter of the right choice) of the questions that are asked."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = random.Random(0).sample(rows, min(MMLU_QUESTIONS, len(rows)))
    return [(MMLU_PROMPT.format_map(row), row["Answer"]) for row in chosen]


def mmlu_letter(text: str) -> Optional[str]:
    """The letter that an answer chooses last, or None."""
    found = re.findall(r"answer\W*([A-D])\b", text, re.IGNORECASE)
    return found[-1].upper() if found else None


def chat(server: Server, prompt: str) -> str:
    """What the server answers to a user's message, without sampling."""
    data = {
        "model": str(server.setup.model),
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 2048,
    }
    with server.ask("/v1/chat/completions", data, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]["content"] or ""


def mmlu(args, arms: List[Arm], results: Results) -> List[str]:
    asked = mmlu_questions(args.mmlu)
    results.settings["questions"] = len(asked)
    for arm in arms:
        setup = Setup(args.model, args.port, flags=shlex.split(args.flags))
        server = Server(arm, setup, args.logs / args.name / f"{arm.name}.server.log")
        with server.running(args.start_timeout):
            with concurrent.futures.ThreadPoolExecutor(MMLU_AT_ONCE) as pool:
                said = pool.map(lambda pair: chat(server, pair[0]), asked)
                right = [mmlu_letter(text) == a for text, (_, a) in zip(said, asked)]
            share = 100 * sum(right) / len(right)
            results.add({"task": "MMLU"}, arm.name, "right", "%", [share])
    return []


if __name__ == "__main__":
    main()
