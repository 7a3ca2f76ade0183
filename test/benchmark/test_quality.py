"""The tasks of the trained model, its training, and what tells a wrong arm from a right one."""

import csv
import dataclasses
import http.server
import json
import random
import re
import threading

import pytest
import torch
from gemma4.engines.arms import Arm
from gemma4.engines.host import HOST
from gemma4.engines.models import has_weights
from gemma4.engines.servers import ArmServer, Setup
from gemma4.quality import answers as quality
from gemma4.quality import command, mmlu, tasks, training
from gemma4.quality.tasks import ANSWER, FILLER, KEYS, LOCAL_KEYS, VALUES, WINDOW
from gemma4.quality.wrong import wrong_arms


def records(tokens, first, keys):
    """(place, key, value) of every record of a kind."""
    found = []
    for place, token in enumerate(tokens):
        if first <= token < first + keys * VALUES:
            found.append((place, *divmod(token - first, VALUES)))
    return found


def solve(tokens, certain):
    """What each answer must be, from the tokens before it alone; checks each place."""
    values = set(range(ANSWER, ANSWER + VALUES))
    answers = 0
    for place, token in enumerate(tokens):
        if token not in values or not certain[place]:
            continue
        answers += 1
        asked, before = tokens[place - 1], tokens[: place - 1]
        if tasks.QUESTION <= asked < tasks.LOCAL_QUESTION:
            key = asked - tasks.QUESTION
            known = records(before, tasks.RECORD, KEYS)
            (value,) = [v for _, k, v in known if k == key]
        elif tasks.LOCAL_QUESTION <= asked < ANSWER:
            key = asked - tasks.LOCAL_QUESTION
            seen = records(before, tasks.LOCAL_RECORD, LOCAL_KEYS)
            (value,) = [
                v for p, k, v in seen if k == key and place - 1 - p <= WINDOW - 1
            ]
        else:
            row = tokens[place - 2] - tasks.FACT_ROW
            value = tasks.FACTS[row][asked - tasks.FACT_COLUMN]
        assert token == ANSWER + value
    return answers


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("fillers", [100, 3000])
def test_every_prompt_has_one_right_answer(task, fillers):
    for seed in range(5):
        found = tasks.prompt(task, seed, fillers)
        assert found == tasks.prompt(task, seed, fillers)
        tokens = found.tokens + found.answer
        assert len(tokens) < command.CONTEXT
        certain = [False] * len(found.tokens) + [True] * len(found.answer)
        assert solve(tokens, certain) == tasks.PAIRS
        asked = found.tokens[-1]
        if task in ("recall", "mixed"):
            key = asked - tasks.QUESTION
            ((place, _, _),) = [
                r for r in records(tokens, tasks.RECORD, KEYS) if r[1] == key
            ]
            assert len(found.tokens) - place > fillers


def test_a_local_record_lies_at_the_window_s_edge():
    """Of each key asked for: one record WINDOW - 1 tokens back, a false one before it."""
    found = tasks.prompt("local", 0, 100)
    tokens = found.tokens + found.answer
    for place in range(len(found.tokens) - 1, len(tokens), 2):
        key = tokens[place] - tasks.LOCAL_QUESTION
        near, far = (
            divmod(tokens[place - back] - tasks.LOCAL_RECORD, VALUES)
            for back in (WINDOW - 1, WINDOW)
        )
        assert near[0] == far[0] == key and near[1] != far[1]
        assert tokens[place + 1] == ANSWER + near[1]


QUESTION_MARKS = 700  # more than are asked


