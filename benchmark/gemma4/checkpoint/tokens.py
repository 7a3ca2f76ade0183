"""Tokenizer, chat template and processor, and what else a folder has beside weights."""

from collections.abc import Iterator

from gemma4.checkpoint.tiny import Shape

PAD, EOS, BOS, UNK, MASK = range(5)
TOOL_RESPONSE, TURN_START, TURN_END = 50, 105, 106
CONTROL_TOKENS = {
    PAD: "<pad>",
    EOS: "<eos>",
    BOS: "<bos>",
    UNK: "<unk>",
    MASK: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    TOOL_RESPONSE: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    TURN_START: "<|turn>",
    TURN_END: "<turn|>",
}
# Attributes of the tokenizer that the processor reads, and tools look up.
NAMED_TOKENS = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
}
VIDEO_TOKEN = "<|video|>"
FIRST_BYTE_TOKEN = 238
FIRST_TEXT_TOKEN = FIRST_BYTE_TOKEN + 256

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] or [] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- elif part['type'] in ('image', 'audio', 'video') -%}
                {{- '<|' + part['type'] + '|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def vocabulary(shape: Shape):
    """Build the BPE vocabulary and its merges.

    Beside control tokens, bytes and single characters it holds words "▁" + letters,
    and with each word all that it begins with. A merge appends one letter to such a
    beginning, so text that was decoded from words encodes to the same words again.

    Returns `(vocab, merges)`: token -> id, and pairs in order of rank.
    """
    size = shape.text["vocab_size"]
    ids = shape.multimodal_ids
    reserved = dict(CONTROL_TOKENS)
    for name, index in ids.items():
        name = name[: -len("_id")]
        reserved[index] = NAMED_TOKENS.get(name, VIDEO_TOKEN)
    for byte in range(256):
        reserved[FIRST_BYTE_TOKEN + byte] = f"<0x{byte:02X}>"
    for index in range(FIRST_BYTE_TOKEN):
        reserved.setdefault(index, f"<unused{index}>")

    consonants, vowels = "bdfghjklmnprstvz", "aeiou"
    characters = ["▁", "\n"] + [chr(c) for c in range(33, 127)]
    merges = []

    def words() -> Iterator[str]:
        stems, depth = ["▁"], 0
        while True:
            letters = vowels if depth % 2 else consonants
            longer = []
            for stem in stems:
                for letter in letters:
                    merges.append((stem, letter))
                    longer.append(stem + letter)
                    yield stem + letter
            stems, depth = longer, depth + 1

    texts, vocab = words(), {}
    for index in range(size):
        if index in reserved:
            token = reserved[index]
        elif characters:
            token = characters.pop(0)
        else:
            token = next(texts)
        vocab[token] = index
    texts.close()
    return vocab, merges


def make_tokenizer(shape: Shape):
    from transformers import GemmaTokenizer

    vocab, merges = vocabulary(shape)
    return GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        padding_side="left",
        model_max_length=shape.text["max_position_embeddings"],
        extra_special_tokens=[VIDEO_TOKEN],
        chat_template=CHAT_TEMPLATE,
        **NAMED_TOKENS,
    )


def make_processor(shape: Shape, tokenizer):
    return shape.transformers_class("Processor")(
        feature_extractor=shape.transformers_class("AudioFeatureExtractor")(),
        image_processor=shape.transformers_class("ImageProcessor")(
            max_soft_tokens=shape.soft_tokens
        ),
        video_processor=shape.transformers_class("VideoProcessor")(max_soft_tokens=70),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=shape.soft_tokens,
    )
