"""What schemas refer to, and what is said beside other schemas, in the grammar of Gemma 4's
tool calls.
"""

import unittest

from grammar_walk import obj
from tool_call_grammar import INTEGER, STRING, Cases, Q

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")


class TestComposed(Cases, CustomTestCase):
    CASES = [
        (
            obj({"ab": INTEGER, "ac": INTEGER}, additionalProperties=STRING),
            [f"{{ab:1,x:{Q}y{Q}}}", f"{{abc:{Q}y{Q},a:{Q}z{Q}}}", "{ab:1,ac:2}"],
            ["{x:1}", f"{{ab:1,ac:{Q}y{Q}}}", "{abc:1}"],
        ),
        (
            {
                "type": "object",
                "properties": {"t": {"$ref": "#/$defs/tree"}},
                "required": ["t"],
                "$defs": {
                    "tree": obj(
                        {
                            "v": INTEGER,
                            "kids": {
                                "type": "array",
                                "items": {"$ref": "#/$defs/tree"},
                            },
                        },
                        "v",
                    )
                },
            },
            ["{t:{v:1}}", "{t:{kids:[{v:1},{kids:[],v:2}],v:3}}"],
            ["{t:{}}", "{t:{kids:[1],v:1}}"],
        ),
        (
            obj(
                {"a": INTEGER, "b": INTEGER},
                anyOf=[{"required": ["a"]}, {"required": ["b"]}],
            ),
            ["{a:1}", "{b:1}", "{a:1,b:2}"],
            ["{}"],
        ),
        (
            obj({"u": {"anyOf": [STRING, {"type": "null"}]}, "b": {"type": "boolean"}}),
            ["{}", "{b:true}", "{b:false,u:null}", f"{{u:{Q}x{Q}}}"],
            ["{b:null}", "{b:True}", "{u:x}"],
        ),
    ]


if __name__ == "__main__":
    unittest.main()