class Knows(http.server.BaseHTTPRequestHandler):
    """A server that answers three of four questions rightly, reasoning aloud first."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0
        (message,) = asked["messages"]
        number = int(re.search(r"question (\d+)", message["content"])[1])
        right = "ABCD"[number % 4]
        assert f"{right}. right {number}" in message["content"]
        text = f"The answer is not A. **Answer:** {right}" if number % 4 else None
        body = {"choices": [{"message": {"content": text}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


def test_mmlu_asks_the_same_questions_and_counts_right_answers(tmp_path):
    path = tmp_path / "mmlu.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "A", "B", "C", "D", "Answer", "Subject"])
        for i in range(QUESTION_MARKS):
            choices = [f"wrong {i}"] * 4
            choices[i % 4] = f"right {i}"
            writer.writerow(
                [f"question {i}, {{of}} no kind", *choices, "ABCD"[i % 4], ""]
            )
    asked = mmlu.questions(path)
    assert asked == mmlu.questions(path)
    assert len(set(asked)) == mmlu.QUESTIONS

    with http.server.ThreadingHTTPServer((HOST, 0), Knows) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        setup = Setup(tmp_path, stub.server_port)
        server = ArmServer(Arm("fork"), setup, tmp_path / "log")
        right = [
            mmlu.letter(mmlu.chat(server, prompt)) == letter
            for prompt, letter in asked[:40]
        ]
        stub.shutdown()
    assert right == [letter != "A" for _, letter in asked[:40]]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("Answer: C", "C"),
        ("I first thought answer: A, but\n**Answer: (b)**", "B"),
        ("answer is D", None),
        ("Answer: Always", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert mmlu.letter(text) == letter


def test_training_sequences_are_as_long_as_they_look():
    generator = random.Random(0)
    for _ in range(20):
        writer = tasks.training_sequence(generator, 256)
        assert len(writer.tokens) == len(writer.certain) == len(writer.positions) == 256
        assert len(writer.weights) == 256
        assert solve(writer.tokens, writer.certain) > 5
        steps = [b - a for a, b in zip(writer.positions, writer.positions[1:])]
        assert all(step >= 1 for step in steps)
        for place, step in enumerate(steps, 1):
            if step > 1:  # fillers alone are seen across a jump
                near = writer.tokens[place - WINDOW + 1 : place + WINDOW]
                assert all(FILLER <= token for token in near)
                around = writer.weights[place - WINDOW + 1 : place + WINDOW + 1]
                assert sum(around) == pytest.approx(2 * WINDOW + step - 1)


def test_a_token_that_stands_for_many_draws_as_much_attention():
    weights = torch.tensor([[1.0, 5.0, 1.0, 1.0]])
    mask = training._masks(weights)["full_attention"]
    query, key, value = torch.randn(3, 1, 1, 4, 8, generator=torch.manual_seed(0))
    attend = torch.nn.functional.scaled_dot_product_attention
    found = attend(query, key, value, attn_mask=mask)[0, 0, 3]
    many = [0, 1, 1, 1, 1, 1, 2, 3]
    key, value = key[:, :, many], value[:, :, many]
    assert torch.allclose(found, attend(query[:, :, 3:], key, value)[0, 0, 0])
    window = training._masks(torch.ones(1, WINDOW + 2))["sliding_attention"][0, 0]
    assert window[WINDOW + 1].tolist() == [False, False] + [True] * WINDOW


def test_recall_across_the_window_is_learned(monkeypatch):
    """On its own, and by two layers: the whole recipe takes minutes."""
    layers = ["sliding_attention", "full_attention"]
    text = {**tasks.SHAPE.text, "num_hidden_layers": 2, "layer_types": layers}
    shape = dataclasses.replace(tasks.SHAPE, text=text)
    monkeypatch.setattr(tasks, "SHAPE", shape)
    model = training.build()
    training.train(model, 200, "cpu", batch=8, mix=["recall"])
    assert training.right(model, "recall", count=8) >= training.LEAST_RECALL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model after a few steps, saved."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    built = training.build()
    losses = training.train(built, 12, "cpu")
    assert losses[-1] < losses[0] - 0.5
    training.save(built, folder)
    return folder


def answers(model, asked, dtype="bfloat16"):
    """What a model of transformers answers, as an arm's server would."""
    reference = quality.Reference(model, dtype)
    found = []
    for prompt in asked:
        logprobs = reference.logprobs(prompt.tokens, prompt.answer)
        values = logprobs[:, quality.VALUES].tolist()
        found.append(quality.Answer(prompt.answer, values))
    return found


