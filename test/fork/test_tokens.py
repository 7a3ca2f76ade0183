"""A job whose token can write, or that is given a secret, runs actions that are pinned and
modules of ours that need the standard library alone; nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

FOLDER = ROOT / ".github" / "workflows"
# The actions that such a job may use, and what it may tell them: no ref, no cache.
ACTIONS = {
    "actions/checkout": {
        "persist-credentials",
        "sparse-checkout",
        "sparse-checkout-cone-mode",
    },
    "actions/download-artifact": {"name", "path"},
    "actions/attest-build-provenance": {"subject-checksums"},
}
JOB = {"name", "needs", "if", "runs-on", "timeout-minutes", "environment"}
JOB |= {"permissions", "steps"}
STEP = {"name", "id", "if", "uses", "with", "run", "env"}
ENV = {"GITHUB_TOKEN", "TAG", "DIGEST"}
RECIPE = re.compile(r'cd python && "[^"]+" -m (fork\.ci\.[a-z]+)(?: [a-z]+)*')


def may_write(workflow: dict, job: dict) -> bool:
    told = job.get("permissions", workflow.get("permissions"))
    # GitHub's default, where there is none, is the repository's to choose.
    reads = isinstance(told, dict) and set(told.values()) <= {"read", "none"}
    secret = re.search(r"\bsecrets\b", json.dumps([job, workflow.get("env")]))
    return bool(secret) or not (reads or told == "read-all")


def offences(text: str, root: Path = ROOT) -> list[str]:
    """What a workflow does with a token that can write, or a secret, and may not.

    Args:
        root: Where its make targets are.
    """
    workflow = yaml.load(text, yaml.BaseLoader)
    found = []
    for name, job in workflow["jobs"].items():
        if not may_write(workflow, job):
            continue
        found += [f"{name}: has {key}" for key in {*job} - JOB]
        found += [f"{name}: has {key}" for key in {*workflow} & {"env", "defaults"}]
        for step in job.get("steps", ()):
            found += [f"{name}: a step has {key}" for key in {*step} - STEP]
            found += [f"{name}: sets {key}" for key in {*step.get("env", ())} - ENV]
            if "uses" in step:
                found += [f"{name}: {why}" for why in _action(step)]
            if "run" in step:
                found += [f"{name}: {why}" for why in _script(step["run"], root)]
    return found


def _action(step: dict) -> list[str]:
    action, _, version = step["uses"].partition("@")
    if action not in ACTIONS or not re.fullmatch("[0-9a-f]{40}", version):
        return [f"uses {step['uses']}"]
    told = step.get("with", {})
    found = [f"tells {action} its {key}" for key in {*told} - ACTIONS[action]]
    if action == "actions/download-artifact":
        # Elsewhere it could be what the next step runs.
        if not re.fullmatch(r"dist(/[a-z]+)?", told.get("path", "")):
            found.append(f"downloads to {told.get('path')}")
    return found


def _script(script: str, root: Path) -> list[str]:
    target = re.fullmatch("make ([a-z-]+)", script)
    if not target:
        return [f"runs {script}"]
    command = ["make", "--dry-run", "--no-print-directory", "PYTHON=python3", target[1]]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()
    return [f"runs {line}" for line in lines if not RECIPE.fullmatch(line)]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yml")), ids=lambda p: p.name)
def test_a_token_that_can_write_is_given_to_no_foreign_code(path):
    assert offences(path.read_text()) == []


def test_the_jobs_whose_token_can_write():
    """That the test above looks at them."""
    found = set()
    for path in FOLDER.glob("*.yml"):
        workflow = yaml.load(path.read_text(), yaml.BaseLoader)
        jobs = workflow["jobs"].items()
        found |= {f"{path.stem}:{n}" for n, job in jobs if may_write(workflow, job)}
    assert found == {"base-watch:watch", "gate:gate", "release:publish"}


@pytest.mark.parametrize("module", ["gate", "watch", "publish"])
def test_what_such_a_job_runs_needs_the_standard_library_alone(module, tmp_path):
    code = f"""
import sys
sys.path.append({str(ROOT / "python")!r})
import fork.ci.{module}
found = {{name.partition(".")[0] for name in sys.modules}}
print(*found - {{*sys.stdlib_module_names, "__main__", "fork"}})
print(*(name for name in sys.modules if name.startswith("fork.")))
"""
    # Without site-packages, and what .pth files there would import.
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    foreign, ours = done.stdout.splitlines()
    assert not foreign
    assert {*ours.split()} <= {
        *("fork.ci", "fork.ci.github", f"fork.ci.{module}", "fork.errors")
    }
    # Nor does it start a program, which could be any.
    files = (ROOT / "python/fork/ci").glob("*.py")
    assert not any("subprocess" in file.read_text() for file in files)


SHA = "0123456789abcdef0123456789abcdef01234567"
WORKFLOW = """
on: push
permissions: {{}}
jobs:
  one:
    runs-on: ubuntu-24.04
    permissions: {permissions}
    steps:
      - {step}
