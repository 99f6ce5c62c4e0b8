"""Operations: one file each, forward beside backward, simple enough to be read as the definition."""
