"""Compare the answers of several arms to prompts with pictures, with transformers.

    python benchmark/gemma4/eval_pictures.py --arms fork
    python benchmark/gemma4/eval_pictures.py --arms base,fork --arm 'fork fa3=--mm-attention-backend fa3'

Small models of the family with random weights answer prompts with pictures through each
arm's server, greedily: of all forms, several, the same twice, at once, behind a cached
prefix, and each more than once. transformers, in float32, then reads prompt and answer
in one pass without a cache. For each kind of prompt: how far the worst logprob is from
transformers', and how many answered tokens are not transformers' first choice.

On a GPU the servers run in bfloat16, and transformers in bfloat16 is compared in the
same way. An arm of this checkout's that is more than three times as far, or that
answers a token which float32 finds clearly less likely than its own choice, has failed,
and the program ends with exit status 1. On a CPU the servers run in float32: no token
may differ, and no logprob by more than 1e-5.
"""

import argparse
import base64
import dataclasses
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import serving  # noqa: E402
from checkpoint import SHAPES, write_checkpoint  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402
from serving import Arm, HouseError, Server, Setup  # noqa: E402

SIZES = {  # (height, width)
    "square": (96, 96),
    "tall": (400, 60),
    "wide": (60, 400),
    "small": (17, 23),
    "large": (700, 900),
}
MARK = "<|image|>"
WORDS = "look at this ba be bi bo bu da de di do du fa fe fi fo fu".split()
NEW_TOKENS = 16
POOL_TOKENS = 8192
EXACT = 1e-5
# How much farther from float32 than transformers in bfloat16 an arm may be.
ROOM = 3.0
NOISE = "transformers, bfloat16"
OTHERS = "not transformers' choice"

# A prompt: its text, and of each of its pictures a key of SIZES and a seed.
Prompt = Tuple[str, List[Tuple[str, int]]]


@dataclasses.dataclass
class Ask:
    """Prompts of one request, of which each gets `n` answers."""

    prompts: List[Prompt]
    n: int = 1


def _text(words: int, seed: int = 0) -> str:
    import numpy as np

    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def cases() -> Dict[str, List[Ask]]:
    """Kind of prompt -> what is asked of it, one request after the other."""
    middle = f"{_text(9)} {MARK} {_text(7, 1)}"
    found = {f"one, {name}": [Ask([(middle, [(name, 0)])])] for name in SIZES}
    found["at the end"] = [
        Ask([(f"{_text(40)} {MARK}", [(name, 0)])]) for name in ("square", "wide")
    ]
    found["another, same text"] = [
        Ask([(middle, [("tall", seed)])]) for seed in range(3)
    ]
    found["several"] = [
        Ask(
            [
                (
                    f"{_text(5)} {MARK} {_text(3)} {MARK} {_text(60, 2)} {MARK} go",
                    [(name, 0) for name in ("wide", "tall", "small")],
                )
            ]
        )
    ]
    found["the same three times"] = [
        Ask([(f"{MARK} {_text(4)} {MARK} {MARK} go", [("square", 0)] * 3)])
    ]
    found["no text"] = [Ask([(f"{MARK}{MARK}", [("square", 0), ("tall", 0)])])]
    together = [
        (f"{_text(5 + 11 * i, i)} {MARK} {_text(3, i)}", [(name, i)])
        for i, name in enumerate([*SIZES, "tall"])
    ]
    together.append((f"{MARK} {_text(20, 9)} {MARK}", [("wide", 7), ("small", 8)]))
    together.append((_text(50, 10), []))
    found["eight at once"] = [Ask(together)]
    start = _text(50, 11)
    whole = f"{start} {MARK} {_text(9, 1)}"
    found["behind a cached prefix"] = [
        Ask([(start, [])]),
        Ask([(whole, [("square", 0)])]),
        Ask([(f"{whole} {_text(9, 2)}", [("square", 0)])]),
        Ask([(f"{whole} {MARK} {_text(5)}", [("square", 0), ("tall", 0)])]),
    ]
    for n in (2, 3):
        pictures = [("tall", 0), ("wide", 0), ("tall", 0)]
        found[f"n {n}"] = [
            Ask([(f"{_text(9)} {MARK} go", pictures[:1])], n),
            Ask([(f"{MARK} {_text(9)} {MARK}", pictures[:2])], n),
            Ask([(f"{MARK} {MARK} {_text(9)} {MARK}", pictures)], n),
        ]
    return found


def picture(name: str, seed: int):
    """Random colors."""
    import numpy as np
    from PIL import Image

    shape = (*SIZES[name], 3)
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), "RGB")


