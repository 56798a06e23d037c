"""From files of records to token ids: shapes of records, chat templates, what of a text is learnt, and the cache.

Tokenizers and templates are transformers' own. transformers loads torch where it is installed, so `encode.py` and
`fill.py` are imported by `worker.py` alone, a process of its own that `process.py` starts when the cache has no answer.
"""
