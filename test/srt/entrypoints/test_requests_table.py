"""docs/requests.md says of every field of the request classes what bounds it."""

import ast
import importlib.util
import re
import unittest
from pathlib import Path

CLASSES = {
    "SamplingParams": "sampling/sampling_params.py",
    "GenerateReqInput": "managers/io_struct.py",
    "EmbeddingReqInput": "managers/io_struct.py",
    "SessionParams": "managers/io_struct.py",
}
PAGE = Path(__file__).parents[3] / "docs" / "requests.md"


def fields(name: str) -> set:
    """The annotated fields of a class, from its source: the engine is not imported."""
    [engine] = importlib.util.find_spec("sglang").submodule_search_locations
    tree = ast.parse((Path(engine) / "srt" / CLASSES[name]).read_text())
    [cls] = (n for n in tree.body if getattr(n, "name", None) == name)
    return {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}


def documented(name: str) -> list:
    """The names in the first column of the class's table."""
    [section] = re.findall(
        rf"^## {name}\b.*?(?=^## |\Z)", PAGE.read_text(), re.S | re.M
    )
    rows = re.findall(r"^\|(.*?)\|", section, re.M)
    return [field for row in rows for field in re.findall(r"`(\w+)`", row)]


class TestRequestsTable(unittest.TestCase):
    def test_every_field_once(self):
        for name in CLASSES:
            with self.subTest(name):
                self.assertEqual(sorted(documented(name)), sorted(fields(name)))


if __name__ == "__main__":
    unittest.main()
