"""Checks our files, and the lines our patches add, with SGLang's linters, and the
workflows with actionlint and zizmor."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fork.errors import ForkError
from fork.process import Git, run
from fork.project import Project
from fork.series import BASE
from fork.tree import Tree

# SGLang's pre-commit configuration: the tools' defaults but for these.
BLACK = ["black", "--check", "--quiet", "--diff"]
ISORT = ["isort", "--profile", "black", "--project", "sglang", "--project", "fork"]
RUFF = ["ruff", "check", "--quiet", "--isolated", "--select", "F401,F821"]
# Where the environment's own binaries are; neither asks anything of the network.
BIN = Path(sys.executable).parent
ACTIONLINT = [BIN / "actionlint", "-shellcheck", BIN / "shellcheck", "-pyflakes="]
ZIZMOR = [BIN / "zizmor", "--pedantic", "--offline", "--strict-collection", "--quiet"]
HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


def lint(project: Project) -> None:
    """Checks the repository's Python files and workflows, and what the series adds to
    upstream's files unless it is kept as it is.

    Raises:
        ForkError: There are findings; the message lists them.
    """
    git = Git(project.root)
    ours = git.names("ls-files", "-z", "-c", "-o", "--exclude-standard", "--", ".")
    ours = [f for f in ours if f.endswith(".py") and (project.root / f).exists()]
    findings = []
    for command in (BLACK, [*ISORT, "--diff"], [*RUFF, "--output-format=concise"]):
        findings += _findings([*command, *ours], project.root)
    findings += lint_workflows(project.root)
    if not project.complete():
        tree = Tree(project)
        tree.checkout()
        findings += _lint_added(tree.git)
    if findings:
        raise ForkError("\n".join(["the linters found:", *findings]))


def lint_workflows(root: Path) -> list[str]:
    """Finds what is wrong with the workflows and what else .github/ configures."""
    workflows = sorted((root / ".github" / "workflows").glob("*.yml"))
    done = [run([*ACTIONLINT, *workflows], cwd=root)]
    done += [run([*ZIZMOR, root / ".github"], cwd=root)]
    return [(d.stdout + d.stderr).strip() for d in done if d.returncode]


def _findings(command: list[str], cwd: Path, **kwargs) -> list[str]:
    """What one of Python's linters says, as a list of one or none."""
    done = run([sys.executable, "-m", *command], cwd=cwd, **kwargs)
    told = (done.stdout + done.stderr).strip()
    return [told] if told or done.returncode else []


def _format(name: str, spans: list[tuple[int, int]], cwd: Path) -> list[str]:
    """Finds what black would write in place of these lines of a file.

    Its own --line-ranges also changes blank lines beside them.
    """
    done = run([sys.executable, "-m", *BLACK, name], cwd=cwd)
    if done.returncode not in (0, 1):  # it did not run
        return [(done.stdout + done.stderr).strip()]
    head, *hunks = re.split(r"^(?=@@ )", done.stdout, flags=re.MULTILINE)
    found = ""
    for hunk in hunks:
        header, *lines = hunk.splitlines(keepends=True)
        row, changed, kind = int(re.match(r"@@ -(\d+)", header)[1]), set(), " "
        for line in lines:
            if line[0] == "-":
                changed.add(row)
            elif line[0] == "+" and kind == " ":
                changed |= {row - 1, row}  # it is put between these two
            row += line[0] != "+"
            kind = " " if line[0] == " " else kind if line[0] == "+" else "-"
        if any(first <= row <= last for first, last in spans for row in changed):
            found += hunk
    return [f"{head}{found}".strip()] if found else []


def _lint_added(git: Git) -> list[str]:
    """Finds what is wrong with the lines that the series adds."""
    findings = []
    names = git.names("diff", "--name-only", "-z", "--diff-filter=d", BASE)
    for name in filter(lambda name: name.endswith(".py"), names):
        hunks = HUNK.findall(git("diff", "--unified=0", BASE, "--", name))
        spans = [(int(start), int(start) + int(n or 1) - 1) for start, n in hunks]
        spans = [(first, last) for first, last in spans if first <= last]
        if not spans:
            continue
        findings += _format(name, spans, git.folder)
        command = [sys.executable, "-m", *RUFF, "--output-format=json", name]
        done = run(command, cwd=git.folder)
        if done.returncode not in (0, 1):  # it did not run
            findings.append(done.stderr.strip())
            continue
        for found in json.loads(done.stdout):
            row = found["location"]["row"]
            if any(first <= row <= last for first, last in spans):
                findings.append(f"{name}:{row}: {found['code']} {found['message']}")
        # isort knows no lines: it may find no more than it finds in the base's file.
        sort = [*ISORT, "--check-only", "-"]
        before = git.run("show", f"{BASE}:{name}")
        if before.returncode or not _findings(sort, git.folder, input=before.stdout):
            findings += _findings([*ISORT, "--diff", name], git.folder)
    return findings