def data_url(image, form: str = "PNG", **options) -> str:
    """An image as a request has it."""
    file = io.BytesIO()
    image.save(file, form, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{data}"


@dataclasses.dataclass
class Answer:
    """What an arm answered to a prompt: tokens, and the logprob of each."""

    prompt: Prompt
    tokens: List[int]
    logprobs: List[float]


def ask(server: Server, asked: Ask) -> List[Answer]:
    """The answers of a request, `n` a prompt.

    Raises:
        HouseError: The server died, or did not answer.
    """
    data = {
        "text": [text for text, _ in asked.prompts],
        "image_data": [[data_url(picture(*p)) for p in of] for _, of in asked.prompts],
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": NEW_TOKENS,
            "ignore_eos": True,
            "n": asked.n,
        },
        "return_logprob": True,
    }
    if len(asked.prompts) == 1:
        data.update(text=data["text"][0], image_data=data["image_data"][0])
    said = server.generate(data)
    said = said if isinstance(said, list) else [said]
    return [
        Answer(
            asked.prompts[i // asked.n],
            answer["output_ids"],
            [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
        )
        for i, answer in enumerate(said)
    ]


class Reference:
    """transformers, which reads prompt and answer in one pass.

    On the CPU, where small models take less time than a GPU's launches do.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        import torch
        import transformers

        config = json.loads((folder / "config.json").read_text())
        self.dtype = getattr(torch, dtype)
        model_class = getattr(transformers, config["architectures"][0])
        self.model = model_class.from_pretrained(
            folder,
            dtype=self.dtype,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        self.model.eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def logprobs(self, answer: Answer):
        """Of every token of the vocabulary at each of the answer's places, float32."""
        import torch

        text, pictures = answer.prompt
        images = [picture(*p) for p in pictures] or None
        inputs = self.processor(text=text, images=images, return_tensors="pt")
        inputs = inputs.to(self.dtype)
        new = torch.tensor([answer.tokens])
        ids = inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            types = torch.cat([types, torch.zeros_like(new)], dim=1)
            inputs["mm_token_type_ids"] = types
        # Gemma's own masks; those of 12B's forward pass differ in transformers 5.19.
        inputs["attention_mask"] = self.model.create_masks_for_generate(
            self.model.config,
            inputs_embeds=self.model.get_input_embeddings()(ids),
            attention_mask=torch.ones_like(ids),
            past_key_values=None,
            position_ids=torch.arange(ids.shape[1])[None],
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
        )
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, -len(answer.tokens) - 1 : -1]
            logits[:, self.model.generation_config.suppress_tokens or []] = -torch.inf
            return torch.log_softmax(logits.float(), dim=-1)


@dataclasses.dataclass
class Difference:
    """Answers to prompts of one kind beside float32.

    Attributes:
        apart: How far the logprob of a token is from float32's, at the worst, in nats.
        behind: How much less likely than its own choice float32 finds one, likewise.
        others: Tokens that are not its choice.
    """

    apart: float = 0.0
    behind: float = 0.0
    others: int = 0

    def see(self, answer: Answer, exact) -> None:
        best, choice = exact.max(dim=-1)
        for i, (token, given) in enumerate(zip(answer.tokens, answer.logprobs)):
            own = exact[i, token].item()
            self.apart = max(self.apart, abs(given - own))
            self.behind = max(self.behind, best[i].item() - own)
            self.others += token != choice[i].item()


def judge(found: Dict[str, Difference], noise: Optional[Dict[str, Difference]]):
    """What is wrong, in words; nothing if it is what transformers says.

    `noise` is None where the arm answered in float32.
    """
    for kind, mine in found.items():
        if noise is None:
            allowed, tie = EXACT, 0.0
        else:
            typical = sum(d.apart for d in noise.values()) / len(noise)
            allowed = ROOM * max(noise[kind].apart, typical)
            tie = 2 * allowed
        if not mine.apart <= allowed:
            yield f"{kind}: a logprob is {mine.apart:.2e} off, {allowed:.2e} is allowed"
        if not mine.behind <= tie:
            yield (
                f"{kind}: a token that float32 finds {mine.behind:.2e} nats less likely "
                f"than its choice, {tie:.2e} is allowed"
            )


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="pictures", help="of the result file")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: fork")
    parser.add_argument("--arm", action="append", default=[], metavar="ARM")
    parser.add_argument("--shapes", default="tiny", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--mtp", action="store_true", help="with drafts")
    parser.add_argument("--chunk", type=int, default=24, help="tokens of a prefill")
    parser.add_argument("--flags", default="", help="more for every server")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--start-timeout", type=float, default=900)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--logs", type=Path, default=serving.CACHE / "logs")
    return parser.parse_args(argv)


def collect(
    arm: Arm, setup: Setup, log: Path, timeout: float, bar
) -> Tuple[dict, dict]:
    """(kind -> answers, kind -> why there are none), of a server started anew where it
    died."""
    answers, silent, left = {}, {}, cases()
    while left:
        server, kind = Server(arm, setup, log), ""
        try:
            with server.running(timeout):
                while left:
                    kind = next(iter(left))
                    asks = left.pop(kind)
                    server.ask("/flush_cache", {})
                    answers[kind] = [a for asked in asks for a in ask(server, asked)]
                    bar.update()
        except HouseError as e:
            why = str(e).replace(str(log), log.name)
            if kind:
                silent[kind] = why
            elif arm.path is None:
                raise
            else:  # it does not start
                silent.update(dict.fromkeys(left, why))
                left = {}
            bar.update()
    return answers, silent


