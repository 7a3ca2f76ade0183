"""Trains a small Gemma-4 MoE on tasks that need the window, the full layers, the experts.

    python -m gemma4 train OUT

tasks.py says on which. Training sees a few hundred tokens at a time. Where a prompt has
thousands of fillers, a training sequence leaves most of them out: its positions jump,
and in the full layers each filler that stays draws attention for all those that it
stands for.

The program ends by asking for records from thousands of tokens back, and fails if less
than 95 % of the answers are right.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Dict, List, Sequence

import torch
from gemma4 import checkpoint as factory
from gemma4.checkpoint.configs import target_config
from gemma4.engines.host import has_gpu
from gemma4.errors import UserError
from gemma4.quality import tasks
from tqdm import tqdm

RECIPE = {"version": 2, "steps": 250, "batch": 16, "length": 256, "seed": 0}
DOUBT = 0.1  # how much doubt without an expert counts, beside what is to be learned
LEAST_RECALL = 0.95


def _masks(weights: torch.Tensor) -> Dict[str, torch.Tensor]:
    """transformers' own masks would take a jump of the positions for another text.

    A key with ln(n) added to its score draws as much attention as n of them.
    """
    place = torch.arange(weights.shape[1], device=weights.device)
    distance = place[:, None] - place[None]
    future = distance < 0
    return {
        "full_attention": weights.log()[:, None, None].masked_fill(future, -math.inf),
        "sliding_attention": (~future & (distance < tasks.WINDOW))[None, None],
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

    hidden = tasks.SHAPE.text["hidden_size"]
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
    values = draw(tasks.VALUES)
    half = 0.5**0.5
    for record, question, count in (
        (tasks.RECORD, tasks.QUESTION, tasks.KEYS),
        (tasks.LOCAL_RECORD, tasks.LOCAL_QUESTION, tasks.LOCAL_KEYS),
    ):
        keys = draw(count)
        both = (keys[:, None] + values[None]).flatten(0, 1)
        embeddings[record : record + count * tasks.VALUES] = both * half
        embeddings[question : question + count] = (keys + draw(count)) * half
    embeddings[tasks.ANSWER : tasks.ANSWER + tasks.VALUES] = (
        values + draw(tasks.VALUES)
    ) * half


def build(seed: int = RECIPE["seed"]):
    """The model, freshly initialized, in float32 on the CPU."""
    from transformers import Gemma4ForConditionalGeneration

    torch.manual_seed(seed)
    config = target_config(tasks.SHAPE, False, "float32")
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
    mix: Sequence[str] = tasks.MIX,
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
    cap = tasks.SHAPE.text["final_logit_softcapping"]

    def predict(writers: List[tasks.Writer]):
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
        writers = [
            tasks.training_sequence(generator, length, mix) for _ in range(batch)
        ]
        loss = torch.nn.functional.cross_entropy(*predict(writers))
        losses.append(loss.item())
        if step >= 0.6 * steps:
            text.config.top_k_experts -= 1
            logits, tokens = predict(writers[: math.ceil(batch / 3)])
            text.config.top_k_experts += 1
            doubtful = (tokens >= tasks.ANSWER) & (tokens < tasks.ANSWER + tasks.VALUES)
            logprobs = logits[doubtful].log_softmax(-1)[
                :, tasks.ANSWER : tasks.ANSWER + tasks.VALUES
            ]
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
            asked = tasks.prompt(task, seed, fillers)
            tokens = torch.tensor([asked.tokens + asked.answer], device=model.device)
            keep = len(asked.answer) + 1
            logits = model(input_ids=tokens, logits_to_keep=keep).logits[0, :-1]
            choice = logits.argmax(dim=-1).tolist()
            known = zip(choice, asked.answer)
            found += [
                a == b
                for a, b in known
                if tasks.ANSWER <= b < tasks.ANSWER + tasks.VALUES
            ]
    return sum(found) / len(found)


def save(model, out: Path, **recipe) -> None:
    """Writes the folder as released ones are: bfloat16, tokenizer, processor."""
    model = model.to("cpu", torch.bfloat16)
    model.config.dtype = "bfloat16"
    for part in ("text_config", "vision_config"):
        setattr(getattr(model.config, part), "dtype", "bfloat16")
    out.mkdir(parents=True, exist_ok=True)
    factory.write_files(out, tasks.SHAPE, model.config, "flat")
    model.save_pretrained(out)
    written = json.dumps({**RECIPE, **recipe, "shape": "trained"}, indent=2)
    (out / factory.RECIPE_FILE).write_text(written + "\n")


def arguments(parser) -> None:
    parser.add("out", "The folder to write.", type=Path, metavar="OUT")
    parser.add("--steps", "How many steps of training.", RECIPE["steps"])
    parser.add("--seed", "What the weights begin from.", RECIPE["seed"], type=int)


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty: name another folder.")
    device = "cuda" if has_gpu() else "cpu"
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
        raise UserError(
            f"{args.out} recalls {recall:.1%}, less than {LEAST_RECALL:.0%}: train it "
            "with more --steps, or another --seed."
        )
