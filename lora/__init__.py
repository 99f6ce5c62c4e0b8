"""Fine-tune Qwen models with LoRA, with nothing between you and the arithmetic but NumPy and CuPy."""

__version__ = "0.1.0"
