"""Code that planted modules import in their backend's process, because it is too long for the text of an edit.

A file's name begins with the framework that it uses. Nothing else imports these files (`tests/test_architecture.py`).
"""
