"""Writes a loadable Gemma 4 checkpoint folder with random weights.

    python -m gemma4 checkpoint OUT --shape tiny
    python -m gemma4 checkpoint OUT --shape 26b-a4b --assistant
    python -m gemma4 checkpoint OUT --shape e2b --no-weights
    python -m gemma4 checkpoint OUT --shape 31b --weights fp8-dynamic

The folder holds what a released one holds: config, generation config, tokenizer,
chat template, processor, and sharded safetensors with an index. Names and shapes of
the weights are those that transformers saves a model of the config under, built on the
meta device.

The large shapes are drawn on the GPU when there is one, and a GPU's generator gives
other numbers than a CPU's; the tiny ones are always drawn on the CPU and are the same
everywhere. With `--weights` the same weights are stored in FP8, in one of the forms of
fp8.py.
"""

from gemma4.checkpoint.folder import (
    CONFIG_FORMATS,
    DTYPES,
    CheckpointError,
    write_checkpoint,
)
from gemma4.checkpoint.shapes import SHAPES
from gemma4.errors import UserError
from gemma4.fp8_forms import FORMS


def arguments(parser) -> None:
    parser.add("out", "The folder to write.", metavar="OUT")
    parser.add("--shape", "The sizes of the model.", "tiny", choices=SHAPES)
    kind, flag = parser.add_mutually_exclusive_group(), dict(action="store_true")
    parser.add("--assistant", "Writes the shape's MTP draft model.", to=kind, **flag)
    parser.add("--text-only", "Writes a text model, without vision.", to=kind, **flag)
    sentence = "Stores them in FP8, in one of the published forms."
    parser.add("--weights", sentence, choices=FORMS)
    parser.add("--dtype", "The dtype of the weights.", "bfloat16", choices=DTYPES)
    parser.add("--seed", "What all weights are drawn from.", 0, type=int)
    sentence = "Writes config.json as transformers 5.6 (flat) or 5.19 (per-layer) does."
    parser.add("--config-format", sentence, "flat", choices=CONFIG_FORMATS)
    sentence = "Writes config and tokenizer alone, for --load-format dummy."
    parser.add("--no-weights", sentence, **flag)
    parser.add("--overwrite", "Replaces a folder that this command wrote.", **flag)


def run(args) -> None:
    try:
        written = write_checkpoint(
            args.out,
            args.shape,
            assistant=args.assistant,
            text_only=args.text_only,
            dtype=args.dtype,
            seed=args.seed,
            weights=not args.no_weights,
            fp8=args.weights,
            config_format=args.config_format,
            overwrite=args.overwrite,
        )
    except CheckpointError as e:
        raise UserError(str(e)) from None
    print(f"{args.out}: {'written' if written else 'already there, left alone'}.")
