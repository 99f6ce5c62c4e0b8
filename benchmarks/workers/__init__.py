"""What runs in a process of its own, so that time and memory are of one library alone."""
