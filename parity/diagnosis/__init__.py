"""From a failed comparison to a diagnosis: facts drawn from the two traces, the causes that fit them, what to run next."""

from parity.diagnosis.diagnosis import Diagnosis, diagnose
from parity.diagnosis.view import counts_of

__all__ = ["Diagnosis", "counts_of", "diagnose"]
