"""Where the tests of a series are, and how they are run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from fork import base, series
from fork.process import say
from fork.project import Project
from fork.tree import Tree
from fork.upstream import repository


def home(project: Project) -> Path:
    """Returns the folder that has the tests of a series, and what they need.

    That is the repository. Of a series whose patches hold their tests it is a checkout
    of all that they make, as upstream's repository would have it, in .cache/.
    """
    if not project.complete():
        return project.root
    with project.lock():
        folder = project.cache / "complete" / project.series
        stamp = folder / "fork.stamp"
        want = f"{project.series_digest()} {sysconfig.get_config_var('SOABI')}"
        if not stamp.is_file() or stamp.read_text("utf-8") != want:
            say(f"Writing {project.show(folder)} ...")
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with repository(project, sources=False) as git:
                series.am(git, project.patches())
                shutil.rmtree(git.folder / ".git")
                shutil.move(git.folder, folder)
            base.write_version(project.version, folder / "python" / "sglang")
            stamp.write_text(want, "utf-8")
        return folder


def test(project: Project, files: list[str]) -> None:
    """Runs these tests, or every test of the series; ends with pytest's status.

    Of a living series each file of test/srt/ is run alone, as upstream runs it: what one
    imports for Triton's interpreter, or publishes, is not another's. The other tests run
    beside them, two at a time.
    """
    if not project.complete():
        Tree(project).checkout()
    folder = home(project)
    env = {**os.environ, "PYTHONPATH": str(folder / "python")}
    os.chdir(folder)
    pytest = [sys.executable, "-m", "pytest"]
    alone = sorted(Path("test/srt").rglob("test_*.py"))
    if files or project.complete() or not alone:
        os.execve(sys.executable, [*pytest, *(files or ["test"])], env)

    # The longest first, so that the two end at about the same time.
    parts = [["test", "--ignore=test/srt"], *([str(file)] for file in alone)]
    command = [sys.executable, "-m", "fork.alone", json.dumps(parts)]
    os.execve(sys.executable, command, env)
