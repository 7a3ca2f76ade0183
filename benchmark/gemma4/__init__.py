"""Measures Gemma 4 on SGLang: `python -m gemma4 --help`, with benchmark/ on PYTHONPATH.

cli         the door: which command is meant, and one sentence for what goes wrong
arguments   the options that commands share
engines     what is compared, and how its servers are started, asked and stopped
serve       loads of requests, arm beside arm
profile     where the time of a step goes
kernels     single operations, and the runner under them
quality     answers, beside those of transformers
pools       how many requests fit in the KV pools, and how full they were
checkpoint  folders with random weights
report      results, their tables and pictures; results/ holds the files
"""
