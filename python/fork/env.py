"""Makes the one environment that every make target uses: `.venv` with the fork in it.

Runs on the system's Python before anything is installed, so it needs the standard
library alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
MARK = VENV / "fork.python"  # the Python of an environment that is ours, and whole
STAMP = VENV / "fork.stamp"  # what was installed into it to the end
PYPROJECT = ROOT / "python" / "pyproject.toml"
PYTHONS = ((3, 10), (3, 13))  # the oldest and the newest CPython with a base wheel
INSTALLED_GB = 11


def fail(message: str) -> None:
    sys.exit(f"make: {message}")


def wanted() -> str:
    """What the installed environment depends on, as one hash."""
    digest = hashlib.sha256(sys.version.encode())
    for path in [PYPROJECT, *sorted((ROOT / "patches").glob("*/base.txt"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_host() -> None:
    oldest, newest = (".".join(map(str, v)) for v in PYTHONS)
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        fail(
            f"{sys.executable} is Python {sys.version.split()[0]}, but the base has "
            f"wheels for {oldest} to {newest}; run `make PYTHON=python{newest} …`."
        )
    if sys.platform != "linux":
        fail(f"the base has wheels for Linux only, and this is {sys.platform}.")
    if not shutil.which("git"):
        fail("git is not installed; it applies the patches. Install it and run again.")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        fail(
            f"{sys.executable} cannot make an environment with pip; install its venv "
            f"package (on Debian: python3-venv) and run again."
        )


def check_space() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    have = (
        sum(f.stat().st_size for f in VENV.rglob("*") if f.is_file()) / 1e9
        if VENV.exists()
        else 0
    )
    if free + have < INSTALLED_GB:
        fail(
            f"the environment needs about {INSTALLED_GB} GB and {ROOT} has "
            f"{free:.1f} GB free; make room and run again."
        )


def make_venv() -> None:
    """Makes .venv for this Python, anew if what is there is another's or was cut off."""
    if MARK.exists() and MARK.read_text() == sys.version:
        return
    ours = MARK.parent / "fork.partial"
    if VENV.exists() and not (MARK.exists() or ours.exists()):
        fail(f"{VENV} is none that make made; move it away and run again.")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    ours.touch()
    venv.create(VENV, with_pip=True, symlinks=True)
    MARK.write_text(sys.version)
    ours.unlink()


def main() -> None:
    check_host()
    want = wanted()
    if STAMP.exists() and STAMP.read_text() == want:
        return

    check_space()
    print("Installing the fork and its dependencies into .venv (about 10 GB, once).")
    STAMP.unlink(missing_ok=True)
    make_venv()
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    for command in (
        # Dependency groups need pip 25.1.
        [*pip, "--quiet", "--upgrade", "pip>=25.1"],
        [*pip, "--editable", str(ROOT / "python"), "--group", f"{PYPROJECT}:dev"],
    ):
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}).returncode:
            fail(
                "the installation into .venv did not finish (pip says why above); "
                "run the same command again, it goes on where it stopped."
            )
    STAMP.write_text(want)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; run the same command again, it goes on where it stopped.")
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{VENV} could not be made: {error}; mend that and run again.")
