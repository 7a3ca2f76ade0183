"""The arms of a comparison: what runs, and in which environment. An arm is written

    fork                    the `sglang` that this interpreter imports
    base                    the pinned release, unpatched
    base+NAME               the release with the series up to the patch of this name
    NAME=FLAGS              the fork with more flags for its server
    NAME@WHERE[=FLAGS]      another environment: a Python interpreter, or the folders
                            that PYTHONPATH is to hold, with ":" between them

and an arm whose name begins with `vllm` is served by vLLM.

The release is that of the series which this interpreter's environment is for. Without a
GPU driver it does not import, so on a CPU `base` is `base+cpu-no-driver`: it serves, its
answers are still wrong there, and it is for trying the programs, not for a measurement.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from gemma4.engines.host import CACHE, has_gpu, inherited_path, offline
from gemma4.errors import UserError

PLUGIN = Path(__file__).parent / "plugin"
# The patch without which, and those before it, the release does not serve on a CPU.
CPU_BLOCKERS = "cpu-no-driver"
# What keeps a measurement from another's settings.
FOREIGN = ("SGLANG_PLUGINS", "SGLANG_SIMULATE_ACC_LEN", "SGLANG_TORCH_PROFILER_DIR")


@dataclasses.dataclass
class Arm:
    """One of the things compared.

    Attributes:
        python: The interpreter that serves it.
        path: The folders of its PYTHONPATH; None leaves this process's.
        flags: More flags of its server.
        file: Its engine's `__init__.py`, filled in by `probe`, as are the rest.
        code: Digest of all Python files of the engine.
    """

    name: str
    python: str = sys.executable
    path: Optional[List[str]] = None
    flags: List[str] = dataclasses.field(default_factory=list)
    file: str = ""
    version: str = ""
    code: str = ""

    @property
    def engine(self) -> str:
        return "vllm" if self.name.startswith("vllm") else "sglang"

    def environment(self) -> Dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in FOREIGN}
        path = self.path
        if path is None:
            path = [] if self.python != sys.executable else inherited_path()
        env.update(
            PYTHONPATH=os.pathsep.join([str(PLUGIN), *path]),
            PYTHONUNBUFFERED="1",
            **offline(),
            # Commands beside the interpreter, such as ninja, are this environment's.
            PATH=os.pathsep.join(
                [os.path.dirname(self.python), os.environ.get("PATH", "")]
            ),
        )
        if not has_gpu():
            # Operations of a tiny model take less time than threads take to meet.
            env.setdefault("OMP_NUM_THREADS", "1")
        if self.engine == "vllm":
            env.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
        return env

    def describe(self) -> Dict[str, object]:
        """What a result file says of it."""
        return {
            "engine": self.engine,
            "version": self.version,
            "code_sha256": self.code,
            "flags": shlex.join(self.flags),
        }

    def probe(self) -> None:
        """Finds the engine's file, version and digest, without importing it.

        Raises:
            UserError: The environment has no such engine.
        """
        program = (
            "import importlib.util as u, sys; s = u.find_spec(sys.argv[1]); "
            "print(s and s.origin or '')"
        )
        with tempfile.TemporaryDirectory() as empty:
            try:
                done = subprocess.run(
                    [self.python, "-c", program, self.engine],
                    **dict(env=self.environment(), cwd=empty),
                    **dict(capture_output=True, text=True),
                )
            except OSError as e:
                raise UserError(
                    f"The arm {self.name} cannot run {self.python}: {e.strerror}."
                ) from None
        self.file = done.stdout.strip()
        if done.returncode or not self.file:
            where = os.pathsep.join(self.path or []) or self.python
            raise UserError(
                f"The arm {self.name} has no {self.engine} in {where}: install it "
                "there, or name another interpreter or folder."
            )
        package = Path(self.file).parent
        digest = hashlib.sha256()
        for file in sorted(package.rglob("*.py")):
            if file.name != "_version.py":
                digest.update(str(file.relative_to(package)).encode() + b"\0")
                digest.update(file.read_bytes())
        self.code = digest.hexdigest()[:16]
        version = package / "_version.py"
        found = version.exists() and re.search(
            r"__version__\s*(?:=\s*version\s*)?=\s*['\"](.+?)['\"]", version.read_text()
        )
        self.version = found[1] if found else ""


def parse_arm(text: str) -> Arm:
    """An arm from what was typed, see the head of this file.

    Raises:
        UserError: It is none.
    """
    head, _, flags = text.partition("=")
    name, at, where = head.partition("@")
    if not re.fullmatch(r"[A-Za-z][\w.+ -]*", name):
        raise UserError(f"{text!r} is no arm: write NAME=FLAGS or NAME@WHERE=FLAGS.")
    arm = Arm(name, flags=shlex.split(flags))
    if at:
        places = [os.path.abspath(os.path.expanduser(p)) for p in where.split(":")]
        for place in places:
            if not os.path.exists(place):
                raise UserError(f"The arm {name} is to run in {place}: no such place.")
        if len(places) == 1 and os.path.isfile(places[0]):
            arm.python = places[0]
        else:
            arm.path = places
        return arm
    found = re.fullmatch(r"base(?:\+([\w.-]+))?", name)
    if found and not flags:
        upto = found[1] or ("" if has_gpu() else CPU_BLOCKERS)
        arm.name = f"base+{upto}" if upto else "base"
        arm.path = [str(release(upto))]
    elif name.startswith("vllm") and not importlib.util.find_spec("vllm"):
        raise UserError(
            f"The arm {name} needs vLLM, which is not installed beside the fork: name "
            f"its environment, `--arm {name}@PYTHON`."
        )
    return arm


def chosen_arms(args: argparse.Namespace) -> List[Arm]:
    """The arms of --arms and of each --arm, or those that a command has by default.
    Each is probed.

    Raises:
        UserError: One is no arm, its environment has no such engine, or two have one
            name.
    """
    given = [*args.arms, *args.arm] or args.default_arms
    arms = [parse_arm(text) for text in given]
    for arm in arms:
        arm.probe()
        where = f", PYTHONPATH {':'.join(arm.path)}" if arm.path else ""
        print(f"{arm.name}: {arm.engine} in {Path(arm.file).parent}{where}")
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError("Two arms have one name.")
    return arms


def described(arms: List[Arm]) -> Dict[str, dict]:
    """What a result file says of them."""
    return {arm.name: arm.describe() for arm in arms}


def release(upto: str = "") -> Path:
    """The folder of the pinned release with the patches up to this name; kept."""
    try:
        from fork import base, series
        from fork.errors import ForkError
    except ModuleNotFoundError:
        raise UserError(
            f"{sys.executable} does not import the package `fork`, which knows the "
            "release: run it by the environment of `make`, or name the release's "
            "folder, --arm base@FOLDER."
        ) from None

    try:
        project, patches = base.installed(), []
        if upto:
            names = project.patch_names()
            if upto not in names:
                raise UserError(
                    f"The series {project.series} has no patch {upto}: see "
                    f"{project.show(project.settings)}."
                )
            patches = project.patches()[: names.index(upto) + 1]
        digest = hashlib.sha256(project.base.read_bytes())
        for patch in patches:
            digest.update(patch.read_bytes())
        folder = CACHE / "arms" / f"base-{upto or 'none'}-{digest.hexdigest()[:12]}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with base.unpacked(project) as content:
            if patches:
                series.patch_package(project, patches, content / "sglang")
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
            shutil.copytree(content, partial, dirs_exist_ok=True)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    except ForkError as e:
        raise UserError(str(e)) from None
    return folder
