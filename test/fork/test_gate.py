"""The run-ci gate, over every sequence of what people and runners do."""

import copy
import json
import os
import subprocess
import sys
import urllib.parse

import pytest
from conftest import ROOT
from github_fake import REPOSITORY, FakeGitHub
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fork.ci import gate
from fork.ci.github import GitHub, RequestError

BASE, EXTRA = "Latest PR Test (Base)", "Latest PR Test (Extra)"
NOT_LABELLED = {
    BASE: ("failure", "Missing `run-ci` label -- add it to run CI tests."),
    EXTRA: ("failure", "Blocked -- `run-ci` is required first."),
}
LABELLED = {
    "running": {
        BASE: ("pending", "Running."),
        EXTRA: ("pending", "Waiting for its turn."),
    },
    "passed": {BASE: ("success", "Passed."), EXTRA: ("success", "Passed.")},
    "failed": {
        BASE: ("failure", "Failed."),
        EXTRA: ("failure", "Not run, as Base did not pass."),
    },
    "extra failed": {BASE: ("success", "Passed."), EXTRA: ("failure", "Failed.")},
    "none": {
        BASE: ("pending", "Waiting for its turn."),
        EXTRA: ("pending", "Waiting for its turn."),
    },
}


class Direct(GitHub):
    """The API without a network: GitHub's own code but for the sending."""

    def __init__(self, fake):
        super().__init__(REPOSITORY, "a-token", "")
        self.fake = fake

    def _send(self, method, url, data, kind="application/json"):
        address = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(address.query))
        body = json.loads(data) if data else None
        status, told = self.fake.handle(method, address.path, query, body)
        if status >= 400:
            refused = RequestError.__new__(RequestError)
            refused.status = status
            raise refused
        return told


def run_gate(fake, name, payload):
    github = Direct(fake)
    for pull in gate.heads(github, name, payload):
        gate.reconcile(github, pull)


def settle(fake):
    """Runs the gate for each event, and for those that this leads to."""
    fake.end_untested()
    while fake.events:
        run_gate(fake, *fake.events.pop(0))


class Expected:
    """What the issue says of a pull request: whether it may be tested, and how the
    tests of its head stand."""

    def __init__(self):
        self.labelled, self.result, self.open = False, "none", True

    def start(self):
        self.result = "running" if self.labelled and self.open else "none"

    def statuses(self):
        return LABELLED[self.result] if self.labelled else NOT_LABELLED


def by_maintainer(fake, expected):
    if not expected.labelled:
        expected.labelled = True
        if expected.open:
            expected.start()
    fake.label("run-ci", "maintainer")


def by_triager(fake, expected):
    fake.label("run-ci", "triager")


def by_bot(fake, expected):
    fake.label("run-ci", "some-bot[bot]")


def other_label(fake, expected):
    fake.unlabel("documentation")
    fake.label("documentation", "triager")


def unlabelled(fake, expected):
    fake.unlabel("run-ci")
    expected.labelled = False


def pushed(fake, expected):
    fake.push()
    expected.start()


def reopened(fake, expected):
    fake.close()
    fake.reopen()
    if expected.labelled:
        expected.start()


def ended(*conclusions, result):
    def end(fake, expected):
        for run in fake.testing():
            fake.step(run, *conclusions)
            assert expected.labelled and run["head"] == fake.head
            expected.result = result

    return end


EVENTS = {
    "labelled": by_maintainer,
    "labelled without the right": by_triager,
    "another label": other_label,
    "unlabelled": unlabelled,
    "pushed": pushed,
    "reopened": reopened,
    "passed": ended("success", "success", result="passed"),
    "failed": ended("failure", result="failed"),
}
MORE = {
    "labelled by a bot": by_bot,
    "Extra failed": ended("success", "failure", result="extra failed"),
}


def check(fake, expected):
    assert fake.statuses[fake.head] == expected.statuses()
    assert ("run-ci" in fake.labels) == expected.labelled
    running = [run["head"] for run in fake.testing()]
    tested = expected.labelled and expected.result == "running"
    assert running == ([fake.head] if tested else [])


@pytest.mark.parametrize("fork", [False, True], ids=["own branch", "fork"])
def test_every_sequence_of_events(fork):
    """All that have four of them, and what is shown after each."""
    fake, expected = FakeGitHub(gate.starts, fork), Expected()
    fake.open()
    settle(fake)
    check(fake, expected)

    def follow(fake, expected, events, left):
        for event in events:
            after = copy.deepcopy((fake, expected))
            EVENTS[event](*after)
            settle(after[0])
            check(*after)
            if left > 1:
                follow(*after, events, left - 1)

    follow(fake, expected, EVENTS, 4)


@pytest.mark.parametrize("before", [(), ("labelled",), ("labelled", "passed")])
@pytest.mark.parametrize("event", MORE)
def test_rarer_events(before, event):
    fake, expected = FakeGitHub(gate.starts), Expected()
    fake.open()
    for act in [*(EVENTS[name] for name in before), MORE[event]]:
        act(fake, expected)
        settle(fake)
        check(fake, expected)


