"""Time prompts with a picture beside prompts without one, over HTTP.

    python -m gemma4 picture-prompt --arms base,fork
    python -m gemma4 picture-prompt --tokens 1000 8000 --pictures 4

Each arm's server, with random weights and a whole vision tower, answers one request
after the other with one token: in turn a prompt of text alone, and one with pictures
that has as many tokens, theirs among them. No two prompts share a text or a picture, so
nothing is cached. What is timed is the whole request, decoding and cutting up the
pictures included. `--shape tiny` runs on a CPU, to try the program.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import List, Tuple

from gemma4.arguments import check_shapes, new_result_path, positive
from gemma4.checkpoint import write_checkpoint
from gemma4.engines.arms import Arm, chosen_arms, described
from gemma4.engines.host import check_port
from gemma4.engines.servers import ArmServer, Server, Setup
from gemma4.errors import UserError
from gemma4.quality.picture_cases import MARK, data_url, soft_shapes
from gemma4.report.results import Results
from gemma4.report.tables import table
from tqdm import tqdm

SYLLABLES = [a + b for a in "bdfgklmnpr" for b in "aeiou"]
TIME = "time of a request"
TEXT = "text"


class Prompts:
    """Prompts of so many tokens; each is another.

    Args:
        height, width: Of the pictures, in pixels.
    """

    def __init__(self, height: int, width: int):
        import numpy as np

        self.random = np.random.default_rng(0)
        self.shape = (height, width)

    def text(self, words: int) -> str:
        return " ".join(self.random.choice(SYLLABLES, words))

    def picture(self) -> str:
        """A JPEG of soft shapes, as large as a photograph would be."""
        image = soft_shapes(self.random, *self.shape)
        return data_url(image, "JPEG", quality=90)


def send(server: Server, text: str, pictures: List[str]) -> Tuple[int, float]:
    """(tokens of the prompt, milliseconds until the answer).

    Raises:
        UserError: The server died, or refused it.
    """
    data = {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    if pictures:
        data["image_data"] = pictures
    start = time.perf_counter()
    said = server.answer("/generate", data)
    took = 1000 * (time.perf_counter() - start)
    return said["meta_info"]["prompt_tokens"], took


def words_for(server: Server, prompts: Prompts, tokens: int, pictures: int) -> int:
    """How many words beside the pictures make so many tokens.

    Raises:
        UserError: The pictures alone make more.
    """
    few, many = (
        send(
            server,
            MARK * pictures + prompts.text(words),
            [prompts.picture() for _ in range(pictures)],
        )[0]
        for words in (8, 24)
    )
    words = 8 + (tokens - few) * 16 // (many - few)
    if words < 1:
        raise UserError(
            f"--tokens {tokens}: {pictures} pictures have more; ask for more tokens, or "
            "fewer pictures."
        )
    return words


def measure(args: argparse.Namespace, arm: Arm, setup: Setup, results: Results) -> None:
    prompts = Prompts(args.height, args.width)
    log = args.logs / f"{args.name}-{arm.name.replace(' ', '-')}.server.log"
    server = ArmServer(arm, setup, log)
    with server.running(args.start_timeout):
        for tokens in args.tokens:
            kinds = {TEXT: 0, f"{args.pictures} of its pictures": args.pictures}
            words = {k: words_for(server, prompts, tokens, n) for k, n in kinds.items()}
            for turn in tqdm(range(args.repeats + 1), desc=f"{arm.name}, {tokens}"):
                for kind, pictures in kinds.items():
                    given = [prompts.picture() for _ in range(pictures)]
                    text = MARK * pictures + prompts.text(words[kind])
                    found, took = send(server, text, given)
                    if abs(found - tokens) > 1 + tokens // 100:
                        raise UserError(
                            f"A prompt for {tokens} tokens has {found}: another "
                            "tokenizer than the factory's?"
                        )
                    if turn:  # the first compiles
                        case = {"tokens": tokens, "prompt": kind}
                        results.append(case, arm.name, TIME, "ms", round(took, 3))


def arguments(parser) -> None:
    parser.add_result("picture-prompt")
    parser.add_arms("fork")
    parser.add_servers(flags=False)
    parser.add_shape()
    parser.add_picture_size()
    sentence = "How many tokens a prompt has; several numbers take their turns."
    parser.add("--tokens", sentence, (8000,), type=positive, nargs="+")
    parser.add("--pictures", "How many pictures a prompt has.", 1)
    parser.add("--repeats", "How often each prompt is timed.", 15)


def run(args: argparse.Namespace) -> None:
    path = new_result_path(args)
    check_shapes("--shape", [args.shape])
    check_port(args.port)
    args.logs = args.logs.resolve()
    arms = chosen_arms(args)
    results = Results.start(
        *("serving", args.name, "Prompts with pictures beside prompts without"),
        shape=args.shape,
        height=args.height,
        width=args.width,
        arms=described(arms),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_checkpoint(model, args.shape, weights=False)
        setup = Setup(model, args.port, context=max(args.tokens) + 512)
        for arm in arms:
            measure(args, arm, setup, results)
    print(f"wrote {results.save(path)}\n\n{table(results, TIME)}")
