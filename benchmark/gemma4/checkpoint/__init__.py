"""Writes loadable Gemma 4 checkpoint folders with random weights.

It needs nothing of the package around it, as it travels with the tests of patches.
"""

from gemma4.checkpoint.folder import (  # noqa: F401
    CONFIG_FORMATS,
    DTYPES,
    RECIPE_FILE,
    CheckpointError,
    write_checkpoint,
    write_files,
)
from gemma4.checkpoint.fp8 import FORMS  # noqa: F401
from gemma4.checkpoint.shapes import SHAPES, Shape  # noqa: F401
from gemma4.checkpoint.tokens import (  # noqa: F401
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FIRST_TEXT_TOKEN,
    TOOL_RESPONSE,
    TURN_END,
)
