"""What runs on GitHub with a token that can write: the standard library alone.

=========== ================================================================
github      GitHub's REST API
gate        which pull requests are tested, and what they say of it
watch       the issue on the newest release of SGLang
publish     the release of a tag
=========== ================================================================

A token that can write is in no process, and in no job, that runs anything else: what
needs more is done in another job, and its result is handed on as a file.
"""
