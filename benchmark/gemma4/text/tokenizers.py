"""Times how a prompt's text becomes token ids.

    python -m gemma4 tokenizers
    python -m gemma4 tokenizers --tokenizer /models/gemma-4-26B-A4B-it

Prompts of 8000 tokens of prose, of code and of random tokens are encoded in turn by the
tokenizer's own call, which keeps the place of each token in the text; without places, as
encode-texts does; and with fastokens, where that is installed (`pip install fastokens`).
Prose with a picture of 640 x 480 goes through transformers' processor, beside whose work
the text was encoded once more, and through media-text, which has it expand the markers
alone. All must give the same ids, or the program ends with exit status 1. What is timed is
the processor time of a prompt, and the time until the tokenizer is loaded.

Prose and code are what Python itself ships: its manual's topics and its library. A
tokenizer of Gemma's rules with 262,144 tokens is trained on the half of it that is not
asked about, unless --tokenizer names the folder of a checkpoint.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from gemma4.arguments import new_result_path
from gemma4.engines.host import offline
from gemma4.errors import UserError
from gemma4.quality.command import finish
from gemma4.quality.picture_cases import soft_shapes
from gemma4.report.results import Results
from gemma4.text.prompts import CODE, PROSE, RANDOM, corpus, prompts, train
from tqdm import tqdm

VOCABULARY = 262_144
TIME, LOADED = "processor time", "time to load"
CALL, WITHOUT, FASTOKENS = "tokenizer's own call", "without places", "fastokens"
PICTURE, BOTH = "a picture", "prose and a picture"

Encode = Callable[[str], List[int]]


def load(folder: Path) -> Tuple[object, Dict[str, Encode], Dict[str, float]]:
    """The tokenizer, and arm -> how a text is encoded, seconds until it is loaded."""
    from sglang.srt.utils.encode_texts import encode_texts
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    def timed(**kwargs):
        start = time.perf_counter()
        return get_tokenizer(str(folder), **kwargs), time.perf_counter() - start

    plain, took = timed()
    if encode_texts(plain, ["a"]) is None:
        raise UserError(f"--tokenizer {folder}: encode-texts leaves this one alone.")
    arms = {
        CALL: lambda text: plain([text])["input_ids"][0],
        WITHOUT: lambda text: encode_texts(plain, [text])[0],
    }
    loaded = {CALL: took}
    if importlib.util.find_spec("fastokens"):
        fast, loaded[FASTOKENS] = timed(tokenizer_backend="fastokens")

        def encode(text):
            found = encode_texts(fast, [text])
            return (found or fast([text])["input_ids"])[0]

        arms[FASTOKENS] = encode
    return plain, arms, loaded


def picture_arms(folder: Path) -> Tuple[str, Dict[str, Callable]]:
    """The marker of a picture, and arm -> how a text and its picture are encoded."""
    from transformers import AutoProcessor

    from sglang.srt.multimodal.gemma4_prompt import encode_around, expand, find_markers

    processor = AutoProcessor.from_pretrained(folder)
    tokenizer, markers = processor.tokenizer, find_markers(processor)
    if markers is None:
        raise UserError(f"--tokenizer {folder}: media-text leaves this one alone.")

    def read(text: str, image, **kwargs) -> List[int]:
        made = processor(
            text=[text], images=[image], padding=True, return_tensors="pt", **kwargs
        )
        return made["input_ids"][0].tolist()

    def whole(text: str, image) -> List[int]:
        tokenizer([text])  # by the tokenizer manager, for nothing
        return read(text, image)

    def around(text: str, image) -> List[int]:
        marks, ids = encode_around(markers, tokenizer, text, {processor.image_token: 1})
        return expand(markers, ids, read(marks, image, add_special_tokens=False))

    return processor.image_token, {CALL: whole, WITHOUT: around}


def measure(args, folder: Path, asked: Dict[str, str], results: Results) -> List[str]:
    """Adds what each arm takes; returns what is wrong, in words."""
    import numpy as np

    # Before fastokens changes how transformers loads.
    marker, with_picture = picture_arms(folder)
    tokenizer, arms, loaded = load(folder)
    for arm, took in loaded.items():
        results.add({"vocabulary": len(tokenizer)}, arm, LOADED, "s", [round(took, 3)])
    texts = {
        kind: prompts(
            tokenizer, kind, asked.get(kind, ""), args.tokens, args.repeats + 1
        )
        for kind in (PROSE, CODE, RANDOM)
    }
    random = np.random.default_rng(0)
    images = [soft_shapes(random, 480, 640) for _ in range(args.repeats + 1)]
    wrong = []
    for kind in texts:
        given = [(text,) for text in texts[kind]]
        wrong += time_arms(kind, args.tokens, arms, given, results)
    for kind, before in ((PICTURE, [""] * len(images)), (BOTH, texts[PROSE])):
        given = [(marker + text, image) for text, image in zip(before, images)]
        tokens = args.tokens if kind == BOTH else 0
        wrong += time_arms(kind, tokens, with_picture, given, results)
    return wrong


def time_arms(
    kind: str, tokens: int, arms: Dict[str, Callable], given: list, results: Results
) -> List[str]:
    """Adds the times of each arm with these arguments, in turn; returns what is wrong."""
    wrong = []
    for turn, arguments in enumerate(tqdm(given, desc=kind, disable=None)):
        found = {}
        for arm, encode in arms.items():
            start = time.process_time()
            found[arm] = encode(*arguments)
            took = 1e3 * (time.process_time() - start)
            if turn:  # the first builds what later ones use
                case = {"text": kind, "tokens": tokens}
                results.append(case, arm, TIME, "ms", round(took, 4))
        wrong += [
            f"{kind}, prompt {turn}: {arm} gives other ids than {CALL}"
            for arm, ids in found.items()
            if ids != found[CALL]
        ]
    return wrong


def arguments(parser) -> None:
    parser.add_result("tokenizers")
    sentence = "Times the tokenizer of this checkpoint instead of training one."
    parser.add("--tokenizer", sentence, type=Path, metavar="FOLDER")
    parser.add("--tokens", "How many tokens a prompt has.", 8000)
    parser.add("--repeats", "How many prompts of a kind are timed.", 15)
    sentence = "How many tokens the tokenizer gets that is trained."
    parser.add("--vocabulary", sentence, VOCABULARY)


def run(args: argparse.Namespace) -> int:
    path = new_result_path(args)
    given = args.tokenizer
    if given and not (given / "tokenizer.json").is_file():
        raise UserError(
            f"--tokenizer {given} holds no tokenizer.json: name a checkpoint's folder."
        )
    os.environ.update(offline())
    results = Results.start(
        *("kernels", args.name, "From text to token ids"),
        tokenizer=given.name if given else f"trained, {args.vocabulary} tokens",
    )
    halves = corpus()
    with tempfile.TemporaryDirectory() as place:
        if not given:
            train(Path(place), [t for t, _ in halves.values()], args.vocabulary)
        asked = {kind: text for kind, (_, text) in halves.items()}
        wrong = measure(args, given or Path(place), asked, results)
    return finish(results, path, wrong)
