"""A contract with Transformer Engine's Python, over a twin of its compiled extension. Run by test_transformer_engine."""
