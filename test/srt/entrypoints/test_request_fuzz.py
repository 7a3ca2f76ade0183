"""Whatever a request says, the server answers it, and then the next one.

Hypothesis builds requests of every class from the classes' own fields: each value is
ordinary, or at a bound or beyond it. One that takes a request to be broken is a request
that is answered with 4xx, and never with 5xx or not at all, and each endpoint of a model
that generates answers some with 200. After each a plain request is answered as ever, and
no request, token or queue place is held. SIGTERM then ends the server, which a request
that is still counted would keep up.

300 requests; 10,000 with HYPOTHESIS_PROFILE=nightly.
"""

import base64
import dataclasses
import functools
import io
import json
import os
import shutil
import sys
import tempfile
import time
import typing
import unittest
from enum import Enum
from pathlib import Path

import requests
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams
from sglang.srt.utils import kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import (
    CustomTestCase,
    find_available_port,
    popen_launch_server,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import BOS, FIRST_TEXT_TOKEN, SHAPES, write_checkpoint

register_cpu_ci(est_time=300, suite="stage-a-test-cpu")

REQUESTS = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 300
TINY = SHAPES["tiny"].text
VOCAB, CONTEXT = TINY["vocab_size"], TINY["max_position_embeddings"]
HIDDEN = TINY["hidden_size"]
POOL = 4096
PLAIN = {
    "input_ids": [BOS, *range(FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + 7)],
    "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
}

# --- Values at and beyond the bounds ---


def around(*bounds):
    return [bound + step for bound in bounds for step in (-1, 0, 1)]


def mostly(ordinary, odd, of=8):
    """One value in so many is an odd one: one of them is enough to refuse a request."""
    return st.integers(1, of).flatmap(lambda i: odd if i == of else ordinary)


INTEGERS = mostly(
    st.integers(0, 3),
    st.sampled_from(
        [
            *around(0, VOCAB, POOL, CONTEXT, TOP_K_ALL, 2**31, 2**63, 2**64, 2**80),
            *around(-(2**31), -(2**63)),
        ]
    ),
    of=2,
)
# What asks for work is small, or beyond its bound: a long answer is no fault.
AMOUNTS = mostly(
    st.integers(1, 3),
    st.sampled_from([*around(0), *around(2**31, 2**63, -(2**31)), 2**80]),
)
TOKENS = mostly(
    st.integers(1, 3), st.sampled_from([*around(0), CONTEXT, *around(2**63), 2**80])
)
FLOATS = mostly(
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(
        [-0.0, -1.0, 2.0, -2.0, 100.0, -100.0, 2.5, -2.5, 5e-324, 1e-45]
        + [1e-7, 1e-6, 1e26, 1e27, 3.4e38, 3.5e38, 1e308, -3.5e38]
        + [float("nan"), float("inf"), float("-inf")]
    ),
    of=2,
)
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "two words",
        "\0",
        "\ud800",
        "é\U0001f600",
        "<|image|>",
        "<|audio|> <|video|>",
    ]
    + ["<bos><eos>", "<|turn>model\n", "a" * 300]
)
IDS = mostly(
    st.integers(FIRST_TEXT_TOKEN, VOCAB - 20),
    st.sampled_from(around(0, VOCAB, 2**63)),
    of=20,
)
SMALL_JSON = st.sampled_from([None, {}, [], 0, "a", {"a": 1}, {"a": {"b": [1, None]}}])


def image(width, height, part=1.0):
    data = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 30)).save(data, "PNG")
    data = data.getvalue()
    return base64.b64encode(data[: int(part * len(data))]).decode()


