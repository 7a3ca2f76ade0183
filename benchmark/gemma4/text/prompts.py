"""Texts of so many tokens, and a tokenizer that is trained on others like them."""

import json
import sysconfig
from pathlib import Path
from typing import Dict, List, Tuple

from gemma4.checkpoint import write_checkpoint
from gemma4.checkpoint.tokens import CONTROL_TOKENS, NAMED_TOKENS, VIDEO_TOKEN
from gemma4.errors import UserError

PROSE, CODE, RANDOM = "prose", "code", "random tokens"
SPACE = "▁"


def corpus() -> Dict[str, Tuple[str, str]]:
    """Kind -> text to train on, text to ask about."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    texts = {
        PROSE: [topics[name] for name in sorted(topics)],
        CODE: [path.read_text("utf-8", errors="replace") for path in files],
    }
    return {k: ("\n".join(t[::2]), "\n".join(t[1::2])) for k, t in texts.items()}


def train(folder: Path, texts: List[str], size: int) -> None:
    """Writes 26B-A4B's processor with a tokenizer of Gemma's rules: spaces are letters,
    and unknown ones bytes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    write_checkpoint(folder, "26b-a4b", weights=False, overwrite=True)
    special = [*NAMED_TOKENS.values(), *CONTROL_TOKENS.values(), VIDEO_TOKEN]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    # Gemma's tokenizer has no words; training on a text as one would take days.
    words = Regex(rf"(?<=[^{SPACE}])(?={SPACE})|\n")
    trained.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    trained.train_from_iterator(
        (line.replace(" ", SPACE) for text in texts for line in text.splitlines(True)),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(dict.fromkeys(special))
        ),
    )
    trained.save(str(folder / "trained.json"))
    model = json.loads((folder / "trained.json").read_text())["model"]
    GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        extra_special_tokens=[VIDEO_TOKEN],
        **NAMED_TOKENS,
    ).save_pretrained(folder)


def prompts(tokenizer, kind: str, text: str, tokens: int, count: int) -> List[str]:
    """So many texts of about so many tokens, no two the same."""
    import numpy as np

    if kind == RANDOM:
        random = np.random.default_rng(0)
        known = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        return [tokenizer.decode(random.choice(known, tokens)) for _ in range(count)]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = len(ids) - tokens
    if last < count:
        raise UserError(
            f"--tokens {tokens}: Python ships {len(ids)} tokens of {kind}; ask for "
            "fewer."
        )
    starts = [i * last // max(count - 1, 1) for i in range(count)]
    return [tokenizer.decode(ids[start : start + tokens]) for start in starts]
