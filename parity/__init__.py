"""The proof: runs both backends as subprocesses and compares their traces. Imports trainspec only."""
