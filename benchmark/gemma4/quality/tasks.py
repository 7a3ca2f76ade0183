"""The tasks of the trained model.

Every prompt ends amid a chain of questions and answers, each the only right one, which
the model is to go on with:

recall  A record, one token, names a key and its value; thousands of tokens later the
        keys are asked for in order. Only the full layers see that far.
local   A record of a key lies just inside the window of the question about it, and one
        token farther, outside, lies another of the same key with another value. A
        window that is one token too wide sees both, one too narrow sees neither.
facts   A table of random values, learned by heart, which is what experts are for.
mixed   All three chains follow the records, and a recall chain ends the prompt.
"""

import dataclasses
import random
from typing import List, Sequence

from gemma4 import checkpoint as factory

WINDOW = 32
SHAPE = dataclasses.replace(
    factory.SHAPES["tiny"],
    text={
        **factory.SHAPES["tiny"].text,
        "num_hidden_layers": 6,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        "num_global_key_value_heads": 2,
        "top_k_experts": 8,
        "sliding_window": WINDOW,
        "final_logit_softcapping": 30.0,
    },
)
PAIRS = 8  # questions of a chain
KEYS, LOCAL_KEYS, VALUES = 16, 16, 8
FACT_ROWS, FACT_COLUMNS = 16, 32
FILLERS = 200

# Where each kind of token begins in the vocabulary.
_START = factory.FIRST_TEXT_TOKEN
RECORD = _START
LOCAL_RECORD = RECORD + KEYS * VALUES
QUESTION = LOCAL_RECORD + LOCAL_KEYS * VALUES
LOCAL_QUESTION = QUESTION + KEYS
ANSWER = LOCAL_QUESTION + LOCAL_KEYS
FACT_ROW = ANSWER + VALUES
FACT_COLUMN = FACT_ROW + FACT_ROWS
FILLER = FACT_COLUMN + FACT_COLUMNS
assert FILLER + FILLERS <= min(SHAPE.multimodal_ids.values())

TASKS = ("recall", "local", "facts", "mixed")
# Facts are learned first, as they are alike in all sequences; recall needs more of them.
MIX = ("recall", "recall", "recall", "local", "facts")
FACTS = [
    [random.Random(1000 * a + b).randrange(VALUES) for b in range(FACT_COLUMNS)]
    for a in range(FACT_ROWS)
]


class Writer:
    """Writes a sequence: its tokens, which of them can be foretold, and its positions.

    `weights` says for how many fillers each token stands.
    """

    def __init__(self, generator: random.Random):
        self.random = generator
        self.tokens = [factory.BOS]
        self.certain = [False]
        self.positions = [0]
        self.weights = [1.0]
        self.values = [generator.randrange(VALUES) for _ in range(KEYS)]
        self.known = range(0)

    def add(self, token: int, certain: bool = False) -> None:
        self.tokens.append(token)
        self.certain.append(certain)
        self.positions.append(self.positions[-1] + 1)
        self.weights.append(1.0)

    def fill(self, count: int) -> None:
        for _ in range(count):
            self.add(FILLER + self.random.randrange(FILLERS))

    def jump(self, count: int) -> None:
        """As many fillers more than twice the window, left out between two windows."""
        begin = len(self.tokens)
        self.fill(WINDOW)
        self.positions[-1] += count
        self.fill(WINDOW)
        weight = 1 + count / (2 * WINDOW)
        self.weights[begin:] = [weight] * (2 * WINDOW)

    def records(self, fillers: int, keys: int = KEYS) -> None:
        """The records of so many successive keys, in any order, with fillers among them."""
        first = self.random.randrange(KEYS)
        self.known = range(first, first + keys)
        order = [*self.known] + [None] * fillers
        self.random.shuffle(order)
        for key in order:
            if key is None:
                self.fill(1)
            else:
                self.add(RECORD + key % KEYS * VALUES + self.values[key % KEYS])

    def recall(self) -> None:
        pairs = min(PAIRS, len(self.known))
        first = self.random.choice(self.known[: len(self.known) - pairs + 1])
        for i in range(pairs):
            key = (first + i) % KEYS
            self.add(QUESTION + key, certain=i > 0)
            self.add(ANSWER + self.values[key], certain=True)

    def local(self, edge: bool = True) -> None:
        first = self.random.randrange(LOCAL_KEYS)
        keys = [(first + i) % LOCAL_KEYS for i in range(PAIRS)]
        values = [self.random.randrange(VALUES) for _ in keys]
        for key, value in zip(keys, values):
            if edge:
                other = (value + 1 + self.random.randrange(VALUES - 1)) % VALUES
                self.add(LOCAL_RECORD + key * VALUES + other)
            else:
                self.fill(1)
            self.add(LOCAL_RECORD + key * VALUES + value)
        # The first question is WINDOW - 1 tokens after the first record, and so on.
        far = WINDOW - 2 * PAIRS
        self.fill(far if edge else self.random.randrange(far + 1))
        for i, (key, value) in enumerate(zip(keys, values)):
            self.add(LOCAL_QUESTION + key, certain=i > 0)
            self.add(ANSWER + value, certain=True)

    def facts(self) -> None:
        row = self.random.randrange(FACT_ROWS)
        first = self.random.randrange(FACT_COLUMNS)
        for i in range(PAIRS):
            column = (first + i) % FACT_COLUMNS
            self.add(FACT_ROW + row, certain=i > 0)
            self.add(FACT_COLUMN + column, certain=i > 0)
            self.add(ANSWER + FACTS[row][column], certain=True)

    def chain(self, task: str) -> None:
        getattr(self, task)()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and the only right way to go on with it."""

    task: str
    tokens: List[int]
    answer: List[int]


def prompt(task: str, seed: int, fillers: int) -> Prompt:
    """The prompt of this seed, with so many fillers between records and question."""
    writer = Writer(random.Random(f"{task}-{seed}"))
    writer.records(KEYS)
    writer.fill(fillers)
    if task == "mixed":
        for other in ("facts", "local"):
            writer.chain(other)
            writer.fill(WINDOW)
    begin = len(writer.tokens)
    writer.chain("recall" if task == "mixed" else task)
    first = writer.certain.index(True, begin)
    return Prompt(task, writer.tokens[:first], writer.tokens[first:])


def training_sequence(
    generator: random.Random, length: int, mix: Sequence[str] = MIX
) -> Writer:
    writer = Writer(generator)
    # One record among many is hard to find as long as none is found. So half of the
    # sequences have few, and ask for them soon, but from outside the window: what the
    # sliding layers can answer, the full ones do not learn.
    few = generator.random() < 0.5
    writer.records(generator.randrange(16), generator.randint(1, 5) if few else KEYS)
    if few:
        writer.fill(WINDOW)
        writer.recall()
    if generator.random() < 0.75:
        writer.jump(generator.randrange(6000))
    while len(writer.tokens) < length:
        task = generator.choice(mix)
        if task == "local":
            writer.local(edge=generator.random() < 0.6)
        else:
            writer.chain(task)
        if generator.random() < 0.3:
            writer.fill(generator.randrange(8))
    for part in (writer.tokens, writer.certain, writer.positions, writer.weights):
        del part[length:]
    return writer
