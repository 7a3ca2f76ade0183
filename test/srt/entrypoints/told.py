"""A logit processor, for a server to import, that says what a request tells it to."""

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class Told(CustomLogitProcessor):
    """Samples the tokens of the parameter `told`, and its last one ever after."""

    def __call__(self, logits, custom_param_list=None):
        logits.fill_(float("-inf"))
        for row, params in zip(logits, custom_param_list):
            told = params["told"]
            row[told.pop(0) if len(told) > 1 else told[0]] = 0
        return logits
