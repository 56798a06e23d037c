"""Files in formats of others: Hugging Face directories, PEFT adapters, safetensors files."""