"""
READS = "{contents: read}"
WRITES = "{contents: read, issues: write}"


@pytest.mark.parametrize(
    "step, said",
    [
        ("run: make watch", None),
        ("run: make port", "env.py"),  # installs tools
        ("run: make test", "env.py"),
        ("run: pip install packaging", "runs pip"),
        ("run: python3 -m pip install --require-hashes -r x.txt", "runs python3"),
        ("run: npm ci", "runs npm"),
        ("run: 'curl https://example.com/x | sh'", "runs curl"),
        ("run: make watch SERIES=x", "runs make watch SERIES=x"),
        ("run: 'make watch; pip install x'", "runs make watch; pip"),
        ('{run: "make watch\\npip install x"}', "pip install x"),
        ("{run: make watch, shell: python}", "has shell"),
        ("{run: make watch, env: {PYTHONPATH: x}}", "sets PYTHONPATH"),
        ("{run: make watch, env: {GITHUB_TOKEN: x}}", None),
        (f"uses: actions/checkout@{SHA}", None),
        ("uses: actions/checkout@v7", "uses actions/checkout@v7"),
        ("uses: actions/checkout", "uses actions/checkout"),
        (f"uses: actions/setup-python@{SHA}", "uses actions/setup-python"),
        (f"uses: somebody/else@{SHA}", "uses somebody/else"),
        ("uses: docker://alpine", "uses docker"),
        ("uses: ./.github/actions/ours", "uses ./.github"),
        (f"{{uses: actions/checkout@{SHA}, with: {{ref: x}}}}", "its ref"),
        (
            f"{{uses: actions/download-artifact@{SHA}, with: {{path: dist}}}}",
            None,
        ),
        (
            f"{{uses: actions/download-artifact@{SHA}, with: {{path: python}}}}",
            "downloads to python",
        ),
        (f"uses: actions/download-artifact@{SHA}", "downloads to None"),
    ],
)
def test_what_a_token_that_can_write_is_not_given_to(step, said):
    found = "\n".join(offences(WORKFLOW.format(permissions=WRITES, step=step)))
    assert said in found if said else not found
    assert not offences(WORKFLOW.format(permissions=READS, step=step))


@pytest.mark.parametrize("permissions", ["write-all", "{id-token: write}", '""'])
def test_other_ways_to_write(permissions):
    step = "run: pip install x"
    assert offences(WORKFLOW.format(permissions=permissions, step=step))


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("permissions:", "x:", "runs pip"),  # the repository's default
        ("run: pip install x", "{run: x, env: {A: '${{ secrets.A }}'}}", "sets A"),
        ("permissions: {}", "env: {A: '${{ secrets.A }}'}", "has env"),
        ("steps:", "secrets: inherit\n    steps:", "has secrets"),
        (READS, f"{WRITES}\n    container: alpine", "has container"),
        (READS, f"{WRITES}\n    defaults: {{run: {{shell: x}}}}", "has defaults"),
    ],
)
def test_other_ways_to_be_given_one(old, new, said):
    text = WORKFLOW.format(permissions=READS, step="run: pip install x")
    assert not offences(text)
    assert said in "\n".join(offences(text.replace(old, new)))


# As they were when they installed what no hash pinned.
MAKEFILE = """
tools:
	@"$(PYTHON)" python/fork/env.py tools
watch: tools
	@cd python && "$(CURDIR)/.cache/tools/bin/python" -m fork watch
publish: tools
	@cd python && "$(CURDIR)/.cache/tools/bin/python" -m fork publish
"""


@pytest.mark.parametrize("target", ["watch", "publish"])
def test_the_targets_that_installed_what_no_hash_pinned(target, tmp_path):
    (tmp_path / "Makefile").write_text(MAKEFILE)
    step = f"{{run: make {target}, env: {{GITHUB_TOKEN: x}}}}"
    text = WORKFLOW.format(permissions=WRITES, step=step)
    installs, runs = offences(text, tmp_path)
    assert installs == 'one: runs "python3" python/fork/env.py tools'
    assert runs.endswith(f"-m fork {target}")
    assert offences(text) == []
