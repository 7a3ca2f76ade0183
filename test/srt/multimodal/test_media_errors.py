"""Media that a client names and nobody can read are the client's fault: a ValueError."""

import asyncio
import base64
import io
import tempfile
import unittest
import wave
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils import common
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="stage-a-test-cpu")


def picture(kind):
    data = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 10, 30)).save(data, kind)
    return data.getvalue()


def load(data, modality):
    return BaseMultimodalProcessor._load_single_item(data, modality)


class TestMediaErrors(CustomTestCase):
    def test_paths_that_lead_nowhere(self):
        with tempfile.TemporaryDirectory() as folder:
            for modality in (Modality.IMAGE, Modality.AUDIO, Modality.VIDEO):
                for path in (folder, f"{folder}/none.png", f"{folder}/{'a' * 300}.png"):
                    for data in (path, f"file://{path}"):
                        with self.subTest(modality, data=data), self.assertRaises(
                            ValueError
                        ):
                            load(data, modality)

    def test_urls_without_data(self):
        for modality in (Modality.IMAGE, Modality.AUDIO, Modality.VIDEO):
            for data in ("data:", "data:image/png;base64", "data:,", "", "no base64!"):
                with self.subTest(modality, data=data), self.assertRaises(ValueError):
                    load(data, modality)

    @settings(deadline=None)
    @given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
    def test_damaged_pictures(self, kind, data):
        """They load, as much of them as PIL can read, or are refused."""
        whole = bytearray(picture(kind))
        for _ in range(data.draw(st.integers(1, 8))):
            place = data.draw(st.integers(0, len(whole) - 1))
            whole[place] = data.draw(st.integers(0, 255))
        whole = bytes(whole[: data.draw(st.integers(0, len(whole)))])
        try:
            image = load(base64.b64encode(whole).decode(), Modality.IMAGE)
        except ValueError:
            return
        self.assertEqual(image.mode, "RGB")

    def test_a_decoder_that_trips(self):
        """PIL's plugins raise what their parsers run into."""
        for error in (IndexError, KeyError, TypeError, EOFError, OverflowError):
            with self.subTest(error), mock.patch.object(
                common.Image, "open", side_effect=error("inside")
            ), self.assertRaisesRegex(ValueError, "inside"):
                load(picture("PNG"), Modality.IMAGE)
        with mock.patch.object(common.Image, "open", side_effect=MemoryError):
            with self.assertRaises(RuntimeError):
                load(picture("PNG"), Modality.IMAGE)

    def test_a_prompt_without_tokens(self):
        for prompt in ([], None):
            coroutine = BaseMultimodalProcessor.load_mm_data(
                None, prompt, None, image_data=[picture("PNG")]
            )
            with self.subTest(prompt), self.assertRaisesRegex(ValueError, "has none"):
                asyncio.run(coroutine)

    def test_no_video_decoder(self):
        with mock.patch.object(
            common, "VideoDecoderWrapper", side_effect=ImportError("decord")
        ), self.assertRaisesRegex(ValueError, "video decoder"):
            load("data:video/mp4;base64,AAAA", Modality.VIDEO)

    def test_what_can_be_read(self):
        self.assertEqual(load(picture("PNG"), Modality.IMAGE).size, (24, 16))
        data = io.BytesIO()
        with wave.open(data, "wb") as f:
            f.setparams((1, 2, 16000, 0, "NONE", ""))
            f.writeframes(bytes(3200))
        sound = "data:audio/wav;base64," + base64.b64encode(data.getvalue()).decode()
        self.assertEqual(len(load(sound, Modality.AUDIO)), 1600)


if __name__ == "__main__":
    unittest.main()
