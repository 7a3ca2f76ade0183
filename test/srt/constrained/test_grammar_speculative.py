"""A grammar object does what the verify step of speculative decoding asks, whichever
backend made it: a tree of drafts is masked as each of its paths would be alone, and leaves
the grammar where it was.
"""

import json
import random
import unittest
from types import SimpleNamespace

import torch
from grammar_walk import allowed, compile_key, eos_id, ids_of, tokenizer

from sglang.srt.speculative.spec_utils import generate_token_bitmask, traverse_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

BACKENDS = ("xgrammar", "llguidance")
SCHEMAS = (
    {"type": "integer"},
    {"const": "ab"},
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": [1, 12, None]}, "maxItems": 2},
)


def grammar_of(name, schema):
    return compile_key(name, "json", json.dumps(schema))


def random_tree(grammar, rng, size=12):
    """Draft tokens, and links to a node's first child and next sibling; node 0 is the
    token before the drafts. About half of the drafts follow from the grammar."""
    parents, tokens = [-1], [0]
    paths = [[]]
    for node in range(1, size):
        parent = rng.randrange(max(0, node - 4), node)
        probe = grammar.copy()
        legal = all(step(probe, token) for token in paths[parent])
        choices = allowed(probe) if legal and not probe.is_terminated() else []
        follows = choices and rng.random() < 0.8
        token = rng.choice(choices) if follows else rng.randrange(len(tokenizer()))
        if eos_id() in choices and rng.random() < 0.3:
            token = eos_id()
        parents.append(parent)
        tokens.append(token)
        paths.append(paths[parent] + [token])
    child, sibling = [-1] * size, [-1] * size
    for node in range(size - 1, 0, -1):
        sibling[node], child[parents[node]] = child[parents[node]], node
    return tokens, child, sibling, paths


def step(grammar, token) -> bool:
    """Accept a token if the mask lets it through."""
    if grammar.is_terminated() or token not in allowed(grammar):
        return False
    grammar.accept_token(token)
    return True


def mask_of(row):
    bits = (row.unsqueeze(1) >> torch.arange(32)) & 1
    return bits.flatten()[: len(tokenizer())].nonzero().flatten().tolist()


def at(template, tokens):
    """A copy of the grammar behind `tokens`, and whether it lets them through."""
    grammar = template.copy()
    return grammar, all(step(grammar, token) for token in tokens)


class TestTraverseTree(CustomTestCase):
    def check(self, template):
        """Trees behind beginnings of any length, against one grammar a path."""
        rng = random.Random(0)
        size = len(tokenizer())
        for _ in range(12):
            before = []
            for _ in range(rng.randrange(5)):
                choices = allowed(at(template, before)[0])
                before += [t for t in [rng.choice(choices)] if t != eos_id()]
            grammar, _ = at(template, before)
            tokens, child, sibling, paths = random_tree(at(template, before)[0], rng)
            mask = grammar.allocate_vocab_mask(size, len(tokens), "cpu")
            rows = [torch.tensor(part) for part in (child, sibling, tokens)]
            traverse_tree(*rows, grammar, mask, vocab_size=size)
            for node, path in enumerate(paths):
                alone, follows = at(template, before + path)
                ended = alone.is_terminated()
                wanted = allowed(alone) if follows and not ended else range(size)
                self.assertEqual(mask_of(mask[node]), list(wanted), (before, path))
            self.assertEqual(allowed(grammar), allowed(at(template, before)[0]))

    def test_each_node_as_its_path_alone(self):
        for name in BACKENDS:
            for schema in SCHEMAS:
                with self.subTest(schema, backend=name):
                    self.check(grammar_of(name, schema))

    def test_end_token_ends(self):
        """After the end token no further draft is accepted, as in plain decoding."""
        for name in BACKENDS:
            for schema, text in ((SCHEMAS[0], "12"), (SCHEMAS[1], '"ab"')):
                with self.subTest(schema, backend=name):
                    grammar, follows = at(grammar_of(name, schema), ids_of(text))
                    self.assertTrue(follows and not grammar.is_terminated())
                    grammar.accept_token(eos_id())
                    self.assertTrue(grammar.is_terminated())
                    grammar.rollback(1)
                    self.assertFalse(grammar.is_terminated())
                    self.assertIn(eos_id(), allowed(grammar))
                    grammar.rollback(1)
                    alone, _ = at(grammar_of(name, schema), ids_of(text)[:-1])
                    self.assertEqual(allowed(grammar), allowed(alone))

    def test_batch_of_both(self):
        """One batch: both backends, and a request without a grammar between them."""
        reqs = [
            SimpleNamespace(grammar=grammar_of("xgrammar", SCHEMAS[1])),
            SimpleNamespace(grammar=None),
            SimpleNamespace(grammar=grammar_of("llguidance", SCHEMAS[1])),
        ]
        quote, a = ids_of('"')[0], ids_of("a")[0]
        drafts = torch.tensor([[0, quote, a]] * 3)
        child, sibling = torch.tensor([[1, 2, -1]] * 3), torch.full((3, 3), -1)
        for order in (reqs, reqs[::-1]):
            mask, _ = generate_token_bitmask(
                order, child, sibling, drafts, len(tokenizer())
            )
            for row in (0, 6):
                rows = [mask_of(mask[row + i]) for i in range(3)]
                self.assertEqual(rows, [[quote], [a], ids_of("b")])
            self.assertTrue(bool((mask[3:6] == -1).all()))

    def test_last_token_is_known(self):
        """Disaggregated decoding does not accept a retracted request's token twice."""
        for name in BACKENDS:
            grammar = grammar_of(name, SCHEMAS[1])
            self.assertIsNone(grammar.current_token)
            grammar.accept_token(ids_of('"')[0])
            self.assertEqual(grammar.current_token, ids_of('"')[0])


if __name__ == "__main__":
    unittest.main()
