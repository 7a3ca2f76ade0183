"""Makes the environment of one series, that its make targets use: `.venvs/<series>`
with the fork in it. With `tools` for a series, makes the small one of the commands
that need git and a Python alone, and not the engine: `.cache/tools`.

Runs on the system's Python before anything is installed, so it needs the standard
library alone.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED_GB = 11


def fail(message: str) -> None:
    sys.exit(f"make: {message}")


class Environment:
    """A virtual environment that is made anew when what it depends on has changed.

    Attributes:
        folder: Where it is.
        mark: The Python of an environment that is ours, and whole.
        stamp: What was installed into it to the end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.mark = folder / "fork.python"
        self.stamp = folder / "fork.stamp"
        self.pyproject = ROOT / "python" / "pyproject.toml"
        self.lock = ROOT / "python" / "tools.txt"

    @property
    def name(self) -> str:
        return str(self.folder.relative_to(ROOT))

    def settings(self) -> str:
        """What of the repository's files an installation depends on."""
        return self.lock.read_text("utf-8")

    def wanted(self) -> str:
        """What the installed environment depends on, as one hash."""
        return hashlib.sha256((sys.version + self.settings()).encode()).hexdigest()

    def check(self) -> None:
        """Ends the program if it cannot be made here."""
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            fail(
                f"{sys.executable} cannot make an environment with pip; install its "
                f"venv package (on Debian: python3-venv) and run again."
            )

    def installs(self) -> list:
        """What pip is to install, one call after the other."""
        hashed = ["--require-hashes", "--only-binary", ":all:"]
        return [["--quiet", *hashed, "--requirement", str(self.lock)]]

    def make(self) -> None:
        """Installs it, unless that was done to the end and nothing changed since."""
        want = self.wanted()
        if self.stamp.exists() and self.stamp.read_text() == want:
            return
        self.check()
        self.stamp.unlink(missing_ok=True)
        self.make_venv()
        python = str(self.folder / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
        for what in self.installs():
            command = [*pip, *what]
            if subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}).returncode:
                fail(
                    f"the installation into {self.name} did not finish (pip says why "
                    "above); run the same command again, it goes on where it stopped."
                )
        self.stamp.write_text(want)

    def make_venv(self) -> None:
        """Makes it for this Python, anew if it is another's or was cut off."""
        if self.mark.exists() and self.mark.read_text() == sys.version:
            return
        ours = self.folder / "fork.partial"
        if self.folder.exists() and not (self.mark.exists() or ours.exists()):
            fail(f"{self.folder} is none that make made; move it away and run again.")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        ours.touch()
        venv.create(self.folder, with_pip=True, symlinks=True)
        self.mark.write_text(sys.version)
        ours.unlink()


class Engine(Environment):
    """The environment of a series: the fork, what it requires, and what tests it."""

    def __init__(self, series: str):
        super().__init__(ROOT / ".venvs" / series)
        self.series = series
        self.patches = ROOT / "patches" / series
        if not (self.patches / "base.txt").is_file():
            names = sorted(
                p.parent.name for p in self.patches.parent.glob("*/base.txt")
            )
            fail(
                f"there is no {self.patches / 'base.txt'}; SERIES= is one of "
                f"{', '.join(names)}."
            )

    def settings(self) -> str:
        """Of the series: its base, its version and its pins, but not its patches."""
        base = (self.patches / "base.txt").read_text("utf-8")
        series = (self.patches / "series.toml").read_text("utf-8")
        tools = without(self.pyproject.read_text("utf-8"), "[tool.fork]")
        return tools + base + without(series, "[[patch]]")

    def pythons(self) -> list:
        """The CPythons that the base has a wheel for, such as (3, 12)."""
        base = (self.patches / "base.txt").read_text("utf-8")
        found = re.findall(r"-cp(\d)(\d+)-cp\S+\.whl$", base, re.MULTILINE)
        return sorted({(int(major), int(minor)) for major, minor in found})

    def check(self) -> None:
        pythons = self.pythons()
        if sys.version_info[:2] not in pythons:
            told = [".".join(map(str, version)) for version in pythons]
            fail(
                f"{sys.executable} is Python {sys.version.split()[0]}, but the base has "
                f"wheels for {', '.join(told)}; run `make PYTHON=python{told[-1]} …`."
            )
        if sys.platform != "linux":
            fail(f"the base has wheels for Linux only, and this is {sys.platform}.")
        if not shutil.which("git"):
            fail("git is not installed; it applies the patches: install it, run again.")
        super().check()
        free = shutil.disk_usage(ROOT).free / 1e9
        files = (file for file in self.folder.rglob("*") if file.is_file())
        have = sum(file.stat().st_size for file in files) / 1e9
        if free + have < INSTALLED_GB:
            fail(
                f"the environment needs about {INSTALLED_GB} GB and {ROOT} has "
                f"{free:.1f} GB free; make room and run again."
            )
        print(f"Installing the fork into {self.name} (about 10 GB, once).", flush=True)

    def installs(self) -> list:
        fork = ["--editable", str(ROOT / "python")]
        settings = ["--config-settings", f"series={self.series}"]
        return [
            # Dependency groups need pip 25.1.
            ["--quiet", "--upgrade", "pip>=25.1"],
            [*fork, *settings, "--group", f"{self.pyproject}:dev"],
        ]


def without(settings: str, table: str) -> str:
    """TOML without the tables of this name."""
    pattern = rf"^{re.escape(table)}.*\n(?:(?!\[).*\n)*"
    return re.sub(pattern, "", settings + "\n", flags=re.MULTILINE)


def main() -> None:
    (name,) = sys.argv[1:]
    (Environment(ROOT / ".cache" / "tools") if name == "tools" else Engine(name)).make()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; run the same command again, it goes on where it stopped.")
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"the environment could not be made: {error}; mend that and run again.")
