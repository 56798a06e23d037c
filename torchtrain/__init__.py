"""The PyTorch backend: Hugging Face models, PEFT, DeepSpeed. Trains what trainspec says."""

import os

# Threads that spin while they wait take the core from those that work, on a busy machine up to five times the wall
# time. Read by the OpenMP runtime when torch is loaded, so it has to be said here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
