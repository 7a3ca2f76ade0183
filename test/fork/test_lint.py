"""`make lint` finds faults of ours and of the lines we add, and no others."""

import pytest

from fork.lint import _lint_added, lint_workflows
from fork.process import Git
from fork.series import BASE

# Three faults of the base, which are upstream's: order, an unused import, spaces.
UPSTREAM = "import sys\nimport os\n\n\ndef f( ):\n    return sys.argv\n"


@pytest.fixture
def tree(tmp_path):
    git = Git(tmp_path)
    git("init", "--quiet")
    (tmp_path / "model.py").write_text(UPSTREAM)
    (tmp_path / "sorted.py").write_text("import os\nimport sys\n\nprint(os, sys)\n")
    git("add", "--all")
    tree = git("write-tree").strip()
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@localhost"}
    commit = git("commit-tree", tree, input="base\n", **identity).strip()
    git("update-ref", BASE, commit)
    return git


def findings(git: Git, name: str, text: str) -> str:
    (git.folder / name).write_text(text)
    return "\n".join(_lint_added(git))


def test_faults_of_upstream_are_upstreams(tree):
    assert not findings(tree, "model.py", UPSTREAM + "\n\ndef g():\n    return 1\n")


@pytest.mark.parametrize(
    "line, words",
    [
        ("    return  [1,2]\n", "return [1, 2]"),
        ("    return missing\n", "F821"),
        ("    import json\n", "F401"),
    ],
)
def test_faults_of_added_lines_are_found(tree, line, words):
    assert words in findings(tree, "model.py", UPSTREAM + "\n\ndef g():\n" + line)


def test_blank_lines_beside_added_ones_are_left(tree):
    """Black with --line-ranges takes one of the two before the class."""
    text = "import os\n\n\nclass A:\n    x = os\n    y = os.sep\n"
    (tree.folder / "sorted.py").write_text(text)
    assert not findings(tree, "sorted.py", text)
    assert findings(tree, "sorted.py", text.replace("\n\n\nclass", "\n\nclass"))


def test_unsorted_imports_are_found_where_the_base_sorted_them(tree):
    text = "import sys\nimport os\n\nprint(os, sys)\n"
    assert "+import os" in findings(tree, "sorted.py", text)


def test_a_linter_that_does_not_run_is_a_finding(tree, monkeypatch):
    monkeypatch.setattr("fork.lint.RUFF", ["ruff", "check", "--no-such-option"])
    assert "no-such-option" in findings(tree, "model.py", UPSTREAM + "\nx = 1\n")


WORKFLOW = """name: A workflow
on: push
permissions: {}
concurrency: {group: one, cancel-in-progress: true}
jobs:
  job:
    name: A job
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    steps:
      - name: A step
        run: make test
"""


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("", "", None),
        ("runs-on", "run-on", 'unexpected key "run-on"'),  # actionlint
        ("make test", "echo $X [", "SC2086"),  # shellcheck, through actionlint
        ("run: make test", "uses: actions/checkout@v6", "unpinned-uses"),  # zizmor
        ("    name: A job\n", "", "anonymous-definition"),  # zizmor --pedantic
    ],
)
def test_faults_of_workflows_are_found(tmp_path, old, new, words):
    (tmp_path / ".github/workflows").mkdir(parents=True)
    workflow = tmp_path / ".github/workflows/one.yml"
    workflow.write_text(WORKFLOW.replace(old, new, 1))
    found = "\n".join(lint_workflows(tmp_path))
    assert words in found if words else not found
