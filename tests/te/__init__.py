"""A contract with Transformer Engine's Python, over a twin of its extension: see tests/test_transformer_engine.py."""
