"""What runs on GitHub: the standard library alone.

=========== ================================================================
github      GitHub's REST API
gate        which pull requests are tested, and what they say of it
=========== ================================================================
"""
