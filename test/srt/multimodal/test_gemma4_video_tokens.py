"""A video's tokens and frames are those of transformers' own processor: each frame's
prompt states its time, by the video's frame rate and the frames that were chosen."""

import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
import transformers

from sglang.srt.multimodal.processors.gemma4 import Gemma4SGLangProcessor
from sglang.srt.utils.video_decoder import VideoDecoderWrapper
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmark"))
from gemma4.checkpoint import write_checkpoint

register_cpu_ci(est_time=40, suite="stage-a-test-cpu")

PROMPT = "<bos><|turn>user\nWhat is in <|video|> and in <|video|>?<turn|>\n"


class Decoded(VideoDecoderWrapper):
    """A decoder of frames that are there: (frames, height, width, 3), uint8."""

    def __init__(self, frames: np.ndarray, fps: float):
        self._frames, self._fps = frames, fps

    def __len__(self):
        return len(self._frames)

    @property
    def avg_fps(self):
        return self._fps

    def get_frames_at(self, indices):
        return self._frames[indices]

    def __del__(self):
        pass


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 64, 96, 3), np.uint8)


class TestVideoTokens(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory(prefix="gemma4-video-") as folder:
            write_checkpoint(f"{folder}/model", weights=False)
            cls.oracle = transformers.AutoProcessor.from_pretrained(f"{folder}/model")
        cls.ours = ours = object.__new__(Gemma4SGLangProcessor)
        ours._processor, ours._tokenizer = cls.oracle, cls.oracle.tokenizer
        ours._resolve_processor = lambda _: (cls.oracle, cls.oracle.tokenizer)
        ours._tokenizer_auto_adds_specials = True
        ours.image_config = ours.video_config = ours.audio_config = None
        ours.disable_fast_image_processor = True
        ours.video_preprocessing_device = None
        ours._call_processor = lambda processor, text, _, kwargs: processor(
            text=[text], padding=True, return_tensors="pt", **kwargs
        )

    def check(self, *videos):
        got = self.ours.process_mm_data(
            PROMPT, videos=[Decoded(array, fps) for array, fps in videos]
        )
        count = self.oracle.video_processor.num_frames
        # Of a video with fewer frames than are chosen transformers takes none.
        short = any(len(array) < count for array, _ in videos)
        expected = self.oracle(
            text=[PROMPT],
            videos=[torch.from_numpy(array).permute(0, 3, 1, 2) for array, _ in videos],
            video_metadata=[
                {
                    "total_num_frames": len(array),
                    "fps": fps,
                    "frames_indices": list(range(len(array))),
                }
                for array, fps in videos
            ],
            do_sample_frames=not short,
            add_special_tokens=False,
            return_tensors="pt",
        )
        self.assertEqual(got["input_ids"].tolist(), expected["input_ids"].tolist())
        for name in ("pixel_values_videos", "video_position_ids"):
            self.assertTrue(torch.equal(got[name], expected[name]), name)

    def test_frame_rates(self):
        for fps in (1.0, 12.5, 24.0, 29.97, 60.0):
            with self.subTest(fps=fps):
                self.check((frames(90), fps), (frames(32), fps))

    def test_lengths(self):
        count = self.oracle.video_processor.num_frames
        for length in (count, count + 1, 2 * count - 1, 3 * count, 150):
            with self.subTest(length=length):
                self.check((frames(length), 25.0), (frames(count), 2.0))

    def test_short(self):
        self.check((frames(3), 2.0), (frames(20), 0.5))

    def test_frames_without_a_rate(self):
        """Frames that no decoder gave are taken as they are, 24 a second."""
        arrays = [torch.from_numpy(frames(n)).permute(0, 3, 1, 2) for n in (40, 3)]
        got = self.ours.process_mm_data(PROMPT, videos=list(arrays))
        expected = self.oracle(
            text=[PROMPT],
            videos=arrays,
            do_sample_frames=False,
            add_special_tokens=False,
            return_tensors="pt",
        )
        self.assertEqual(got["input_ids"].tolist(), expected["input_ids"].tolist())


if __name__ == "__main__":
    unittest.main()
