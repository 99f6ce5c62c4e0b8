"""What a model is: its sizes, read from config.json in any spelling and held against its family contract."""

from lora.spec.layouts import canonical_name, is_skipped, layout_of, stored_name
from lora.spec.model_spec import ModelSpec
from lora.spec.read import read_spec
from lora.spec.sizes import check_named_size, size_hub, size_names, size_spec
from lora.spec.tensors import adaptable_modules, parameter_count, tensor_shapes

__all__ = [
    "ModelSpec",
    "adaptable_modules",
    "canonical_name",
    "check_named_size",
    "is_skipped",
    "layout_of",
    "parameter_count",
    "read_spec",
    "size_hub",
    "size_names",
    "size_spec",
    "stored_name",
    "tensor_shapes",
]
