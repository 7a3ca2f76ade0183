"""Time the vision tower of several arms on the same pictures.

    python benchmark/gemma4/bench_vision.py --arms base,fork
    python benchmark/gemma4/bench_vision.py --arms fork --arm "sdpa=--mm-attention-backend sdpa"

Each arm has a process of its own that holds the model with random weights, its vision
tower whole and one layer of text, and answers with the time that the soft tokens of so
many pictures take, from pixels to the language model's width. The arms take turns,
picture count by picture count. All pictures of a request are handed over at once, as a
server does. An arm's flags are those of its server; its engine is found as serving.py
says. `--shape tiny` runs on a CPU, to try the program.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import one_rank  # noqa: E402
import serving  # noqa: E402
from checkpoint import SHAPES, write_checkpoint  # noqa: E402
from plan_kv_pools import positive  # noqa: E402
from results import FOLDER, Results, table  # noqa: E402
from serving import Arm, HouseError  # noqa: E402

COUNTS = (1, 16)
# What begins an answer of an arm's process, whose engine prints too.
SAID = "bench_vision: "


def build(model: str, flags: List[str]):
    """The arm's model on the GPU, or on the CPU in float32; in the arm's process."""
    import torch

    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils.hf_transformers_utils import get_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    one_rank.start(
        prepare_server_args(["--model-path", model, "--device", device, *flags])
    )
    config = get_config(model, trust_remote_code=False)
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        built = Gemma4ForConditionalGeneration(config)
    for parameter in built.parameters():
        parameter.data.normal_(std=0.02)
    return built.eval()


def pictures(model: str, count: int, height: int, width: int) -> list:
    """Items of random pictures as the processor hands them to the model."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for _ in range(count)
    ]
    read = AutoProcessor.from_pretrained(model).image_processor(
        images, return_tensors="pt"
    )
    return [
        MultimodalDataItem(
            modality=Modality.IMAGE,
            feature=pixels,
            model_specific_data={"image_position_ids": positions},
        )
        for pixels, positions in zip(read["pixel_values"], read["image_position_ids"])
    ]


def answer(model: str, height: int, width: int, flags: List[str]) -> None:
    """An arm's process: a line with a count is answered with tokens and milliseconds."""
    import time

    import torch

    built, kept = build(model, flags), {}
    print(SAID + "ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        if count not in kept:
            kept[count] = pictures(model, count, height, width)
            with torch.inference_mode():  # compiles
                built.get_image_feature(kept[count])
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        wait()
        start = time.perf_counter()
        with torch.inference_mode():
            features = built.get_image_feature(kept[count])
        wait()
        took = 1000 * (time.perf_counter() - start)
        if not bool(features.isfinite().all()):
            raise SystemExit("soft tokens are not finite")
        print(SAID + json.dumps([len(features), round(took, 4)]), flush=True)


class Asked:
    """An arm's process."""

    def __init__(self, arm: Arm, model: Path, args: argparse.Namespace, log: Path):
        self.arm, self.log = arm, log
        command = [arm.python, str(Path(__file__).resolve()), "--answer", str(model)]
        command += [str(args.height), str(args.width), *arm.flags]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=arm.environment(),
                text=True,
            )

    def read(self) -> str:
        """The next line that is an answer, past what the engine prints."""
        for line in self.process.stdout:
            if line.startswith(SAID):
                return line[len(SAID) :]
        self.process.wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        said = f": {last[0][:200]}" if last else ""
        raise HouseError(f"{self.arm.name} ended{said}. All it said is in {self.log}.")

    def time(self, count: int) -> List[float]:
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return json.loads(self.read())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def compare(args: argparse.Namespace, arms: List[Arm], results: Results) -> None:
    """Asks the arms in turn.

    Raises:
        HouseError: An arm ended, or arms make another number of soft tokens.
    """
    asked: List[Asked] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        write_checkpoint(model, args.shape, weights=False)
        try:
            for arm in arms:
                log = args.logs / f"{args.name}-{arm.name.replace(' ', '-')}.log"
                asked.append(Asked(arm, model, args, log))
                asked[-1].read()
            for count in args.pictures:
                made: Dict[str, int] = {}
                samples: Dict[str, List[float]] = {arm.name: [] for arm in arms}
                turns = tqdm(range(args.repeats), desc=f"{count} pictures", unit="turn")
                for _ in turns:
                    for one in asked:
                        tokens, took = one.time(count)
                        made[one.arm.name] = tokens
                        samples[one.arm.name].append(took)
                if len(set(made.values())) > 1:
                    said = ", ".join(f"{k} {v}" for k, v in made.items())
                    raise HouseError(f"The arms make other soft tokens: {said}.")
                case = {"pictures": count, "soft tokens": tokens}
                for name, times in samples.items():
                    results.add(case, name, "vision tower", "ms", times)
        finally:
            for one in asked:
                one.stop()


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="vision", help="of the result file")
    parser.add_argument("--arms", default="", metavar="A,B", help="default: fork")
    parser.add_argument("--arm", action="append", default=[], metavar="ARM")
    parser.add_argument("--shape", default="26b-a4b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--pictures", type=positive, nargs="+", default=COUNTS, help="of a request"
    )
    parser.add_argument("--height", type=positive, default=480)
    parser.add_argument("--width", type=positive, default=640)
    parser.add_argument(
        "--repeats", type=positive, default=11, help="turns of each arm"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--logs", type=Path, default=serving.CACHE / "logs")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse(argv)
    with serving.reported("bench_vision.py"):
        path = args.out / f"{args.name}.json"
        serving.check_new(path)
        if args.shape not in SHAPES:
            raise HouseError(f"--shape {args.shape}: choose of {', '.join(SHAPES)}.")
        args.logs = args.logs.resolve()
        args.logs.mkdir(parents=True, exist_ok=True)
        arms = serving.chosen_arms(args.arms, args.arm, ["fork"])
        results = Results.start(
            *("kernels", args.name, "The vision tower"),
            shape=args.shape,
            height=args.height,
            width=args.width,
            arms={arm.name: arm.describe() for arm in arms},
        )
        compare(args, arms, results)
        print(f"wrote {results.save(path)}\n\n{table(results, 'vision tower')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    else:
        main()
