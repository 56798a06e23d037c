"""What to train: the neutral half of twintrain. Imports neither JAX nor torch."""

# Teaches numpy, and safetensors with it, the type bfloat16: checkpoints and traces hold it.
import ml_dtypes as ml_dtypes