class AnyOrder(RuleBasedStateMachine):
    """The gate's runs come late, in any order, twice or, but for the last, not at
    all: what they leave is the same."""

    def __init__(self):
        super().__init__()
        self.fake, self.expected = FakeGitHub(gate.starts, fork=True), Expected()
        self.fake.open()

    @rule(event=st.sampled_from([by_maintainer, other_label, pushed, reopened]))
    def happen(self, event):
        event(self.fake, self.expected)

    @rule()
    def unlabel(self):
        unlabelled(self.fake, self.expected)

    @rule(which=st.integers(0, 99), again=st.booleans())
    @precondition(lambda self: self.fake.events)
    def gate_runs(self, which, again):
        events = self.fake.events
        event = events[which % len(events)]
        if not again:
            events.remove(event)
        run_gate(self.fake, *event)

    @rule(which=st.integers(0, 99))
    @precondition(lambda self: len(self.fake.events) > 1)
    def an_event_is_lost(self, which):
        self.fake.events.pop(which % (len(self.fake.events) - 1))

    @rule()
    def runs_end(self):
        if "run-ci" in self.fake.labels:
            EVENTS["passed"](self.fake, self.expected)

    @rule()
    def end_untested(self):
        self.fake.end_untested()

    @rule()
    def settle(self):
        settle(self.fake)
        check(self.fake, self.expected)

    @invariant()
    def only_what_is_said_is_shown(self):
        texts = [text for status in self.fake.statuses.values() for text in status]
        assert set(texts) <= {BASE, EXTRA}


TestAnyOrder = AnyOrder.TestCase


def test_a_push_while_the_label_is_being_removed():
    """The gate's run for the label is still to come: the tests that the push started
    end when it does."""
    fake, expected = FakeGitHub(gate.starts, fork=True), Expected()
    fake.open()
    fake.label("run-ci", "triager")
    fake.push()
    assert fake.testing()
    settle(fake)
    check(fake, expected)
    assert not fake.testing()


def test_a_run_that_waits_for_approval_is_not_a_result():
    fake, expected = FakeGitHub(gate.starts, fork=True), Expected()
    fake.open()
    by_maintainer(fake, expected)
    (run,) = fake.testing()
    run.update(status="completed", conclusion="action_required", jobs=[])
    fake.end_untested()
    while fake.events:
        run_gate(fake, *fake.events.pop(0))
    assert fake.statuses[fake.head] == LABELLED["none"]


def test_more_events_than_a_page_holds():
    fake, expected = FakeGitHub(gate.starts), Expected()
    fake.open()
    for _ in range(150):
        fake.label("documentation", "triager")
        fake.unlabel("documentation")
    by_maintainer(fake, expected)
    settle(fake)
    check(fake, expected)


def call(tmp_path, name, payload, env, *args):
    """Runs the module as the workflows do."""
    (tmp_path / "event.json").write_text(json.dumps(payload))
    (tmp_path / "output").touch()
    told = {
        "GITHUB_EVENT_NAME": name,
        "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    target = {"starts": "gate-starts"}.get(args[0], *args) if args else "gate"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    command = ["make", target, f"PYTHON={sys.executable}"]
    env = {**kept, **env, **told}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("fork", [False, True])
def test_the_workflows_calls(fork, tmp_path):
    """`make gate` and `make gate-starts`, over HTTP, as the workflows run them."""
    fake, expected = FakeGitHub(gate.starts, fork), Expected()
    fake.open()
    by_maintainer(fake, expected)
    with fake.served() as env:
        payloads = [payload for name, payload in fake.events if "action" in payload]
        answers = ["run=false\n", "run=true\n"]
        for payload, answer in zip(payloads, answers):
            (tmp_path / "output").unlink(missing_ok=True)
            done = call(tmp_path, "pull_request", payload, {}, "starts")
            assert not done.returncode, done.stderr
            assert (tmp_path / "output").read_text() == answer
        fake.end_untested()
        for event in (fake.events[1], fake.events[-1]):
            done = call(tmp_path, *event, env)
            assert not done.returncode, done.stderr
    assert "#1 Latest PR Test (Base): Running." in done.stdout
    check(fake, expected)


def test_the_gate_that_cannot_says_why(tmp_path):
    fake = FakeGitHub(gate.starts)
    fake.open()
    event = fake.events[0]
    done = call(tmp_path, *event, {})
    assert done.returncode and "GITHUB_REPOSITORY and GITHUB_TOKEN" in done.stderr
    closed = {"GITHUB_REPOSITORY": REPOSITORY, "GITHUB_TOKEN": "x"}
    closed["GITHUB_API_URL"] = "http://127.0.0.1:9"
    done = call(tmp_path, *event, closed)
    assert done.returncode and "does not answer" in done.stderr
    fake.handle = lambda *_: (403, {"message": "Resource not accessible"})
    with fake.served() as env:
        done = call(tmp_path, *event, env)
    assert done.returncode and "was refused: 403 Resource not acc" in done.stderr
    for told in (done.stdout, done.stderr):
        assert "Traceback" not in told
