"""MMLU: 500 questions, seed 0, temperature 0, in a prompt of our own."""

import concurrent.futures
import csv
import random
import re
import shlex
from pathlib import Path
from typing import List, Optional, Tuple

from gemma4.engines.arms import Arm
from gemma4.engines.servers import ArmServer, Setup
from gemma4.report.results import Results

QUESTIONS, AT_ONCE = 500, 64
PROMPT = """\
Which of the four choices answers the question? Reason first, and end with a line that
reads "Answer: X", where X is the letter of the choice.

{Question}

A. {A}
B. {B}
C. {C}
D. {D}
"""


def questions(path: Path) -> List[Tuple[str, str]]:
    """(prompt, letter of the right choice) of the questions that are asked."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = random.Random(0).sample(rows, min(QUESTIONS, len(rows)))
    return [(PROMPT.format_map(row), row["Answer"]) for row in chosen]


def letter(text: str) -> Optional[str]:
    """The letter that an answer chooses last, or None."""
    found = re.findall(r"answer\W*([A-D])\b", text, re.IGNORECASE)
    return found[-1].upper() if found else None


def chat(server: ArmServer, prompt: str) -> str:
    """What the server answers to a user's message, without sampling."""
    data = {
        "model": str(server.setup.model),
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 2048,
    }
    found = server.answer("/v1/chat/completions", data, timeout=600)
    return found["choices"][0]["message"]["content"] or ""


def compare(args, arms: List[Arm], results: Results) -> List[str]:
    """Asks each arm; nothing it answers is a failure."""
    asked = questions(args.mmlu)
    results.settings["questions"] = len(asked)
    for arm in arms:
        setup = Setup(args.model, args.port, flags=shlex.split(args.flags))
        server = ArmServer(arm, setup, args.logs / args.name / f"{arm.name}.server.log")
        with server.running(args.start_timeout):
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                said = pool.map(lambda pair: chat(server, pair[0]), asked)
                right = [letter(text) == a for text, (_, a) in zip(said, asked)]
            share = 100 * sum(right) / len(right)
            results.add({"task": "MMLU"}, arm.name, "right", "%", [share])
    return []
