"""What transformers itself says of chats: tokenizers, templates and conversations, and the test that compares.

A package, so that `tokenizers.py` beside this file never hides the library of that name.
"""
