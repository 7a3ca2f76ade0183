"""What no grammar backend keeps of a JSON schema is refused by name.

The oracle is `jsonschema`: each backend alone lets through what does not validate.
"""

import json
import unittest

from grammar_walk import compile_key, error_of, obj
from schema_cases import NEITHER, S, errs

from sglang.srt.constrained.json_schema_support import common_gap
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")


class TestFaults(CustomTestCase):
    def test_neither_backend_keeps_them(self):
        for what, schema, texts in NEITHER:
            for name in ("xgrammar", "llguidance"):
                with self.subTest(what, backend=name):
                    self.assertIsNotNone(common_gap(schema))
                    self.assertIsNot(errs(name, schema, texts), False)

    def test_refused_by_place(self):
        schema = obj({"a/b": {"type": "array", "items": obj({"c": {"not": S}})}})
        place = "#/properties/a~1b/items/properties/c"
        self.assertEqual(common_gap(schema)[:2], (place, "not would be ignored"))
        error = error_of(compile_key("xgrammar", "json", json.dumps(schema)))
        self.assertIn(place, error)
        self.assertIn("not would be ignored", error)

    def test_malformed(self):
        for schema, place in (
            ({"type": "text"}, "#/type"),
            (obj({"a": {"minimum": "1"}}), "#/properties/a/minimum"),
            (False, "#"),
        ):
            self.assertEqual(common_gap(schema).pointer, place)
        self.assertIsNone(common_gap(obj({"a": S}, "a")))


if __name__ == "__main__":
    unittest.main()
