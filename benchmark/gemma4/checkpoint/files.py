"""The files of a folder beside its weights."""

import json
from pathlib import Path

from gemma4.checkpoint import tokens
from gemma4.checkpoint.configs import flatten
from gemma4.checkpoint.tiny import Shape


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_files(folder: Path, shape: Shape, config, config_format: str) -> None:
    """Write the config of a model, its tokenizer, and its processor if it has towers."""
    from transformers import GenerationConfig

    multimodal = hasattr(config, "vision_config")
    tokenizer = tokens.make_tokenizer(shape)
    (
        tokens.make_processor(shape, tokenizer) if multimodal else tokenizer
    ).save_pretrained(folder)
    config.save_pretrained(folder)
    if config_format == "flat":
        path = folder / "config.json"
        values = json.loads(path.read_text())
        flatten(values, shape)
        write_json(path, values)
    ids = shape.multimodal_ids
    GenerationConfig(
        bos_token_id=tokens.BOS,
        eos_token_id=[tokens.EOS, tokens.TURN_END, tokens.TOOL_RESPONSE],
        pad_token_id=tokens.PAD,
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
        # A unified model's embeddings of these two are no output's.
        suppress_tokens=(
            [ids["eoa_token_id"], ids["eoi_token_id"]]
            if multimodal and shape.unified
            else None
        ),
    ).save_pretrained(folder)
