"""Hugging Face's layout of a model, both ways: names, tensors in files, config.json and the tokenizer's files."""
