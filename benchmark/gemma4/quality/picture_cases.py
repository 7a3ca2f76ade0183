"""Prompts with pictures, of all forms."""

import base64
import dataclasses
import io
from typing import Dict, List, Tuple

SIZES = {  # (height, width)
    "square": (96, 96),
    "tall": (400, 60),
    "wide": (60, 400),
    "small": (17, 23),
    "large": (700, 900),
}
MARK = "<|image|>"
WORDS = "look at this ba be bi bo bu da de di do du fa fe fi fo fu".split()

# A prompt: its text, and of each of its pictures a key of SIZES and a seed.
Prompt = Tuple[str, List[Tuple[str, int]]]


@dataclasses.dataclass
class Ask:
    """Prompts of one request, of which each gets `n` answers."""

    prompts: List[Prompt]
    n: int = 1


def _text(words: int, seed: int = 0) -> str:
    import numpy as np

    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def cases() -> Dict[str, List[Ask]]:
    """Kind of prompt -> what is asked of it, one request after the other."""
    middle = f"{_text(9)} {MARK} {_text(7, 1)}"
    found = {f"one, {name}": [Ask([(middle, [(name, 0)])])] for name in SIZES}
    found["at the end"] = [
        Ask([(f"{_text(40)} {MARK}", [(name, 0)])]) for name in ("square", "wide")
    ]
    found["another, same text"] = [
        Ask([(middle, [("tall", seed)])]) for seed in range(3)
    ]
    found["several"] = [
        Ask(
            [
                (
                    f"{_text(5)} {MARK} {_text(3)} {MARK} {_text(60, 2)} {MARK} go",
                    [(name, 0) for name in ("wide", "tall", "small")],
                )
            ]
        )
    ]
    found["the same three times"] = [
        Ask([(f"{MARK} {_text(4)} {MARK} {MARK} go", [("square", 0)] * 3)])
    ]
    found["no text"] = [Ask([(f"{MARK}{MARK}", [("square", 0), ("tall", 0)])])]
    together = [
        (f"{_text(5 + 11 * i, i)} {MARK} {_text(3, i)}", [(name, i)])
        for i, name in enumerate([*SIZES, "tall"])
    ]
    together.append((f"{MARK} {_text(20, 9)} {MARK}", [("wide", 7), ("small", 8)]))
    together.append((_text(50, 10), []))
    found["eight at once"] = [Ask(together)]
    start = _text(50, 11)
    whole = f"{start} {MARK} {_text(9, 1)}"
    found["behind a cached prefix"] = [
        Ask([(start, [])]),
        Ask([(whole, [("square", 0)])]),
        Ask([(f"{whole} {_text(9, 2)}", [("square", 0)])]),
        Ask([(f"{whole} {MARK} {_text(5)}", [("square", 0), ("tall", 0)])]),
    ]
    for n in (2, 3):
        pictures = [("tall", 0), ("wide", 0), ("tall", 0)]
        found[f"n {n}"] = [
            Ask([(f"{_text(9)} {MARK} go", pictures[:1])], n),
            Ask([(f"{MARK} {_text(9)} {MARK}", pictures[:2])], n),
            Ask([(f"{MARK} {MARK} {_text(9)} {MARK}", pictures)], n),
        ]
    return found


def picture(name: str, seed: int):
    """Random colors."""
    import numpy as np
    from PIL import Image

    shape = (*SIZES[name], 3)
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), "RGB")


def soft_shapes(random, height: int, width: int):
    """An image that a JPEG makes as small as it would a photograph."""
    import numpy as np
    from PIL import Image

    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def data_url(image, form: str = "PNG", **options) -> str:
    """An image as a request has it."""
    file = io.BytesIO()
    image.save(file, form, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{form.lower()};base64,{data}"
