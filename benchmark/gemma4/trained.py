"""Train a small Gemma-4 MoE on tasks that need the window, the full layers, the experts.

    python benchmark/gemma4/trained.py OUT

Every prompt ends amid a chain of questions and answers, each the only right one, which
the model is to go on with:

recall  A record, one token, names a key and its value; thousands of tokens later the
        keys are asked for in order. Only the full layers see that far.
local   A record of a key lies just inside the window of the question about it, and one
        token farther, outside, lies another of the same key with another value. A
        window that is one token too wide sees both, one too narrow sees neither.
facts   A table of random values, learned by heart, which is what experts are for.
mixed   All three chains follow the records, and a recall chain ends the prompt.

Training sees a few hundred tokens at a time. Where a prompt has thousands of fillers,
a training sequence leaves most of them out: its positions jump, and in the full layers
each filler that stays draws attention for all those that it stands for.

The program ends by asking for records from thousands of tokens back, and fails if less
than 95 % of the answers are right.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import checkpoint as factory  # noqa: E402
import serving  # noqa: E402

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
RECIPE = {"version": 2, "steps": 250, "batch": 16, "length": 256, "seed": 0}
DOUBT = 0.1  # how much doubt without an expert counts, beside what is to be learned
LEAST_RECALL = 0.95
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


def _masks(weights: torch.Tensor) -> Dict[str, torch.Tensor]:
    """transformers' own masks would take a jump of the positions for another text.

    A key with ln(n) added to its score draws as much attention as n of them.
    """
    place = torch.arange(weights.shape[1], device=weights.device)
    distance = place[:, None] - place[None]
    future = distance < 0
    return {
        "full_attention": weights.log()[:, None, None].masked_fill(future, -math.inf),
        "sliding_attention": (~future & (distance < WINDOW))[None, None],
    }


def _initialize(text, seed: int) -> None:
    """Draws the weights so that training finds attention's partners at once.

    With ones in all norms, each block would add a vector of length one an element to an
    embedding of a fifth of that, and the next would hardly see which token it reads.
    Embeddings begin at that length, and blocks at a third. A record begins as the sum of
    its key and its value, its question and its answer as one of the two and something of
    their own: else each of the records would have to be learned for itself.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, hidden, generator=generator) * hidden**-0.5

    hidden = SHAPE.text["hidden_size"]
    for name, weight in text.named_parameters():
        if name.endswith("q_norm.weight"):
            # Scores are not scaled by the head's size: at ones, attention would begin
            # with one random token each, and nothing could be learned from the rest.
            weight.data.fill_(weight.numel() ** -0.5)
        elif name.endswith(
            ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        ):
            weight.data.fill_(0.3)
        elif name.endswith("post_feedforward_layernorm_1.weight"):
            # The experts are to carry what is learned, not the dense block beside them.
            weight.data.fill_(0.1)
    embeddings = text.embed_tokens.weight.data
    embeddings.copy_(draw(len(embeddings)))
    values = draw(VALUES)
    half = 0.5**0.5
    for record, question, count in (
        (RECORD, QUESTION, KEYS),
        (LOCAL_RECORD, LOCAL_QUESTION, LOCAL_KEYS),
    ):
        keys = draw(count)
        both = (keys[:, None] + values[None]).flatten(0, 1)
        embeddings[record : record + count * VALUES] = both * half
        embeddings[question : question + count] = (keys + draw(count)) * half
    embeddings[ANSWER : ANSWER + VALUES] = (values + draw(VALUES)) * half


def build(seed: int = RECIPE["seed"]):
    """The model, freshly initialized, in float32 on the CPU."""
    from transformers import Gemma4ForConditionalGeneration

    torch.manual_seed(seed)
    config = factory._target_config(SHAPE, False, "float32")
    model = Gemma4ForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    _initialize(model.model.language_model, seed)
    return model


