"""The workflows do nothing but what is tested here, pin what they use, and give no
pull request's code more than it may have."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fork.ci import gate
from fork.env import Engine

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {
    path.name: yaml.load(path.read_text(), yaml.BaseLoader)
    for path in sorted(FOLDER.glob("*.yml"))
}
JOBS = [
    pytest.param(name, key, id=f"{name}:{key}")
    for name, workflow in WORKFLOWS.items()
    for key in workflow["jobs"]
]

# What each target of a workflow runs, and the tests that run that. `make test` is
# what runs them.
SERIES = "v0.5.23"  # the Makefile's
FORK = f'-m fork --series "{SERIES}"'
TESTED = {
    "gate": ("-m fork.ci.gate", "test_gate.test_the_workflows_calls"),
    "gate-starts": ("-m fork.ci.gate starts", "test_gate.test_the_workflows_calls"),
    "test": (
        f"{FORK} test",
        "test_bases.test_the_tests_of_a_complete_series_are_its_own",
    ),
    "prove": (f"{FORK} prove", "test_prove.test_each_patch_is_proved"),
    "rehearse": (
        f'{FORK} rehearse --repository "https://github.com/sgl-project/sglang"',
        "test_release.test_the_series_on_upstreams_tag",
    ),
    "bench": ("-m gemma4 serve --quick", "benchmark/test_serving.py"),
    "nightly": ("-m pytest -m hypothesis test", "test_workflows.test_nightly"),
    "port": (f"{FORK} port", "test_port.test_what_upstream_did_meanwhile"),
    "watch": ("-m fork.ci.watch", "test_port.test_one_issue_is_kept_up_to_date"),
    "wheel": (
        "wheel --no-deps --no-index --no-build-isolation "
        f'--config-settings series="{SERIES}" --wheel-dir dist/wheels ./python',
        "test_build.test_the_real_wheel",
    ),
    "smoke": (
        f"{FORK} smoke --port",
        "test_release.test_the_real_wheel_serves_installed_alone",
    ),
    "release": (f"{FORK} release --tag", "test_release.test_what_a_release_holds"),
    "publish": ("-m fork.ci.publish", "test_release.test_publishing"),
    "publish-check": (
        "-m fork.ci.publish check",
        "test_release.test_what_is_not_published",
    ),
}


def steps(name: str, job: str) -> list[dict]:
    return WORKFLOWS[name]["jobs"][job]["steps"]


def test_each_step_is_a_target_that_is_tested():
    runs = [
        step["run"]
        for workflow in WORKFLOWS.values()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    form = r"make ([a-z-]+)(?: [A-Z]+=[A-Za-z0-9.^-]+)*"
    targets = {re.fullmatch(form, line)[1] for line in runs}
    assert targets == set(TESTED)
    command = ["make", "--dry-run", f"PYTHON={sys.executable}", *targets]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not made.returncode, made.stderr
    for command, test in TESTED.values():
        assert command in made.stdout
        if test.endswith(".py"):
            assert (ROOT / "test" / test).is_file()
        else:
            module, _, function = test.partition(".")
            assert not function or callable(
                getattr(importlib.import_module(module), function)
            )


@given(st.integers())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nightly(request, _):
    """What `-m hypothesis` selects."""
    assert request.node.get_closest_marker("hypothesis")


@pytest.mark.parametrize("name, job", JOBS)
def test_what_is_used_is_pinned_and_bounded(name, job):
    text = (FOLDER / name).read_text()
    assert WORKFLOWS[name]["permissions"] == {}
    assert "concurrency" in WORKFLOWS[name]
    assert 0 < int(WORKFLOWS[name]["jobs"][job]["timeout-minutes"]) <= 300
    for step in steps(name, job):
        if "uses" in step:
            pin = rf"{re.escape(step['uses'])} # v\d+\.\d+\.\d+$"
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
            assert re.search(pin, text, re.MULTILINE)
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


def test_an_action_has_one_pin():
    text = "".join(path.read_text() for path in FOLDER.glob("*.yml"))
    pins = set(re.findall(r"uses: (\S+@\S+ # \S+)", text))
    assert len(pins) == len({pin.split("@")[0] for pin in pins})


def test_a_pull_requests_code_gets_nothing():
    """It can read the repository and has no secret; nothing else runs it."""
    for name, workflow in WORKFLOWS.items():
        text = (FOLDER / name).read_text()
        assert not re.search(r"\bsecrets\b", text), name
        if "pull_request" in workflow["on"]:
            assert "token" not in re.sub("(?m)^ *#.*", "", text)
            for job in workflow["jobs"].values():
                assert job["permissions"] == {"contents": "read"}
                assert job["runs-on"] == "ubuntu-24.04"
    of_pulls = {
        name
        for name, workflow in WORKFLOWS.items()
        if {"pull_request", "pull_request_target", "workflow_run"} & {*workflow["on"]}
    }
    assert of_pulls == {"gate.yml", "pr-test.yml"}


def test_the_gate_checks_out_no_pull_request():
    """It has a token that can write, so that what it runs is the base's alone."""
    (job,) = WORKFLOWS["gate.yml"]["jobs"].values()
    checkout, run = job["steps"]
    assert "ref" not in checkout["with"] and "repository" not in checkout["with"]
    assert run["run"] == "make gate"
    assert run["env"] == {"GITHUB_TOKEN": "${{ github.token }}"}
    asked = steps("pr-test.yml", "gate")[0]["with"]["ref"]
    assert asked == "${{ github.event.pull_request.base.sha }}"


