"""A release: what it holds, and the proof that its wheel serves."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from email.policy import default as MAIL
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from fork import base
from fork.build import _anonymous, build_sdist
from fork.ci.publish import FOLDER, NOTES, SUMS, sha256
from fork.complete import home
from fork.errors import ForkError
from fork.process import last_line, run, say
from fork.project import Project
from fork.upstream import write_upstream

WHEELS = "dist/wheels"


def tag(project: Project) -> str:
    """The tag of the release that series.toml describes, such as ``gemma4.1``."""
    return project.version.local or ""


def wheels(project: Project) -> list[Path]:
    """The wheels of the present version in dist/wheels/."""
    made = []
    for path in sorted((project.root / WHEELS).glob("*.whl")):
        try:
            name, version, *_ = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if (name, version) == ("sglang", project.version):
            made.append(path)
    return made


def write_release(project: Project, tagged: str = "") -> list[Path]:
    """Writes dist/release/ anew, whole or not at all, and returns its files.

    It holds the wheels of dist/wheels/, the sdist, the patches for upstream as one
    archive, notes and checksums. The same commit gives the same bytes. To a workflow it
    says the sha256 of the checksums, as the step's output ``digest``.

    Args:
        tagged: The tag that is being released, if there is one.

    Raises:
        ForkError: The tag is not the version's, or there is no wheel.
    """
    if tagged and tagged != tag(project):
        raise ForkError(
            f"The tag {tagged} is not that of version {project.version}, which is "
            f"{tag(project)}: tag the commit whose {project.show(project.settings)} "
            f"says +{tagged}."
        )
    found = wheels(project)
    if not found:
        raise ForkError(
            f"{WHEELS} has no wheel of version {project.version}: run `make wheel` "
            "first, once for each Python."
        )
    patches = write_upstream(project)
    folder = project.root / FOLDER
    with tempfile.TemporaryDirectory(prefix=".release-", dir=folder.parent) as made:
        fresh = Path(made) / "release"
        fresh.mkdir()
        for wheel in found:
            shutil.copyfile(wheel, fresh / wheel.name)
        build_sdist(fresh, {"series": project.series})
        _pack_patches(project, patches, fresh)
        (fresh / NOTES).write_text(release_notes(project), "utf-8")
        files = sorted(fresh.iterdir())
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in files)
        (fresh / SUMS).write_text(sums, "utf-8")
        digest = sha256(fresh / SUMS)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    if "GITHUB_OUTPUT" in os.environ:
        with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as output:
            output.write(f"digest={digest}\n")
    return sorted(folder.iterdir())


def _pack_patches(project: Project, patches: list[Path], folder: Path) -> None:
    name = f"sglang-{project.series}-{tag(project)}-patches"
    # Uncompressed: gzip writes other bytes with another zlib.
    with tarfile.open(folder / f"{name}.tar", "w") as archive:
        for patch in patches:
            archive.add(patch, f"{name}/{patch.name}", filter=_anonymous)


def messages(project: Project) -> list[tuple[str, str]]:
    """Returns subject and text of each patch's commit message."""
    told = []
    for patch in project.patches():
        mail = email.message_from_bytes(patch.read_bytes(), policy=MAIL)
        subject = re.sub(r"^\[PATCH\] ", "", mail["Subject"])
        text = mail.get_content() if not mail.is_multipart() else ""
        text = re.split(r"^(?:---|diff --git .*)$", text, maxsplit=1, flags=re.M)[0]
        told.append((subject, text.strip()))
    return told


def release_notes(project: Project) -> str:
    """The notes: how to install the release, then each commit message."""
    pythons = sorted({w.name.split("-")[2] for w in wheels(project)}, key=len)
    parts = [
        f"`{base.requirement(project)}` with {len(project.patches())} patches, for "
        "Gemma-4 MoE.\n",
        f"Wheels for {', '.join(pythons)}: `pip install` the one of your Python, it "
        f"replaces an installed SGLang. `sha256sum --check --ignore-missing {SUMS}` "
        "checks the files, `gh attestation verify FILE --repo THIS_REPOSITORY` says "
        "which commit and workflow built one. The archive of patches is for `git am` "
        f"in SGLang at {project.series}.\n",
        "## The series\n",
    ]
    for subject, text in messages(project):
        parts += [f"### {subject}\n", f"{text}\n"]
    return "\n".join(parts)


def smoke(project: Project, port: int, dependencies: Path | None = None) -> None:
    """Installs this Python's wheel of dist/wheels/ where nothing else is, and has it
    answer one question with the tiny model.

    Args:
        dependencies: A folder that has what the wheel requires, for where that is
            not to be installed once more.

    Raises:
        ForkError: There is no such wheel, it cannot be installed, or it does not
            answer.
    """
    tags = set(sys_tags())
    fitting = [w for w in wheels(project) if tags & parse_wheel_filename(w.name)[3]]
    if not fitting:
        raise ForkError(
            f"{WHEELS} has no wheel of {project.version} for {sys.executable}: run "
            "`make wheel` with it first."
        )
    environment = project.cache / "smoke"
    shutil.rmtree(environment, ignore_errors=True)
    try:
        python = _environment(environment, dependencies)
        install = [sys.executable, "-m", "pip", "--python", python, "install"]
        install += ["--disable-pip-version-check", "--quiet", "--no-cache-dir"]
        install += ["--no-deps"] if dependencies else ["tomli; python_version<'3.11'"]
        say(f"Installing {fitting[0].name} into a clean environment ...")
        done = run([*install, fitting[0]], cwd=environment)
        if done.returncode:
            raise ForkError(
                f"{fitting[0].name} cannot be installed: {last_line(done)}."
            )
        home(project)  # the environment has not what writes it
        # Of the repository, the commands alone: python/ may hold a checked-out sglang.
        commands = environment / "commands"
        commands.mkdir()
        (commands / "fork").symlink_to(Path(__file__).parent)
        (commands / "gemma4").symlink_to(project.root / "benchmark" / "gemma4")
        env = {**os.environ, "PYTHONPATH": str(commands)}
        code = "from importlib.util import find_spec as s; print(s('sglang').origin)"
        found = run([python, "-c", code], cwd=environment, env=env).stdout.strip()
        if not Path(found).is_relative_to(environment):
            raise ForkError(
                f"The environment imports sglang from {found or 'nowhere'}, not from "
                f"{fitting[0].name}."
            )
        demo = [python, "-m", "gemma4", "demo", "--port", str(port)]
        if subprocess.run(demo, cwd=environment, env=env).returncode:
            raise ForkError(f"{fitting[0].name} does not serve; it says why above.")
        say(f"{fitting[0].name} serves, installed alone.")
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def _environment(environment: Path, dependencies: Path | None) -> Path:
    """Makes an empty environment, that sees those dependencies; returns its Python."""
    venv.create(environment, with_pip=False, symlinks=True)
    if dependencies:
        (site,) = environment.glob("lib/python3*/site-packages")
        (site / "dependencies.pth").write_text(f"{dependencies.resolve()}\n", "utf-8")
    return environment / "bin" / "python"
