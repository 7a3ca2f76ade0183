"""Writes loadable Gemma 4 checkpoint folders with random weights.

As it travels with the tests of patches, it needs nothing of the package around it but
fp8_forms, and that where weights are in FP8.
"""

from gemma4.checkpoint.files import write_files  # noqa: F401
from gemma4.checkpoint.folder import (  # noqa: F401
    CONFIG_FORMATS,
    DTYPES,
    RECIPE_FILE,
    CheckpointError,
    write_checkpoint,
)
from gemma4.checkpoint.shapes import SHAPES  # noqa: F401
from gemma4.checkpoint.tiny import Shape  # noqa: F401
from gemma4.checkpoint.tokens import (  # noqa: F401
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FIRST_TEXT_TOKEN,
    TOOL_RESPONSE,
    TURN_END,
)
