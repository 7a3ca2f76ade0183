"""A small upstream and a fork of it, for tests that run the fork's real commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

# What a user may have set, and no result may depend on.
GITCONFIG = """
[user]
    name = Someone
    email = someone@example.com
[core]
    autocrlf = true
    quotePath = false
    abbrev = 5
[diff]
    noprefix = true
    mnemonicPrefix = true
    algorithm = patience
    renames = copies
    context = 7
[format]
    attach = true
    signature = signed
    numbered = true
    subjectPrefix = RFC
    thread = true
    headers = "X-Ours: yes\\n"
[am]
    threeWay = true
[commit]
    gpgSign = false
[apply]
    whitespace = fix
"""

FILES = {
    "sglang/__init__.py": b"from sglang.srt.model import layers\n",
    "sglang/_version.py": b"__version__ = '1.0'\n",
    "sglang/srt/__init__.py": b"",
    "sglang/srt/model.py": b"".join(b"line_%d = %d\n" % (i, i) for i in range(30))
    + b"layers = 2\n",
    "sglang/srt/gpu.py": b"import no_such_gpu\n",
    "sglang/srt/crlf.py": b"a = 1\r\nb = 2\r\n",
    "sglang/srt/mixed.txt": b"a\r\nb\nc\r\n",
    "sglang/srt/no_newline.py": b"x = 1",
    "sglang/srt/script.sh": b"#!/bin/sh\necho hello\n",
    "sglang/srt/E=8,N=4 [fp8] café.json": b"{}\n",
    "sglang/srt/.hidden/.gitignore": b"*.tmp\n",
    "sglang/srt/.hidden/kept.tmp": b"kept\n",
    "sglang/srt/data.bin": bytes(range(256)) * 4,
    "sglang/srt/_core.cpython-3-linux.so": b"\x7fELF compiled",
    "tools/beside.py": b"",
    "sglang-1.0.dist-info/METADATA": b"""Metadata-Version: 2.4
Name: sglang
Version: 1.0
Summary: caf\xc3\xa9
License: A license
          of two lines
Provides-Extra: more
Requires-Dist: kernels
Requires-Dist: numpy>=1; python_version >= "3.8"
Requires-Dist: kernels[cli]; extra == "more"

The description: \xe2\x9c\x93
""",
    "sglang-1.0.dist-info/WHEEL": b"""Wheel-Version: 1.0
Generator: test
Root-Is-Purelib: false
Tag: py3-none-any
""",
    "sglang-1.0.dist-info/entry_points.txt": b"[console_scripts]\n"
    b"sglang = sglang.srt.model:main\n",
}
PYPROJECT = """
[build-system]
requires = ["packaging", "pip", "wheel"]
build-backend = "fork.build"
backend-path = ["."]

[project]
name = "sglang"
dynamic = ["version"]

[tool.fork]
series = "v1.0"
"""
SERIES = """version = "1.0+test.2"

