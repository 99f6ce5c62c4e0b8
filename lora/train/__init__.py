"""Training: optimizer, schedule, step, loop, and the run that `lora.finetune` makes of them."""
