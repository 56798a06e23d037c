"""Code that planted modules import, in the process of their backend: what is too long for the text of an edit.

The beginning of a file's name says whose framework it uses. Nothing else imports these (`tests/test_architecture.py`).
"""
