"""The verdict of runs that are there: their bounds measured, both sides compared, the report written; of one check or of many."""
