"""Grammar backends over a small byte-level tokenizer, and walks through their masks."""

import random
from functools import cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang.srt.constrained.base_grammar_backend import (
    BaseGrammarBackend,
    BaseGrammarObject,
    InvalidGrammarObject,
    create_grammar_backend,
)
from sglang.srt.runtime_context import get_context

EOS = "<turn|>"
SPECIAL = [EOS, "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, a few of two bytes, and Gemma 4's markers as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a, b in ("tr", "fa", "nu", '":', '",', "{}", "[]", "ca")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *map("".join, merges)])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=EOS)


@cache
def backend(name: str) -> BaseGrammarBackend:
    """The grammar backend that a server with `--grammar-backend name` makes."""
    size = len(tokenizer())
    with get_context().override_server_args(grammar_backend=name):
        made = create_grammar_backend(None, tokenizer(), size, {eos_id()})
        # A second backend reads the server's settings, which end with this block.
        fallback = getattr(made, "schema_fallback", None)
        if fallback is not None:
            fallback.get()
    return made


def obj(properties: dict, *required: str, **keywords) -> dict:
    """The JSON schema of an object."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        **keywords,
    }


def eos_id() -> int:
    return tokenizer().convert_tokens_to_ids(EOS)


def compile_key(name: str, key_type: str, key: str) -> BaseGrammarObject:
    """A fresh grammar object as the scheduler gets it."""
    return backend(name)._init_value_dispatch((key_type, key), False)


def allowed(grammar: BaseGrammarObject) -> list[int]:
    """The tokens that the grammar's mask lets through."""
    size = len(tokenizer())
    mask = grammar.allocate_vocab_mask(size, 1, "cpu")
    grammar.fill_vocab_mask(mask, 0)
    bits = np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")
    return bits[:size].nonzero()[0].tolist()


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def accepts(grammar: BaseGrammarObject, ids: list[int]) -> bool:
    """Whether the masks let `ids` and then the end through, token by token."""
    for token in ids:
        if token not in allowed(grammar):
            return False
        grammar.accept_token(token)
    return eos_id() in allowed(grammar)


@cache
def _classes() -> tuple[frozenset, frozenset]:
    """Tokens of whole characters; tokens that end something."""
    texts = [tokenizer().decode([i]) for i in range(len(tokenizer()))]
    whole = frozenset(i for i, text in enumerate(texts) if text.isprintable())
    closing = frozenset(
        i
        for i, text in enumerate(texts)
        if text and text[0] in '"}],0' or text in SPECIAL
    )
    return whole, closing


def sample(
    grammar: BaseGrammarObject, rng: random.Random, limit: int = 300
) -> list[int] | None:
    """Tokens drawn from the masks until the end; None if `limit` did not reach it."""
    whole, closing = _classes()
    ids = []
    for step in range(limit):
        tokens = [t for t in allowed(grammar) if t in whole]
        if not tokens:
            return None
        if eos_id() in tokens and (len(tokens) == 1 or rng.random() < 0.5):
            grammar.accept_token(eos_id())
            return ids
        tokens = [t for t in tokens if t != eos_id()]
        if step > limit // 4:
            tokens = [t for t in tokens if t in closing] or tokens
        token = rng.choice(tokens)
        grammar.accept_token(token)
        ids.append(token)
    return None


def error_of(grammar: BaseGrammarObject) -> str | None:
    if isinstance(grammar, InvalidGrammarObject):
        return grammar.error_message
    return None
