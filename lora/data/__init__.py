"""From rows of a file to packed batches: reading, labels, tokens, splits. Padding never leaves this room."""
