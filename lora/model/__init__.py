"""The model: blocks, decoder, heads, adapters, merging, loading and saving."""