def judged(model, asked, given):
    reference = quality.Reference(model)
    exact = [reference.logprobs(p.tokens, p.answer) for p in asked]
    rounded = answers(model, asked)
    noise, found = (
        [quality.differ(p, a, e) for p, a, e in zip(asked, arm, exact)]
        for arm in (rounded, given)
    )
    said = quality.judge("arm", asked, given, found, noise)
    return [line for line in said if "logprobs" in line], noise


def test_the_folder_is_what_a_server_loads(model):
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert config["text_config"]["sliding_window"] == WINDOW
    assert has_weights(model)
    assert (model / "processor_config.json").exists()


def test_rounding_passes_and_another_model_does_not(model, tmp_path):
    asked = [tasks.prompt(task, 0, 100) for task in tasks.TASKS]
    exact = answers(model, asked, "float32")

    def farther(times):
        """Answers so many times as far from float32's as bfloat16's are."""
        found = answers(model, asked)
        for answer, right in zip(found, exact):
            answer.logprobs = [
                [b + times * (a - b) for a, b in zip(*both)]
                for both in zip(answer.logprobs, right.logprobs)
            ]
        return found

    for times, failed in ((2.9, 0), (3.1, len(tasks.TASKS))):
        said, noise = judged(model, asked, farther(times))
        assert len(said) == failed, times
    assert max(x for d in noise for x in d.apart) > 0
    for name, (wrong, _) in wrong_arms(["window", "experts"], model, tmp_path).items():
        config = json.loads((wrong / "config.json").read_text())["text_config"]
        right = json.loads((model / "config.json").read_text())["text_config"]
        changed = [key for key in right if config[key] != right[key]]
        assert len(changed) == 1, name
    # The effect of either on a model that has learned is shown by --wrong; here one
    # that no training is needed for: a softcap that is not applied, say.
    given = answers(model, asked)
    for answer in given:
        answer.logprobs = [[x * 1.05 for x in given] for given in answer.logprobs]
    said, _ = judged(model, asked, given)
    assert len(said) == len(tasks.TASKS)


def test_a_token_that_is_clearly_not_the_choice_is_named(model):
    asked = [tasks.prompt("facts", 0, 100)]
    logprobs = torch.full((len(asked[0].answer), 2048), -9.0)
    for i, token in enumerate(asked[0].answer):
        logprobs[i, token] = -0.001
    given = (logprobs + 0.01)[:, quality.VALUES].tolist()
    right = quality.Answer(asked[0].answer, given)
    noise = [quality.differ(asked[0], right, logprobs)]
    assert noise[0].apart == pytest.approx([0.01] * tasks.PAIRS, rel=1e-3)
    wrong = quality.Answer([*right.tokens[:3], 7, *right.tokens[4:]], given)
    found = [quality.differ(asked[0], wrong, logprobs)]
    assert found[0].right.count(False) == found[0].chosen.count(False) == 1
    said = quality.judge("arm", asked, [wrong], found, noise)
    assert any("output 3 is 7" in line for line in said)


def test_what_is_not_there_is_said(tmp_path, refused):
    arguments = ["--out", str(tmp_path), "--model"]
    said = refused("quality", *arguments, str(tmp_path / "none"))
    assert "gemma4 train" in said and "trains it" in said
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights to ask" in refused("quality", *arguments, str(tmp_path))
    (tmp_path / "some.safetensors").touch()
    said = refused("quality", *arguments, str(tmp_path), "--mmlu", "none.csv")
    assert "is not there: it is simple-evals' mmlu.csv" in said