def kept(arm: Arm, setup: Setup, log: Path, timeout: float, bar) -> Tuple[dict, dict]:
    """What `collect` says, asked once: of the same code, command and prompts it is
    read from a file beside the log."""
    file = log.with_suffix(".json")
    asked = {kind: [vars(a) for a in asks] for kind, asks in cases().items()}
    what = json.loads(json.dumps([arm.code, setup.command(arm)[1:], asked]))
    if file.exists():
        was, answers, silent = json.loads(file.read_text())
        if was == what:
            bar.update(len(asked))
            return {k: [Answer(**a) for a in of] for k, of in answers.items()}, silent
    answers, silent = collect(arm, setup, log, timeout, bar)
    plain = {kind: [vars(a) for a in of] for kind, of in answers.items()}
    file.write_text(json.dumps([what, plain, silent]))
    return answers, silent


def compare(args, arms: List[Arm], results: Results) -> List[str]:
    """Asks each arm; returns what is wrong with the fork's."""
    wrong, shapes = [], args.shapes.split(",")
    folder = args.logs / args.name
    on_gpu = serving.has_gpu()
    dtype = "bfloat16" if on_gpu else "float32"
    flags = [*("--dtype", dtype, "--max-total-tokens", str(POOL_TOKENS))]
    flags += ["--chunked-prefill-size", str(args.chunk), *shlex.split(args.flags)]
    total = len(shapes) * (len(arms) + on_gpu + 1) * len(cases())
    with tqdm(total=total, unit="kind", disable=None) as bar:
        for shape in shapes:
            model, draft = folder / shape, None
            write_checkpoint(model, shape, dtype=dtype, overwrite=True)
            if args.mtp:
                draft = folder / f"{shape}-draft"
                write_checkpoint(
                    draft, shape, assistant=True, dtype=dtype, overwrite=True
                )
            setup = Setup(model, args.port, context=4096, draft=draft, requests=8)
            setup.flags = flags
            given = {}
            for arm in arms:
                bar.set_description(f"{shape}, {arm.name}")
                log = folder / f"{shape}-{arm.name.replace(' ', '-')}.server.log"
                given[arm.name], silent = kept(arm, setup, log, args.start_timeout, bar)
                for kind, why in silent.items():
                    results.notes.append(f"{shape}, {arm.name}, {kind}: {why}")
                    if arm.path is None:
                        wrong.append(f"{shape}, {arm.name}: {kind}: {why}")
            bar.set_description(f"{shape}, transformers")
            found = read(model, given, on_gpu, bar)
            for name, differences in found.items():
                for kind, difference in differences.items():
                    case = {"shape": shape, "mtp": args.mtp, "prompts": kind}
                    for metric, unit, value in (
                        ("worst logprob", "nats", difference.apart),
                        (OTHERS, "tokens", difference.others),
                    ):
                        results.add(case, name, metric, unit, [value])
            noise = found.get(NOISE)
            for arm in arms:
                if arm.path is None:
                    said = judge(found[arm.name], noise)
                    wrong += [f"{shape}, {arm.name}: {line}" for line in said]
    return wrong


def read(model: Path, given: Dict[str, dict], on_gpu: bool, bar) -> Dict[str, dict]:
    """Arm -> kind -> difference from float32; on a GPU also what transformers in
    bfloat16 would choose after each token that the last arm answered."""
    exact = Reference(model)
    found = {name: {} for name in given}
    for kind in cases():
        for name, answers in given.items():
            if kind in answers:
                difference = found[name][kind] = Difference()
                for answer in answers[kind]:
                    difference.see(answer, exact.logprobs(answer))
        bar.update()
    if on_gpu:
        rounded, found[NOISE] = Reference(model, "bfloat16"), {}
        for kind, answers in list(given.values())[-1].items():
            difference = found[NOISE][kind] = Difference()
            for answer in answers:
                best, choice = rounded.logprobs(answer).max(dim=-1)
                own = Answer(answer.prompt, choice.tolist(), best.tolist())
                difference.see(own, exact.logprobs(answer))
            bar.update()
    return found


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    with serving.reported("eval_pictures.py"):
        path = args.out / f"{args.name}.json"
        serving.check_new(path)
        unknown = [name for name in args.shapes.split(",") if name not in SHAPES]
        if unknown:
            raise HouseError(
                f"--shapes {', '.join(unknown)}: choose of {', '.join(SHAPES)}."
            )
        serving.check_port(args.port)
        args.logs = args.logs.resolve()
        arms = serving.chosen_arms(args.arms, args.arm, ["fork"])
        results = Results.start(
            *("quality", args.name, "Prompts with pictures, small models"),
            server=args.flags,
            chunk=args.chunk,
            arms={arm.name: arm.describe() for arm in arms},
        )
        wrong = compare(args, arms, results)
        print(f"\n{table(results, 'worst logprob')}")
        print(f"\n{table(results, OTHERS)}")
        print(f"\nwrote {results.save(path)}")
        for note in results.notes:
            print(note)
        for line in wrong:
            print(line, file=sys.stderr)
        if wrong:
            sys.exit(1)


if __name__ == "__main__":
    main()