def test_the_module_and_the_workflows_agree():
    tests = WORKFLOWS[gate.TESTS]
    assert WORKFLOWS["gate.yml"]["on"]["workflow_run"]["workflows"] == [tests["name"]]
    names = [job["name"].split(" ")[0] for job in tests["jobs"].values()]
    assert names == ["Gate", *gate.STAGES]
    base, extra = tests["jobs"]["base"], tests["jobs"]["extra"]
    assert base["needs"] == "gate" and extra["needs"] == "base"
    assert base["if"] == "needs.gate.outputs.run == 'true'"
    # Each that the base has a wheel for, in a release too.
    pythons = [".".join(map(str, version)) for version in Engine(SERIES).pythons()]
    assert base["strategy"]["matrix"]["python"] == pythons
    for job in ("wheel", "smoke"):
        matrix = WORKFLOWS["release.yml"]["jobs"][job]["strategy"]["matrix"]
        assert matrix["python"] == pythons
    events = set(WORKFLOWS["gate.yml"]["on"]["pull_request_target"]["types"])
    assert events == {*tests["on"]["pull_request"]["types"], "unlabeled"}
    # Another label's run must not stop a run, nor be stopped.
    of_tests = f"(github.event.label.name || '{gate.LABEL}') == '{gate.LABEL}'"
    group = f"${{{{ {of_tests} && '{gate.LABEL}' || github.run_id }}}}"
    assert tests["concurrency"]["group"].endswith(f"-{group}")


def test_caches_hang_on_what_is_pinned_and_a_release_has_none():
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                kept = step.get("with", {})
                if "cache" in kept:
                    paths = kept["cache-dependency-path"].split()
                    base = f"patches/{SERIES}/base.txt"
                    assert paths == ["python/pyproject.toml", base]
                    assert name == "pr-test.yml"


def test_a_release_is_signed_as_it_is_published():
    job = WORKFLOWS["release.yml"]["jobs"]["publish"]
    assert job["if"] == "github.ref_type == 'tag'"
    uses = [
        step.get("uses", step.get("run", "")).split("@")[0] for step in job["steps"]
    ]
    assert uses[-2:] == ["actions/attest-build-provenance", "make publish"]
    assert job["steps"][-2]["with"] == {"subject-checksums": "dist/release/SHA256SUMS"}


def test_a_release_is_written_before_anything_unpinned_is_installed():
    """And the job that publishes knows, from the one that wrote it, what that was."""
    jobs = WORKFLOWS["release.yml"]["jobs"]
    assert "needs" not in jobs["wheel"] and jobs["assemble"]["needs"] == "wheel"
    assert jobs["test"]["needs"] == jobs["smoke"]["needs"] == "assemble"
    assert {*jobs["publish"]["needs"]} == {"assemble", "test", "smoke"}
    built = [step["run"] for job in ("wheel", "assemble") for step in steps_run(job)]
    assert built == ["make wheel", "make release"]
    (release,) = steps_run("assemble")
    output = f"${{{{ steps.{release['id']}.outputs.digest }}}}"
    assert jobs["assemble"]["outputs"] == {"digest": output}
    for step in steps_run("publish"):
        assert step["env"]["DIGEST"] == "${{ needs.assemble.outputs.digest }}"
        assert step["env"]["TAG"] == "${{ github.ref_name }}"


def steps_run(job: str) -> list[dict]:
    return [step for step in steps("release.yml", job) if "run" in step]


def test_dependencies_are_kept_up_to_date():
    path = ROOT / ".github/dependabot.yml"
    updates = yaml.safe_load(path.read_text())["updates"]
    kinds = {update["package-ecosystem"]: update["directory"] for update in updates}
    assert kinds == {"github-actions": "/", "pip": "/python"}


def test_the_templates_ask_what_upstreams_ask():
    template = (ROOT / ".github/pull_request_template.md").read_text()
    headings = re.findall(r"^## (.+)$", template, re.MULTILINE)
    assert headings == [
        "Motivation",
        "Modifications",
        "Accuracy Tests",
        "Benchmarking and Profiling",
        "Checklist",
    ]
    for path in Path(ROOT / ".github/ISSUE_TEMPLATE").glob("[0-9]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"] and form["body"]
