"""Times the parsers of thoughts and tool calls.

    python -m gemma4 parsers

Texts that hypothesis generates, as the parsers' tests draw them, and long ones of a kind
each are read as a server does: the parser of thoughts first, that of tool calls behind
it, both made anew for each text. The whole text at once, as for a request that does not
stream; cut at random, the generated ones in at most seven parts, the long ones every 1
to 20 characters; and cut every four characters, about what a token has. What is timed is
the processor time of a kilobyte (1024 bytes) of text.
"""

import argparse
import contextlib
import gc
import logging
import os
import random
import sys
import time
from typing import Callable, Dict, Iterator, List, Tuple

from gemma4.arguments import new_result_path, positive
from gemma4.engines.host import BENCHMARKS, offline
from gemma4.report.results import Results
from gemma4.report.tables import table
from tqdm import tqdm

# The parsers' tests, for gemma4_answers and gemma4_texts.
TESTS = BENCHMARKS.parent / "test" / "srt" / "function_call"
sys.path.insert(0, str(TESTS))

TIME, UNIT = "processor time", "ms a KB"
WHOLE, RANDOM, FOUR = "whole", "cut at random", "every four characters"
KILOBYTE = 1024
BATCHES = 100

Parts = List[str]


def generated(count: int) -> List[Tuple[str, Parts]]:
    """Texts as the tests of the parsers draw them, and each cut where they cut it."""
    from gemma4_texts import CUTS, TEXTS, pieces
    from hypothesis import HealthCheck, Phase, given, seed, settings

    drawn = []

    @seed(0)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(TEXTS, CUTS)
    def draw(text, cuts):
        drawn.append((text, [part for part in pieces(text, cuts) if part] or [""]))
        bar.update()

    with tqdm(total=count, unit="text", desc="drawing", disable=None) as bar:
        draw()
    return drawn


def _words(source: random.Random) -> str:
    return "".join(source.choices("abcdefghij  ", k=8)).strip() or "a"


def prose(source: random.Random) -> str:
    return f"{_words(source)} {_words(source)}. "


def calls(source: random.Random) -> str:
    from gemma4_answers import call

    return call(f"query:|{_words(source)}|,limit:{source.randrange(100)}")


def nested(source: random.Random) -> str:
    from gemma4_answers import call

    inner = f"{{a:|{_words(source)}|,b:[1,null,{{c:true}}]}}"
    return call(f"query:|x|,more:{{left:{inner},right:[{inner},{inner}]}}")


def numbers(source: random.Random) -> str:
    from gemma4_answers import call

    return call(f"tags:[{','.join(str(source.randrange(10)) for _ in range(40))}]")


KINDS: Dict[str, Callable[[random.Random], str]] = {
    "prose": prose,
    "many calls": calls,
    "nested objects": nested,
    "numbers in calls": numbers,
}


def long(kind: str, kilobytes: int) -> Tuple[str, Parts]:
    """A text of a kind, and cut every 1 to 20 characters."""
    source, text = random.Random(0), ""
    while len(text) < kilobytes * KILOBYTE:
        text += KINDS[kind](source)
    parts, start = [], 0
    while start < len(text):
        end = start + source.randint(1, 20)
        parts.append(text[start:end])
        start = end
    return text, parts


def fours(text: str) -> Parts:
    return [text[i : i + 4] for i in range(0, len(text), 4)] or [""]


class Reader:
    """Reads answers as a server does that has two tools."""

    def __init__(self):
        from gemma4_answers import TOOLS

        from sglang.srt.function_call.function_call_parser import FunctionCallParser
        from sglang.srt.parser.reasoning_parser import ReasoningParser

        self.thoughts = lambda: ReasoningParser("gemma4")
        self.tools = lambda: FunctionCallParser(TOOLS, "gemma4")

    def whole(self, text: str) -> None:
        """Reads an answer that is not streamed."""
        _, rest = self.thoughts().parse_non_stream(text)
        tools = self.tools()
        if tools.has_tool_call(rest):
            tools.parse_non_stream(rest)

    def parts(self, parts: Parts) -> None:
        """Reads an answer as it arrives."""
        thoughts, tools = self.thoughts(), self.tools()
        for part in parts[:-1]:
            _, rest = thoughts.parse_stream_chunk(part)
            tools.parse_stream_chunk(rest)
        _, rest = thoughts.parse_stream_chunk(parts[-1])
        tools.parse_stream_chunk(rest + thoughts.parse_stream_end()[1])
        tools.parse_stream_end()


def took(read: Callable, answers: list, size: int) -> float:
    """Milliseconds of the processor for a kilobyte of answers of `size` bytes."""
    start = time.process_time()
    for answer in answers:
        read(answer)
    return round(1e3 * (time.process_time() - start) * KILOBYTE / size, 5)


def measure(
    texts: List[Tuple[str, Parts]], name: str, turns: int, results: Results, bar
) -> None:
    """Adds the times of these texts, of which each turn reads an equal part."""
    reader = Reader()
    arms = {
        WHOLE: (reader.whole, [text for text, _ in texts]),
        RANDOM: (reader.parts, [parts for _, parts in texts]),
        FOUR: (reader.parts, [fours(text) for text, _ in texts]),
    }
    step = -(-len(texts) // turns)
    for start in range(0, len(texts), step):
        size = sum(len(t.encode("utf-8", "replace")) for t, _ in texts[start:][:step])
        for arm, (read, answers) in arms.items():
            spent = took(read, answers[start : start + step], size)
            results.append({"texts": name}, arm, TIME, UNIT, spent)
        bar.update()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Without the log of calls of unknown tools, and a collector that walks all texts:
    no server holds them."""
    logging.disable(logging.WARNING)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)


def arguments(parser) -> None:
    parser.add_result("parsers")
    parser.add("--texts", "How many texts are generated.", 100_000)
    sentence = "How long the long texts are; several numbers take their turns."
    parser.add("--kilobytes", sentence, (8, 64), type=positive, nargs="+")
    parser.add("--repeats", "How often each long text is read.", 20)


def run(args: argparse.Namespace) -> None:
    path = new_result_path(args)
    os.environ.update(offline())
    results = Results.start(
        *("kernels", args.name, "The parsers of thoughts and tool calls"),
        texts=args.texts,
    )
    texts = generated(args.texts)
    size = sum(len(text.encode("utf-8", "replace")) for text, _ in texts)
    name = f"{len(texts):,} generated, of {size / len(texts):.0f} bytes on average"
    batches = max(1, min(BATCHES, len(texts) // 100))
    total = 1 + batches + args.repeats * len(args.kilobytes) * len(KINDS)
    bar = tqdm(total=total, unit="turn", desc="reading", disable=None)
    with undisturbed(), bar:
        measure(texts[:100], "", 1, Results("kernels", "", ""), bar)  # imports
        measure(texts, name, batches, results, bar)
        for kind in KINDS:
            for kilobytes in args.kilobytes:
                one = long(kind, kilobytes)
                name = f"{kilobytes} KB of {kind}"
                measure([one] * args.repeats, name, args.repeats, results, bar)
    print(f"wrote {results.save(path)}\n\n{table(results, TIME)}")
