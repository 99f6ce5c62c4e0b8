"""Operations that launch the kernels of kernels/*.cu: the signatures and records of `lora.ops`."""
