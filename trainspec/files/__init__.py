"""What is on disk in formats of others: Hugging Face directories, PEFT adapters, safetensors files."""