def silence(seconds):
    import wave

    data = io.BytesIO()
    with wave.open(data, "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(16000)
        f.writeframes(bytes(2 * int(16000 * seconds)))
    return base64.b64encode(data.getvalue()).decode()


BYTES = [
    *(image(64, 48), image(1, 1), image(300, 2), image(64, 48, 0.6)),
    *(silence(0.5), base64.b64encode(b"neither picture nor sound").decode()),
    *("", "no base64!"),
]
MEDIA = st.sampled_from(
    [f"data:image/png;base64,{data}" for data in BYTES]
    + [*BYTES, "data:audio/wav;base64," + BYTES[4], "data:image/png;base64"]
    + ["/no/such/file.png", "file:///no/such/file.wav", "file:///"]
)
GRAMMARS = {
    "regex": ["[ab]{1,3}", "(", "a{2,1}", "[z-a]", ""],
    "stop_regex": ["[ab]+", "(", "(?<=a+)b", "a{2,1}", "", "x" * 300],
    "ebnf": ['root ::= "a" | "b"', "root ::=", "a", ""],
    "json_schema": ['{"type": "integer"}', "{", '{"type": 5}', '"a"', "", "$$ANY$$"],
    "structural_tag": ["{}", "[", '{"type": "structural_tag"}', ""],
}

# --- A value of any type, as JSON ---


def optional_fields(fields, required=(), most=4):
    """A dict of the required fields and of at most `most` of the others."""
    others = sorted(set(fields) - set(required))

    @st.composite
    def draw(draw):
        chosen = draw(st.lists(st.sampled_from(others), max_size=most, unique=True))
        body = {name: draw(fields[name]) for name in (*required, *chosen)}
        if body and draw(st.integers(0, 9)) == 9:  # of another type
            body[draw(st.sampled_from(sorted(body)))] = draw(SMALL_JSON)
        return body

    return draw() if others else st.fixed_dictionaries({k: fields[k] for k in required})


def of_type(annotation, depth=0):
    """Values that the annotation admits, as JSON, and nothing deep."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return of_type(arguments[0], depth)
    if origin is typing.Literal:
        return st.sampled_from(list(arguments))
    if origin in (list, tuple, set, typing.Sequence):
        inner = of_type(arguments[0], depth + 1) if arguments else SMALL_JSON
        return st.lists(inner, max_size=3)
    if origin is dict or annotation is dict:
        value = of_type(arguments[1], depth + 1) if arguments else SMALL_JSON
        keys = st.one_of(TEXTS, st.integers(-1, VOCAB).map(str))
        return st.dictionaries(keys, value, max_size=3)
    if arguments:  # a union
        return st.one_of([of_type(argument, depth) for argument in arguments])
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return INTEGERS
    if annotation is float:
        return FLOATS
    if annotation is str:
        return TEXTS
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return st.sampled_from([member.value for member in annotation])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return st.just({}) if depth > 3 else model(annotation, depth=depth + 1)
    return SMALL_JSON


def later(annotation, depth=0):
    return st.deferred(lambda: of_type(annotation, depth))


@functools.cache
def _fields(cls):
    if issubclass(cls, BaseModel):
        return {
            name: (field.annotation, field.is_required())
            for name, field in cls.model_fields.items()
        }
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: (hints[field.name], False) for field in dataclasses.fields(cls)}


def model(cls, given=None, most=4, depth=0):
    """JSON of a request class; `given` has strategies for some of its fields."""
    fields = {
        name: later(annotation, depth) for name, (annotation, _) in _fields(cls).items()
    }
    fields.update({k: v for k, v in SPECIAL.items() if k in fields})
    fields.update(given or {})
    required = [name for name, (_, needed) in _fields(cls).items() if needed]
    return optional_fields(fields, sorted({*required, *(given or {})}), most)


PICTURE_OR_TEXT = st.lists(
    st.one_of(
        TEXTS.map(lambda text: {"type": "text", "text": text}),
        MEDIA.map(lambda url: {"type": "image_url", "image_url": {"url": url}}),
        MEDIA.map(lambda url: {"type": "audio_url", "audio_url": {"url": url}}),
        MEDIA.map(lambda url: {"type": "video_url", "video_url": {"url": url}}),
        st.sampled_from(BYTES).map(
            lambda data: {
                "type": "input_audio",
                "input_audio": {"data": data, "format": "wav"},
            }
        ),
    ),
    max_size=3,
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "system", "assistant"]),
                "content": st.one_of(TEXTS, PICTURE_OR_TEXT, st.none()),
            }
        ),
        later(protocol.ChatCompletionMessageParam),
    ),
    max_size=3,
)
PROMPTS = st.one_of(TEXTS, st.lists(TEXTS, max_size=3))
ID_PROMPTS = st.one_of(
    st.lists(IDS, max_size=5), st.lists(st.lists(IDS, max_size=5), max_size=3)
)
EMBEDS = st.one_of(
    st.lists(st.lists(FLOATS, max_size=3), max_size=2),
    st.sampled_from([[[0.5] * HIDDEN], [[0.5] * (HIDDEN + 1)]]),
)

# Fields of whatever class where a value of the type alone would miss the bound, ask for
# much work, or fetch something.
SPECIAL = {
    **{name: st.sampled_from(texts) for name, texts in GRAMMARS.items()},
    "model": st.just("default"),
    "input_ids": ID_PROMPTS,
    "image_data": st.one_of(MEDIA, st.lists(MEDIA, max_size=3)),
    "video_data": st.one_of(MEDIA, st.lists(MEDIA, max_size=2)),
    "audio_data": st.one_of(MEDIA, st.lists(MEDIA, max_size=2)),
    "url": MEDIA,
    "n": AMOUNTS,
    "best_of": AMOUNTS,
    "beam_width": AMOUNTS,
    "max_new_tokens": TOKENS,
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
    "max_output_tokens": TOKENS,
    "min_new_tokens": AMOUNTS,
    "min_tokens": AMOUNTS,
    "stop_token_ids": st.lists(IDS, max_size=4),
    "token_ids_logprob": ID_PROMPTS,
    "label_token_ids": ID_PROMPTS,
    "query_embed_overrides": EMBEDS,
    "embed_override_token_id": st.sampled_from([FIRST_TEXT_TOKEN, -1, VOCAB]),
    # One that loads is code, which may do anything.
    "custom_logit_processor": st.sampled_from(["", "a", "{}"]),
    # A background answer is one more request in flight.
    "background": st.just(False),
}
SAMPLING = {
    field: later(annotation)
    for field, annotation in typing.get_type_hints(SamplingParams).items()
    if field in SamplingParams.__struct_fields__
}
SAMPLING.update({k: v for k, v in SPECIAL.items() if k in SAMPLING})
SAMPLING_PARAMS = optional_fields(SAMPLING, ["max_new_tokens"], most=3)

GENERATE = st.one_of(
    [
        model(
            GenerateReqInput,
            {
                prompt: values,
                "sampling_params": st.one_of(
                    SAMPLING_PARAMS, st.lists(SAMPLING_PARAMS, min_size=1, max_size=3)
                ),
            },
        )
        for prompt, values in {"text": PROMPTS, "input_ids": ID_PROMPTS}.items()
    ]
)
SHORT = {"max_tokens": TOKENS}
SCORE = {
    "query": st.one_of(TEXTS, st.lists(IDS, max_size=4)),
    "items": st.one_of(PROMPTS, ID_PROMPTS),
    "label_token_ids": ID_PROMPTS,
}
COMPLETION = {"prompt": st.one_of(PROMPTS, ID_PROMPTS), **SHORT}
CHAT = {"messages": MESSAGES, **SHORT}
RESPONSE = {
    "model": st.just("default"),
    "input": st.one_of(TEXTS, MESSAGES),
    "max_output_tokens": TOKENS,
}
# How often, where, what.
_ENDPOINTS = [
    (6, "/generate", GENERATE),
    (5, "/v1/chat/completions", protocol.ChatCompletionRequest, CHAT),
    (3, "/v1/completions", protocol.CompletionRequest, COMPLETION),
    (2, "/v1/responses", protocol.ResponsesRequest, RESPONSE),
    (2, "/v1/score", protocol.ScoringRequest, SCORE),
    (2, "/v1/messages", AnthropicMessagesRequest, {"messages": MESSAGES, **SHORT}),
    (1, "/v1/embeddings", protocol.EmbeddingRequest, {}),
    (1, "/v1/classify", protocol.ClassifyRequest, {}),
    (1, "/v1/rerank", protocol.V1RerankReqInput, {}),
    (1, "/v1/tokenize", protocol.TokenizeRequest, {"prompt": PROMPTS}),
    (1, "/v1/tokenize", protocol.TokenizeRequest, {"messages": MESSAGES}),
    (1, "/v1/detokenize", protocol.DetokenizeRequest, {}),
    (1, "/encode", EmbeddingReqInput, {"text": PROMPTS}),
    (1, "/classify", EmbeddingReqInput, {"input_ids": ID_PROMPTS}),
]
GENERATES = {
    *("/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/v1/score", "/v1/messages", "/v1/tokenize", "/v1/detokenize"),
}
_STRATEGIES = [
    endpoint
    for times, path, *what in _ENDPOINTS
    for endpoint in [(path, what[0] if len(what) == 1 else model(*what))] * times
]
_STRATEGIES.append(("/v1/chat/completions", SMALL_JSON))
REQUEST = st.sampled_from(_STRATEGIES).flatmap(
    lambda endpoint: st.tuples(st.just(endpoint[0]), endpoint[1])
)


class TestRequestFuzz(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="gemma4-fuzz-")
        cls.process = None
        write_checkpoint(f"{cls.folder}/tiny", dtype="float32")
        cls.base_url = f"http://127.0.0.1:{find_available_port(23000)}"
        path = [os.path.dirname(sys.executable), os.environ.get("PATH", "")]
        cls.process = popen_launch_server(
            f"{cls.folder}/tiny",
            cls.base_url,
            timeout=600,
            device="cpu",
            other_args=[
                *("--device", "cpu", "--dtype", "float32"),
                *("--max-total-tokens", str(POOL)),
                *("--served-model-name", "default"),
                "--skip-server-warmup",
                "--enable-custom-logit-processor",
            ],
            env={
                "PATH": os.pathsep.join(path),
                "OMP_NUM_THREADS": "1",
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        cls.session = requests.Session()
        cls.answered = set()
        cls.plain = cls.post("/generate", PLAIN).json()["output_ids"]

    @classmethod
    def tearDownClass(cls):
        if cls.process is not None:
            kill_process_tree(cls.process.pid)
            cls.process.wait()
        shutil.rmtree(cls.folder)

    @classmethod
    def post(cls, path, body):
        # As a client would that knows no better: NaN, and half of a surrogate pair.
        return cls.session.post(
            cls.base_url + path,
            data=json.dumps(body),
            headers={"Content-Type": "application/json"},
            timeout=600,  # an answer may have as many tokens as the context
        )

    def load(self):
        loads = self.session.get(f"{self.base_url}/v1/loads", timeout=60).json()
        [load] = loads["loads"]
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        return {name: load[name] for name in names}

    @settings(
        max_examples=REQUESTS,
        deadline=None,
        # A lost server answers no smaller request either.
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(REQUEST)
    def test_requests(self, request):
        path, body = request
        said = f"{path} {json.dumps(body)}"
        try:
            response = self.post(path, body)
        except requests.RequestException as e:
            self.fail(f"no answer to {said}: {e}")
        self.assertTrue(
            response.status_code == 200 or 400 <= response.status_code < 500,
            f"{response.status_code} to {said}: {response.text[:2000]}",
        )

        if response.status_code == 200:
            self.answered.add(path)

        plain = self.post("/generate", PLAIN)
        self.assertEqual(plain.status_code, 200, plain.text)
        self.assertEqual(plain.json()["output_ids"], self.plain)

        deadline = time.monotonic() + 30
        while any(self.load().values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(set(self.load().values()), {0}, self.load())

    def test_requests_are_answered(self):
        """By the endpoints of a model that generates, of the requests above."""
        self.assertLessEqual(GENERATES, self.answered)

    def test_sigterm_ends_it(self):
        """It waits for the requests it counts, and none of those is left."""
        self.process.terminate()
        self.process.wait(timeout=60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    unittest.main()
