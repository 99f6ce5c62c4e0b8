"""Files in and out: checkpoints and adapters, checked on the way in, whole or absent on the way out."""
