"""Keeps SGLang's fork: a pinned upstream wheel, and a series of patches on it.

=========== ================================================================
project     where things are, and what a series says of itself
process     runs git, pip and wheel so that nobody's settings change a result
base        fetches, checks and unpacks the upstream wheel
series      reads patches into commits, and writes commits as patches
tree        python/sglang: ``checkout`` and ``export``
upstream    the series as complete pull requests, tests and all
complete    where the tests of a series are, and how they are run
alone       runs files of tests in processes of their own
verify      proves that patches/ and python/sglang are what they should be
prove       proves of each patch that its tests fail without it
build       the PEP 517 backend behind ``pip install ./python``
port        what a newer release of upstream does to the series
rehearse    the series on upstream's own repository
release     what a release holds, and the proof that its wheel serves
ci          what runs on GitHub with a token that can write
=========== ================================================================
"""