[pins.Kernels]
specifier = ">=1,<2"
reason = "a test"
"""
ENTRY = """
[[patch]]
name = "{}"
topic = "test"
upstream = "none"
tests = ["{}"]
result = "none"
"""


def run(*command, cwd, env, check=True, input=None):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        input=input,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if check:
        assert not done.returncode, done.stdout + done.stderr
    return done


class Repository:
    """A fork of the small upstream, in a folder with spaces, used as a user does."""

    def __init__(self, root: Path, env: dict):
        self.root, self.env = root, env
        self.python, self.tree = root / "python", root / "python" / "sglang"
        self.patches = root / "patches" / "v1.0"

    def fork(self, *args, check=True, **env):
        """Runs ``python -m fork``; returns what it said."""
        command = [sys.executable, "-m", "fork", *args]
        env = {**self.env, **env}
        done = run(*command, cwd=self.python, env=env, check=check)
        return done.stdout + done.stderr

    def refusal(self, *args, **env) -> str:
        """Runs a command that has to fail; returns its one line."""
        command = [sys.executable, "-m", "fork", *args]
        env = {**self.env, **env}
        done = run(*command, cwd=self.python, env=env, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        *_, last = done.stderr.splitlines()
        assert last.startswith("error: ") and last.endswith((".", ".)")), done.stderr
        assert "Traceback" not in done.stderr
        return last

    def git(self, *args, cwd=None, check=True, input=None) -> str:
        """The user's own git, in the tree."""
        cwd = cwd or self.tree
        return run("git", *args, cwd=cwd, env=self.env, check=check, input=input).stdout

    def write(self, name: str, text: str) -> None:
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commit(self, name: str, text: str, message: str) -> None:
        self.write(name, text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def describe(self, **tests) -> None:
        """Has series.toml name these patches, with these tests."""
        names = [(name.replace("_", "-"), test) for name, test in tests.items()]
        entries = "".join(ENTRY.format(*entry) for entry in names)
        (self.patches / "series.toml").write_text(SERIES + entries)
        for test in '", "'.join(tests.values()).split('", "') if tests else ():
            path = self.root / test
            path.parent.mkdir(parents=True, exist_ok=True)
            path.exists() or path.write_text("def test(): pass\n")

    def contents(self, folder: Path) -> dict:
        """Name to bytes and mode of each file that is not git's."""
        return {
            str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and ".git" not in path.relative_to(folder).parts
            and "__pycache__" not in path.parts
        }

    def copy(self, root: Path) -> "Repository":
        shutil.copytree(self.root, root, symlinks=True)
        return Repository(root, self.env)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the wheel of the small upstream."""
    folder = tmp_path_factory.mktemp("wheels")
    content = folder / "content"
    for name, data in FILES.items():
        path = content / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (content / "sglang/srt/script.sh").chmod(0o755)
    pack = [sys.executable, "-m", "wheel", "pack", "--dest-dir", folder, content]
    run(*pack, cwd=folder, env=os.environ)
    shutil.rmtree(content)
    return folder


@pytest.fixture(scope="session")
def env(wheels, tmp_path_factory) -> dict:
    """An environment with a user's settings, and pip that knows one folder."""
    home = tmp_path_factory.mktemp("home")
    (home / ".gitconfig").write_text(GITCONFIG)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GIT_", "PIP_", "PYTHON"))
    }
    return {
        **kept,
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }


@pytest.fixture(scope="session")
def bare(wheels, env, tmp_path_factory) -> Repository:
    """The fork before its first checkout; not to be changed."""
    import hashlib

    root = tmp_path_factory.mktemp("fork") / "a fork é"
    (root / "patches" / "v1.0").mkdir(parents=True)
    (wheel,) = wheels.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    base = f"# The release.\n#   {wheel.name}\nsglang==1.0 \\\n    --hash=sha256:{digest}\n"
    (root / "patches" / "v1.0" / "base.txt").write_text(base)
    (root / "patches" / "v1.0" / "series.toml").write_text(SERIES)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "python" / "fork", root / "python" / "fork", ignore=ignore)
    (root / "python" / "pyproject.toml").write_text(PYPROJECT)
    (root / ".gitignore").write_text("/.cache/\n/python/sglang/\n")
    return Repository(root, env)


@pytest.fixture(scope="session")
def checked_out(bare, tmp_path_factory) -> Repository:
    """The fork with a checkout of its empty series; not to be changed."""
    repository = bare.copy(tmp_path_factory.mktemp("checked out") / "a fork é")
    repository.fork("checkout")
    return repository


@pytest.fixture
def repository(checked_out, tmp_path) -> Repository:
    """A fork with a checkout, of the test's own."""
    return checked_out.copy(tmp_path / "a fork é")


@pytest.fixture
def fresh(bare, tmp_path) -> Repository:
    """A fork without a checkout, of the test's own."""
    return bare.copy(tmp_path / "a fork é")