def train(
    model,
    steps: int,
    device: str,
    seed: int = RECIPE["seed"],
    batch: int = RECIPE["batch"],
    mix: Sequence[str] = MIX,
) -> List[float]:
    """Trains in place; returns the loss of each step.

    Experts that are left to themselves learn much the same, and one that is missing is
    hardly missed. So the last steps also teach the model to be in doubt about every
    value when its router drops the last of the chosen experts.
    """
    text, head = model.model.language_model.to(device), model.lm_head.to(device)
    parameters = list(text.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=3e-3, betas=(0.9, 0.98), weight_decay=0
    )

    def rate(step: int) -> float:
        """Up at once, down over the last 40 %: recall is learned late, and suddenly."""
        return min(1.0, (step + 1) / 50, 0.02 + 2.5 * (steps - step) / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = random.Random(seed)
    length, losses = RECIPE["length"], []
    cap = SHAPE.text["final_logit_softcapping"]

    def predict(writers: List[Writer]):
        """The logits of what can be foretold, and what it is."""
        tokens, certain, positions, weights = (
            torch.tensor([getattr(writer, name) for writer in writers], device=device)
            for name in ("tokens", "certain", "positions", "weights")
        )
        hidden = text(
            **dict(input_ids=tokens, position_ids=positions),
            **dict(attention_mask=_masks(weights), use_cache=False),
        ).last_hidden_state
        wanted = certain[:, 1:]
        logits = cap * torch.tanh(head(hidden[:, :-1][wanted]) / cap)
        return logits, tokens[:, 1:][wanted]

    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    for step in progress:
        writers = [training_sequence(generator, length, mix) for _ in range(batch)]
        loss = torch.nn.functional.cross_entropy(*predict(writers))
        losses.append(loss.item())
        if step >= 0.6 * steps:
            text.config.top_k_experts -= 1
            logits, tokens = predict(writers[: math.ceil(batch / 3)])
            text.config.top_k_experts += 1
            doubtful = (tokens >= ANSWER) & (tokens < ANSWER + VALUES)
            logprobs = logits[doubtful].log_softmax(-1)[:, ANSWER : ANSWER + VALUES]
            loss = loss - DOUBT * logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def right(model, task: str, count: int = 32, fillers: int = 3000) -> float:
    """The share of values that are right, of prompts that training did not see.

    The questions between them are not counted: to know which comes next is no recall.
    One pass over prompt and answer: all are right if and only if a greedy answer is.
    """
    found = []
    with torch.inference_mode():
        for seed in range(count):
            asked = prompt(task, seed, fillers)
            tokens = torch.tensor([asked.tokens + asked.answer], device=model.device)
            keep = len(asked.answer) + 1
            logits = model(input_ids=tokens, logits_to_keep=keep).logits[0, :-1]
            choice = logits.argmax(dim=-1).tolist()
            known = zip(choice, asked.answer)
            found += [a == b for a, b in known if ANSWER <= b < ANSWER + VALUES]
    return sum(found) / len(found)


def save(model, out: Path, **recipe) -> None:
    """Writes the folder as released ones are: bfloat16, tokenizer, processor."""
    model = model.to("cpu", torch.bfloat16)
    model.config.dtype = "bfloat16"
    for part in ("text_config", "vision_config"):
        setattr(getattr(model.config, part), "dtype", "bfloat16")
    out.mkdir(parents=True, exist_ok=True)
    factory._write_files(out, SHAPE, model.config, "flat")
    model.save_pretrained(out)
    written = json.dumps({**RECIPE, **recipe, "shape": "trained"}, indent=2)
    (out / factory.RECIPE_FILE).write_text(written + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--steps", type=int, default=RECIPE["steps"])
    parser.add_argument("--seed", type=int, default=RECIPE["seed"])
    args = parser.parse_args()
    with serving.reported("trained.py"):
        if args.out.exists() and any(args.out.iterdir()):
            raise serving.HouseError(f"{args.out} is not empty: name another folder.")
        device = "cuda" if serving.has_gpu() else "cpu"
        start = time.monotonic()
        model = build(args.seed)
        losses = train(model, args.steps, device, args.seed)
        last = losses[-20:]
        print(
            f"{args.out}: {args.steps} steps in {time.monotonic() - start:.0f} s on "
            f"{device}, loss {sum(last) / len(last):.4f}",
            flush=True,
        )
        recall = right(model.to(device), "recall")
        save(model, args.out, steps=args.steps, seed=args.seed)
        print(f"recall over 3000 tokens: {recall:.1%} of the values are right")
        if recall < LEAST_RECALL:
            raise serving.HouseError(
                f"{args.out} recalls {recall:.1%}, less than {LEAST_RECALL:.0%}: train "
                "it with more --steps, or another --seed."
            )


if __name__ == "__main__":
    main()
