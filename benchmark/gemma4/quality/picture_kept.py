"""What servers answered about pictures, asked once and kept in files beside their logs.

A file is named SHAPE-ARM.server.json and holds what was asked, and of which code; the
answers; why there are none of some kinds of prompts; and the machine.
"""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Dict, List, Tuple

from gemma4.checkpoint import SHAPES
from gemma4.engines.arms import Arm
from gemma4.engines.servers import ArmServer, Setup
from gemma4.errors import UserError
from gemma4.quality.picture_answers import Answer, ask
from gemma4.quality.picture_cases import cases
from gemma4.report.machine import hardware

LOG, KEPT = ".server.log", ".server.json"


def collect(
    arm: Arm, setup: Setup, log: Path, timeout: float, bar
) -> Tuple[dict, dict]:
    """(kind -> answers, kind -> why there are none), of a server started anew where it
    died."""
    answers, silent, left = {}, {}, cases()
    while left:
        server, kind = ArmServer(arm, setup, log), ""
        try:
            with server.running(timeout):
                while left:
                    kind = next(iter(left))
                    asks = left.pop(kind)
                    server.ask("/flush_cache", {})
                    answers[kind] = [a for asked in asks for a in ask(server, asked)]
                    bar.update()
        except UserError as e:
            why = str(e).replace(str(log), log.name)
            if kind:
                silent[kind] = why
            elif arm.path is None:
                raise
            else:  # it does not start
                silent.update(dict.fromkeys(left, why))
                left = {}
            bar.update()
    return answers, silent


def _asked() -> Dict[str, list]:
    """What is asked, as JSON has it."""
    asked = {kind: [vars(a) for a in asks] for kind, asks in cases().items()}
    return json.loads(json.dumps(asked))


def _answers(plain: Dict[str, List[dict]]) -> Dict[str, List[Answer]]:
    return {kind: [Answer(**a) for a in of] for kind, of in plain.items()}


def kept(arm: Arm, setup: Setup, log: Path, timeout: float, bar) -> Tuple[dict, dict]:
    """What `collect` says, asked once: of the same code, command and prompts it is
    read from a file beside the log."""
    file = log.with_suffix(".json")
    what = [arm.code, setup.command(arm)[1:], _asked()]
    if file.exists():
        was, answers, silent, *_ = json.loads(file.read_text())
        if was == what:
            bar.update(len(what[-1]))
            return _answers(answers), silent
    answers, silent = collect(arm, setup, log, timeout, bar)
    plain = {kind: [vars(a) for a in of] for kind, of in answers.items()}
    file.write_text(json.dumps([what, plain, silent, hardware()]))
    return answers, silent


@dataclasses.dataclass
class Kept:
    """What a server answered in an earlier run.

    Attributes:
        code: Digest of its engine, see Arm.
        command: What started it.
        silent: Kind of prompt -> why there are no answers.
        where: The machine, if it was noted.
    """

    code: str
    command: List[str]
    answers: Dict[str, List[Answer]]
    silent: Dict[str, str]
    where: dict

    @property
    def dtype(self) -> str:
        return self.command[self.command.index("--dtype") + 1]

    def describe(self) -> Dict[str, object]:
        """What a result file says of it: no folder of another machine."""
        words = [Path(w).name if w.startswith("/") else w for w in self.command]
        return {
            "code_sha256": self.code,
            "command": shlex.join(words),
            "hardware": self.where,
        }


def load_kept(file: Path) -> Kept:
    """Reads a file that `kept` wrote.

    Raises:
        UserError: It is none, or of other prompts than today's.
    """
    try:
        (code, command, asked), answers, silent, *where = json.loads(file.read_text())
        found = Kept(code, command, _answers(answers), silent, *(where or [{}]))
        found.describe(), found.dtype
    except (ValueError, TypeError, AttributeError, LookupError) as e:
        raise UserError(
            f"{file} holds no kept answers ({e}): name a file that `pictures` wrote "
            "beside its logs."
        ) from None
    if asked != _asked():
        raise UserError(
            f"{file} answers other prompts than are asked today: ask its server anew."
        )
    return found


def shape_of(file: Path) -> str:
    """The shape whose answers a file holds.

    Raises:
        UserError: Its name does not say.
    """
    fit = [s for s in SHAPES if file.name.startswith(f"{s}-")]
    if not fit or not file.name.endswith(KEPT):
        raise UserError(f"{file} is not named SHAPE-ARM{KEPT}: keep the names.")
    return max(fit, key=len)


def load_all(answers: List[List[str]]) -> Dict[str, Dict[str, Kept]]:
    """Shape -> arm -> what it answered, of lists of an arm and its files.

    Raises:
        UserError: A file is none, an arm has none or two of a shape, or the arms of a
            shape answered in several dtypes.
    """
    given: Dict[str, Dict[str, Kept]] = {}
    for name, *files in answers:
        if not files:
            raise UserError(f"--answers {name}: name the files of its answers too.")
        for file in map(Path, files):
            arms = given.setdefault(shape_of(file), {})
            if name in arms:
                raise UserError(f"{file}: {name} has answers of that shape already.")
            arms[name] = load_kept(file)
    for shape, arms in given.items():
        dtypes = sorted({was.dtype for was in arms.values()})
        if len(dtypes) > 1:
            raise UserError(
                f"{shape}: answers in {' and '.join(dtypes)}: read them in runs of "
                "their own."
            )
    return {shape: given[shape] for shape in SHAPES if shape in given}
