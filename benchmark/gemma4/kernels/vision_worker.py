"""An arm's process: a line with a count is answered with tokens and milliseconds."""

import json
import sys
import time
from typing import List

from gemma4.engines import one_rank

# What begins an answer, as the engine prints too.
SAID = "vision: "


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
    """Answers each line of stdin."""
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


if __name__ == "__main__":
    answer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
