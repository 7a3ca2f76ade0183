"""The release of a tag on GitHub, with the files that another job made."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from fork.ci.github import GitHub
from fork.errors import ForkError

FOLDER = "dist/release"
SUMS = "SHA256SUMS"
NOTES = "NOTES.md"
LINE = re.compile(r"([0-9a-f]{64})  (\w[\w.+-]*)\n")
ROBOT = "github-actions[bot]"  # who makes what a workflow's token makes


def check(folder: Path, tag: str, digest: str) -> tuple[str, list[Path]]:
    """Returns the version that a release is of, and its files.

    Args:
        tag: The tag that is released.
        digest: The sha256 of its checksums, from the job that wrote them.

    Raises:
        ForkError: It is not what that job wrote, or not of this tag.
    """
    sums = folder / SUMS
    if not sums.is_file():
        raise ForkError(f"There is no {FOLDER}/{SUMS}: run `make release` first.")
    if sha256(sums) != digest:
        raise ForkError(
            f"{FOLDER}/{SUMS} is not the one whose sha256 is {digest or 'missing'}: "
            "something changed the release after it was written. Run it all again."
        )
    text = sums.read_text("utf-8")
    listed = {name: digest for digest, name in LINE.findall(text)}
    there = {path.name for path in folder.iterdir()} - {SUMS}
    if there != {*listed} or len(listed) != text.count("\n"):
        raise ForkError(
            f"{FOLDER} has {', '.join(sorted(there)) or 'nothing'}, and {SUMS} names "
            f"{', '.join(sorted(listed)) or 'nothing'}: run `make release`."
        )
    for name in listed:
        if sha256(folder / name) != listed[name]:
            raise ForkError(
                f"{FOLDER}/{name} is not the file of {SUMS}: run `make release`."
            )
    versions = re.findall(r"^sglang-(\S+)\.tar\.gz$", "\n".join(listed), re.MULTILINE)
    if NOTES not in listed or len(versions) != 1 or not versions[0].endswith(f"+{tag}"):
        raise ForkError(
            f"{FOLDER} is of {' and '.join(versions) or 'no version'}, not of the tag "
            f"{tag}: run `make release TAG={tag}`."
        )
    return versions[0], [*(folder / name for name in listed), sums]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def publish(folder: Path, tag: str, digest: str, github: GitHub) -> str:
    """Makes the release of a tag. Returns its address.

    It is a draft until every file is there; what an interrupted run left of it is
    made anew.

    Raises:
        ForkError: There is no such tag, or there is the release already, or what
            `check` says.
    """
    version, files = check(folder, tag, digest)
    github("GET", f"git/ref/tags/{tag}")
    for old in list(github.pages("releases")):
        if old["tag_name"] != tag:
            continue
        if not old["draft"] or (old["author"] or {}).get("login") != ROBOT:
            raise ForkError(
                f"There is a release {tag} already, or somebody's draft of it: delete "
                "that, or raise N of +gemma4.N in series.toml."
            )
        github("DELETE", f"releases/{old['id']}")
    release = github(
        "POST",
        "releases",
        {
            "tag_name": tag,
            "name": version,
            "body": (folder / NOTES).read_text("utf-8"),
            "draft": True,
        },
    )
    for path in files:
        print(f"Uploading {path.name} ...", flush=True)
        github.upload(release["upload_url"], path)
    done = github("PATCH", f"releases/{release['id']}", {"draft": False})
    return done["html_url"]


def main() -> str | int:
    """``python -m fork.ci.publish`` publishes dist/release/ as the release of $TAG;
    with ``check`` it looks at the files alone, and needs no token."""
    folder = Path(__file__).parents[3] / FOLDER
    tag, digest = (os.environ.get(name, "") for name in ("TAG", "DIGEST"))
    try:
        if sys.argv[1:] == ["check"]:
            check(folder, tag, digest)
        else:
            print(publish(folder, tag, digest, GitHub.of_workflow()))
    except ForkError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
