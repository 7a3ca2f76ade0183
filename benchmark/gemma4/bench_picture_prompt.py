"""Time prompts with a picture beside prompts without one, over HTTP.

    python benchmark/gemma4/bench_picture_prompt.py --arms base,fork
    python benchmark/gemma4/bench_picture_prompt.py --tokens 1000 8000 --pictures 4

Each arm's server, with random weights and a whole vision tower, answers one request
after the other with one token: in turn a prompt of text alone, and one with pictures
that has as many tokens, theirs among them. No two prompts share a text or a picture, so
nothing is cached. What is timed is the whole request, decoding and cutting up the
pictures included. `--shape tiny` runs on a CPU, to try the program.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import List, Optional, Tuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import serving  # noqa: E402
from checkpoint import SHAPES, write_checkpoint  # noqa: E402
from eval_pictures import MARK, data_url  # noqa: E402
from plan_kv_pools import positive  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402
from serving import Arm, HouseError, Server, Setup  # noqa: E402

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
        import numpy as np
        from PIL import Image

        height, width = self.shape
        coarse = self.random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
        return data_url(image, "JPEG", quality=90)


def send(server: Server, text: str, pictures: List[str]) -> Tuple[int, float]:
    """(tokens of the prompt, milliseconds until the answer).

    Raises:
        HouseError: The server died, or refused it.
    """
    data = {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    if pictures:
        data["image_data"] = pictures
    start = time.perf_counter()
    said = server.generate(data)
    took = 1000 * (time.perf_counter() - start)
    return said["meta_info"]["prompt_tokens"], took


def words_for(server: Server, prompts: Prompts, tokens: int, pictures: int) -> int:
    """How many words beside the pictures make so many tokens.

    Raises:
        HouseError: The pictures alone make more.
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
        raise HouseError(
            f"--tokens {tokens}: {pictures} pictures have more; ask for more tokens, or "
            "fewer pictures."
        )
    return words


def measure(args: argparse.Namespace, arm: Arm, setup: Setup, results: Results) -> None:
    prompts = Prompts(args.height, args.width)
    log = args.logs / f"{args.name}-{arm.name.replace(' ', '-')}.server.log"
    server = Server(arm, setup, log)
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
                        raise HouseError(
                            f"A prompt for {tokens} tokens has {found}: another "
                            "tokenizer than the factory's?"
                        )
                    if turn:  # the first compiles
                        case = {"tokens": tokens, "prompt": kind}
                        results.append(case, arm.name, TIME, "ms", round(took, 3))


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="picture-prompt", help="of the result file")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: fork")
    parser.add_argument("--arm", action="append", default=[], metavar="ARM")
    parser.add_argument("--shape", default="26b-a4b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[8000])
    parser.add_argument("--pictures", type=positive, default=1, help="of a prompt")
    parser.add_argument("--height", type=positive, default=480)
    parser.add_argument("--width", type=positive, default=640)
    parser.add_argument("--repeats", type=positive, default=15, help="of each prompt")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--start-timeout", type=float, default=900)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--logs", type=Path, default=serving.CACHE / "logs")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    with serving.reported("bench_picture_prompt.py"):
        path = args.out / f"{args.name}.json"
        serving.check_new(path)
        if args.shape not in SHAPES:
            raise HouseError(f"--shape {args.shape}: choose of {', '.join(SHAPES)}.")
        serving.check_port(args.port)
        args.logs = args.logs.resolve()
        arms = serving.chosen_arms(args.arms, args.arm, ["fork"])
        results = Results.start(
            *("serving", args.name, "Prompts with pictures beside prompts without"),
            shape=args.shape,
            height=args.height,
            width=args.width,
            arms={arm.name: arm.describe() for arm in arms},
        )
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder, "model")
            write_checkpoint(model, args.shape, weights=False)
            setup = Setup(model, args.port, context=max(args.tokens) + 512)
            for arm in arms:
                measure(args, arm, setup, results)
        print(f"wrote {results.save(path)}\n\n{table(results, TIME)}")


if __name__ == "__main__":
    main()
