"""Operations in blocks that stay in a CPU's caches, on all of its cores; lora/ops defines what they are."""
