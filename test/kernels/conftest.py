"""Finds what the tests of kernels share, at upstream's paths."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "srt" / "layers"))
