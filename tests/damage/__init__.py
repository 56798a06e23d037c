"""Damaged inputs, drawn from a seed: what a user, an editor, a download or another program can make of a file.

Every function `damage_...` writes the files of a case into a directory of its own and gives the command line that reads
them; `cases.py` has them by name, `judge.py` runs them and says what is wrong with how they end.
A package, so that `tokenizers.py` beside this file never hides the library of that name.
"""
