"""The PyTorch backend: Hugging Face models, PEFT, DeepSpeed. Trains what trainspec says."""
