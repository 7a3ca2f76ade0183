"""Times the arms of an operation's cases in turn, and writes the result.

An operation is a module with

    TITLE              of its result
    SAMPLES            of each arm, where --replays does not say
    arguments(parser)  its own options
    measure(run)       its cases: for each, arms that agree are given to `run.time`

`bytes` among the arms of a result is what a case must read and write, at the rate of a
large copy; `fork` is compared with the arms of `run.against`.
"""

import statistics
from pathlib import Path
from types import ModuleType
from typing import Callable, Dict, Iterable, List, Optional, TypeVar

import torch
from gemma4.arguments import new_result_path
from gemma4.errors import UserError
from gemma4.kernels import fa4
from gemma4.kernels.timing import Calls, copy_rate, time_in_turn
from gemma4.report.results import Case, Results
from gemma4.report.tables import tables
from tqdm import tqdm

T = TypeVar("T")
BYTES, FA4 = "bytes", "FlashAttention 4"


def add_base(parser) -> None:
    sentence = "The folder that holds the release's sglang/ (default: it is unpacked)."
    parser.add("--base", sentence, type=Path, metavar="DIR")


def add_fa4(parser) -> None:
    sentence = "Adds FlashAttention 4, of the vLLM that is installed in this folder."
    parser.add("--fa4", sentence, type=Path, metavar="SITE")


class Run:
    """A run of an operation's cases.

    Attributes:
        args: The command's arguments.
        results: What was measured.
        rate: Bytes a microsecond of a large copy.
        flash: FlashAttention 4, or None.
        against: The arms with which the fork's times are compared.
    """

    def __init__(self, args, title: str):
        self.args, self.path = args, new_result_path(args)
        if not torch.cuda.is_available():
            raise UserError("There is no GPU here, and kernels are timed on one.")
        site = getattr(args, "fa4", None)
        self.flash: Optional[Callable] = fa4.load(site) if site else None
        self.rate, self.against = copy_rate(), ["base"]
        self.results = Results.start("kernels", args.name, title)
        self.set(copy_bytes_per_us=round(self.rate), limits=[BYTES])
        torch.manual_seed(0)

    def set(self, **settings) -> None:
        """Records what applies to every case."""
        self.results.settings.update(settings)

    def cases(self, cases: Iterable[T], what: str) -> Iterable[T]:
        """These, with a bar; what was measured is saved at their end."""
        yield from tqdm(list(cases), desc=what, unit="case")
        self.results.save(self.path)

    def time(
        self,
        case: Case,
        arms: Dict[str, Calls],
        moved: Optional[float] = None,
        metric: str = "time",
    ) -> None:
        """Times the arms of a case; `moved` is how many bytes it must read and write."""
        for arm, samples in time_in_turn(arms, self.args.replays).items():
            self.results.add(case, arm, metric, "us", samples)
        if moved is not None:
            limit = [round(moved / self.rate, 4)]
            self.results.add(case, BYTES, metric, "us", limit)

    def finish(self) -> None:
        print(f"wrote {self.results.save(self.path)}")
        for table in tables(self.results):
            print(f"\n{table}")
        ratios: List[float] = []
        for record in self.results.select("fork"):
            found = [
                self.results.get(record.case, arm, record.metric)
                for arm in self.against
            ]
            if any(found) and record.unit in ("us", "ms"):
                best = min(other.median for other in found if other)
                ratios.append(record.median / best)
        if ratios:
            print(
                f"\nfork: {min(ratios):.2f} to {max(ratios):.2f} of the time of "
                f"{' or '.join(self.against)}, median {statistics.median(ratios):.2f}"
            )


class Operation:
    """The command that measures an operation."""

    def __init__(self, module: ModuleType):
        self.module, self.__doc__ = module, module.__doc__

    def arguments(self, parser) -> None:
        parser.add_result(self.module.__name__.rpartition(".")[2])
        samples = self.module.SAMPLES
        parser.add("--replays/--samples", "How many samples an arm gives.", samples)
        self.module.arguments(parser)

    def run(self, args) -> None:
        run = Run(args, self.module.TITLE)
        self.module.measure(run)
        run.finish()


def agree(name: str, got: torch.Tensor, exact: torch.Tensor) -> None:
    """Raises UserError where what is to be timed is off from float64: times mean
    nothing if it is wrong."""
    error = (got.double() - exact).norm() / exact.norm()
    if not error < 6e-3:
        raise UserError(f"{name} is off by {error:.1e} from float64.")


def alike(
    where: object, arms: Dict[str, Callable[[], object]], out: torch.Tensor, atol: float
) -> None:
    """Raises UserError where arms, which write to `out`, differ from the first in any
    element. Sums of many values are small: `atol` is what bf16 leaves of them."""
    expected = None
    for arm, call in arms.items():
        out.fill_(float("nan"))
        call()
        got = out.float()
        expected = got if expected is None else expected
        if not torch.allclose(got, expected, rtol=2e-2, atol=atol):
            apart = (got - expected).abs().max()
            first = next(iter(arms))
            raise UserError(f"{arm} and {first} differ by {apart:.3g} on {where}.")
