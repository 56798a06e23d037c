"""What to train: the neutral half of twintrain. Imports neither JAX nor torch."""

# Registers bfloat16 with numpy, and so with safetensors: checkpoints and traces may hold it.
import ml_dtypes as ml_dtypes
