"""Text of any source as a stream of documents."""
