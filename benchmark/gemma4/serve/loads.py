"""What is sent to a server: so many prompts of so many tokens."""

import argparse
import dataclasses
import re
from typing import Dict, Iterable, List, Optional


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent: prompts of `input` tokens, each answered with `output` tokens."""

    input: int
    output: int
    prompts: int
    at_once: Optional[int] = None
    groups: int = 0  # of prompts that share 8/9 of their input

    def scaled(self, prompts: int, input: int, output: int) -> "Load":
        """With at most so many prompts, and input and output divided."""
        prompts = min(self.prompts, prompts)
        groups = max(min(self.groups, prompts // 2), 1) if self.groups else 0
        return dataclasses.replace(
            self,
            # As many in each group.
            prompts=prompts - prompts % groups if groups else prompts,
            input=max(self.input // input, 1),
            output=max(self.output // output, 1),
            groups=groups,
        )

    @property
    def warmups(self) -> int:
        """Prompts of its own, one after another, before its clock starts."""
        return min(WARMUP, max(self.prompts // 2, 1))

    def title(self, name: str) -> str:
        title = f"{self.input}/{self.output}, {self.prompts} prompts"
        if name in LOADS:
            title = f"{name} {title}"
        if self.groups:
            title += f" in {self.groups} groups"
        if self.at_once:
            title += (
                ", one at a time" if self.at_once == 1 else f", {self.at_once} at once"
            )
        return title

    def arguments(self) -> List[str]:
        """Of bench_serving."""
        if self.groups:
            shared = self.input * 8 // 9
            numbers = {
                "gsp-num-groups": self.groups,
                "gsp-prompts-per-group": self.prompts // self.groups,
                "gsp-system-prompt-len": shared,
                "gsp-question-len": self.input - shared,
                "gsp-output-len": self.output,
            }
            dataset = "generated-shared-prefix"
        else:
            numbers = {
                "random-input-len": self.input,
                "random-output-len": self.output,
                "random-range-ratio": 1.0,
                "num-prompts": self.prompts,
            }
            dataset = "random-ids"
        if self.at_once:
            numbers["max-concurrency"] = self.at_once
        flags = [part for k, v in numbers.items() for part in (f"--{k}", str(v))]
        return ["--dataset-name", dataset, *flags]


LOADS = {
    "summarization": Load(8000, 1000, 80),
    "chat": Load(1000, 1000, 80),
    "stream": Load(1000, 400, 8, at_once=1),
    "prefill": Load(8000, 1, 8, at_once=1),
    "short-prefill": Load(1000, 1, 8, at_once=1),
    "shared-prefix": Load(4500, 500, 80, groups=8),
    "long": Load(65536, 200, 4, at_once=2),
    "128k": Load(131072, 1, 2, at_once=1),
    "crowd": Load(8000, 1000, 160),
    "agents": Load(65536, 400, 64, at_once=32, groups=8),
}
OTHER_LOAD = re.compile(r"([1-9]\d*)/([1-9]\d*)x([1-9]\d*)(?:@([1-9]\d*))?")
WARMUP = 2
# A burst's prompts: tokens in all, so that it takes seconds, and tokens of each answer.
BURST_TOKENS, BURST_OUTPUT, BURST_SEED = 131072, 8, 10**6
BURST = (
    "before its first load each server answers, unmeasured, prompts of other ids, all at "
    f"once: of each length of the loads, {BURST_TOKENS} tokens at most, and as many "
    "short ones as the largest load has"
)


def bursts(loads: Iterable[Load]) -> List[Load]:
    """What a server answers unmeasured before these loads.

    Several prompts fill a chunk of the prefill, one goes over into the next with what
    is cached of it, and all decode together. A load of one prompt at a time meets no
    shape that its own warm-up has not.
    """
    loads = [load for load in loads if load.at_once != 1]
    if not loads:
        return []
    # Long prompts are too many to send as many as decode together later: short ones.
    most = max(load.prompts for load in loads)
    short = min(1000, *(load.input for load in loads))
    found = {short: Load(short, BURST_OUTPUT, most)}
    for load in loads:
        prompts = min(load.prompts, max(BURST_TOKENS // load.input, 1))
        known = found.get(load.input)
        if known is None or known.prompts < prompts:
            found[load.input] = Load(load.input, BURST_OUTPUT, prompts)
    return list(found.values())


def named_load(name: str) -> Load:
    """One of LOADS, or 1000/500x80@8: tokens in / out x prompts, at most 8 at once.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if name in LOADS:
        return LOADS[name]
    numbers = OTHER_LOAD.fullmatch(name)
    if not numbers:
        raise argparse.ArgumentTypeError(
            f"{name!r} is none of {', '.join(LOADS)}, and not like 1000/500x80@8"
        )
    return Load(*(number and int(number) for number in numbers.groups()))


def chosen_loads(args: argparse.Namespace) -> Dict[str, Load]:
    chosen = {}
    for name in args.loads:
        load = named_load(name)
        if args.prompts:
            load = load.scaled(prompts=args.prompts, input=1, output=1)
        if args.quick:
            load = load.scaled(prompts=16, input=1, output=10)
        if args.shape == "tiny":
            load = load.scaled(prompts=8, input=32, output=32)
        chosen[name] = load
    return chosen
