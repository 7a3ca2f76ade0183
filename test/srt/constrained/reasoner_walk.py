"""Grammars for a model that reasons, over a small tokenizer with Gemma 4's markers."""

import json
from functools import cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.outlines_backend import OutlinesGrammarBackend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.parser.reasoning_parser import ReasoningParser

EOS, START, END = "<turn|>", "<|channel>", "<channel|>"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
)
ANSWER = '{"a": 12}'


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and Gemma 4's markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True) for t in (EOS, START, END)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=EOS, pad_token=EOS)


@cache
def backend(name: str) -> ReasonerGrammarBackend:
    size = len(tokenizer())
    eos_ids = [tokenizer().eos_token_id]
    if name == "xgrammar":
        inner = XGrammarGrammarBackend(tokenizer(), size, eos_ids)
    elif name == "llguidance":
        inner = GuidanceBackend(tokenizer(), n_vocab=size, eos_token_ids=eos_ids)
    else:
        inner = OutlinesGrammarBackend(tokenizer(), None)
    return ReasonerGrammarBackend(inner, ReasoningParser("gemma4"), tokenizer())


def new_grammar(name: str, require_reasoning: bool):
    """A fresh grammar for SCHEMA."""
    key = ("json", SCHEMA)
    return backend(name)._init_value_dispatch(key, require_reasoning)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def allowed(grammar) -> set[int]:
    """The tokens that the mask lets through."""
    size = len(tokenizer())
    mask = grammar.allocate_vocab_mask(size, 1, "cpu")
    logits = torch.zeros(1, size)
    if mask.dtype != torch.bool:
        mask.fill_(-1)
    grammar.fill_vocab_mask(mask, 0)
    if mask.dtype == torch.bool:
        logits.masked_fill_(mask, float("-inf"))
    else:
        bits = (mask[0, :, None] >> torch.arange(32)) & 1
        logits.masked_fill_(bits.reshape(1, -1)[:, :size] == 0, float("-inf"))
    return set(logits[0].isfinite().nonzero().flatten().tolist())


def accepted(grammar, text: str) -> int:
    """How many tokens of `text` the masks let through."""
    for count, token in enumerate(ids_of(text)):
        if token not in allowed(grammar):
            return count
        grammar.accept_token(token)
    return len(ids_of(text))


class AcceptsMixin:
    def check_accepts(self, grammar, text: str):
        """The masks let `text` and then the end through."""
        self.assertEqual(accepted(grammar, text), len(ids_of(text)))
        self.assertIn(tokenizer().eos_token_id, allowed(grammar))
