"""Answers about pictures beside transformers', and when an arm has failed."""

import dataclasses
import json
from pathlib import Path
from typing import Dict, Iterable, List, Optional

from gemma4.engines.servers import Server
from gemma4.quality.answers import ROOM
from gemma4.quality.picture_cases import Ask, Prompt, data_url, picture

NEW_TOKENS = 16
EXACT = 1e-5


@dataclasses.dataclass
class Answer:
    """What an arm answered to a prompt: tokens, and the logprob of each."""

    prompt: Prompt
    tokens: List[int]
    logprobs: List[float]


def ask(server: Server, asked: Ask) -> List[Answer]:
    """The answers of a request, `n` a prompt.

    Raises:
        UserError: The server died, or did not answer.
    """
    data = {
        "text": [text for text, _ in asked.prompts],
        "image_data": [[data_url(picture(*p)) for p in of] for _, of in asked.prompts],
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": NEW_TOKENS,
            "ignore_eos": True,
            "n": asked.n,
        },
        "return_logprob": True,
    }
    if len(asked.prompts) == 1:
        data.update(text=data["text"][0], image_data=data["image_data"][0])
    said = server.answer("/generate", data)
    said = said if isinstance(said, list) else [said]
    return [
        Answer(
            asked.prompts[i // asked.n],
            answer["output_ids"],
            [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]],
        )
        for i, answer in enumerate(said)
    ]


class Reference:
    """transformers, which reads prompt and answer in one pass.

    On the CPU, where small models take less time than a GPU's launches do.
    """

    def __init__(self, folder: Path, dtype: str = "float32"):
        import torch
        import transformers

        config = json.loads((folder / "config.json").read_text())
        self.dtype = getattr(torch, dtype)
        model_class = getattr(transformers, config["architectures"][0])
        self.model = model_class.from_pretrained(
            folder,
            dtype=self.dtype,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        self.model.eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def logprobs(self, answer: Answer):
        """Of every token of the vocabulary at each of the answer's places, float32."""
        import torch

        text, pictures = answer.prompt
        images = [picture(*p) for p in pictures] or None
        inputs = self.processor(text=text, images=images, return_tensors="pt")
        inputs = inputs.to(self.dtype)
        new = torch.tensor([answer.tokens])
        ids = inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            types = torch.cat([types, torch.zeros_like(new)], dim=1)
            inputs["mm_token_type_ids"] = types
        # Gemma's own masks; those of 12B's forward pass differ in transformers 5.19.
        inputs["attention_mask"] = self.model.create_masks_for_generate(
            self.model.config,
            inputs_embeds=self.model.get_input_embeddings()(ids),
            attention_mask=torch.ones_like(ids),
            past_key_values=None,
            position_ids=torch.arange(ids.shape[1])[None],
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
        )
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0, -len(answer.tokens) - 1 : -1]
            logits[:, self.model.generation_config.suppress_tokens or []] = -torch.inf
            return torch.log_softmax(logits.float(), dim=-1)


@dataclasses.dataclass
class Difference:
    """Answers to prompts of one kind beside float32.

    Attributes:
        apart: How far the logprob of a token is from float32's, at the worst, in nats.
        behind: How much less likely than its own choice float32 finds one, likewise.
        others: Tokens that are not its choice.
        tokens: How many there are.
    """

    apart: float = 0.0
    behind: float = 0.0
    others: int = 0
    tokens: int = 0

    def see(self, answer: Answer, exact) -> None:
        best, choice = exact.max(dim=-1)
        for i, (token, given) in enumerate(zip(answer.tokens, answer.logprobs)):
            own = exact[i, token].item()
            self.apart = max(self.apart, abs(given - own))
            self.behind = max(self.behind, best[i].item() - own)
            self.others += token != choice[i].item()
            self.tokens += 1

    @classmethod
    def of_all(cls, differences: Iterable["Difference"]) -> "Difference":
        """Of answers to prompts of all these kinds."""
        found = cls()
        for one in differences:
            found.apart = max(found.apart, one.apart)
            found.behind = max(found.behind, one.behind)
            found.others += one.others
            found.tokens += one.tokens
        return found


def judge(found: Dict[str, Difference], noise: Optional[Dict[str, Difference]]):
    """What is wrong, in words; nothing if it is what transformers says.

    `noise` is None where the arm answered in float32.
    """
    for kind, mine in found.items():
        if noise is None:
            allowed, tie = EXACT, 0.0
        else:
            typical = sum(d.apart for d in noise.values()) / len(noise)
            allowed = ROOM * max(noise[kind].apart, typical)
            tie = 2 * allowed
        if not mine.apart <= allowed:
            yield f"{kind}: a logprob is {mine.apart:.2e} off, {allowed:.2e} is allowed"
        if not mine.behind <= tie:
            yield (
                f"{kind}: a token that float32 finds {mine.behind:.2e} nats less likely "
                f"than its choice, {tie:.2e} is allowed"
            )
