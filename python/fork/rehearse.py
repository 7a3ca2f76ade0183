"""The patches of dist/upstream/ on upstream's own repository, at the release's tag."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fork import series
from fork.errors import ForkError, PatchError
from fork.process import Git, GitError, say
from fork.project import Project
from fork.series import BASE
from fork.upstream import repository, write_upstream


def rehearse(project: Project, source: str) -> None:
    """Applies the patches as a maintainer would, and compares what they touch there
    with the fork's.

    Args:
        source: Upstream's repository: an address or a folder.

    Raises:
        ForkError: It has no such tag, a patch does not apply, or a file differs.
    """
    patches = write_upstream(project)
    with tempfile.TemporaryDirectory() as folder:
        try:
            Git(Path(folder))(
                *["clone", "--quiet", "--depth=1", "--branch", project.series],
                *["--", source, "upstream"],
            )
        except GitError as error:
            raise ForkError(
                f"{source} could not be cloned at {project.series}: {error}"
            ) from None
        git = Git(Path(folder) / "upstream")
        try:
            series.am(git, patches)
        except PatchError as error:
            raise ForkError(
                f"{error}, in {source} at {project.series}: see how that differs from "
                "the wheel of the release."
            ) from None
        with repository(project) as fork:
            series.am(fork, project.patches())
            touched = fork.names("diff", "--name-only", "--no-renames", "-z", BASE)
            for path in touched:
                if fork.run("rev-parse", f"HEAD:{path}").stdout != (
                    git.run("rev-parse", f"HEAD:{path}").stdout
                ):
                    raise ForkError(
                        f"{path} is another in {source} at {project.series} than in "
                        "the wheel of that release: see which the patch was made for."
                    )
        say(
            f"The {len(patches)} patches of dist/upstream apply to {project.series} of "
            f"{source}, and the {len(touched)} files that they change are the fork's."
        )
