"""safetensors files: the header, reading it with every offset checked, and writing a file without copying its tensors."""

from reshard.format.safetensors.header import Header, PlannedHeader, TensorEntry, check_tensor, parse_header, plan_header
from reshard.format.safetensors.reader import read_header, read_start
from reshard.format.safetensors.writer import write_tensors

__all__ = [
    "Header",
    "PlannedHeader",
    "TensorEntry",
    "check_tensor",
    "parse_header",
    "plan_header",
    "read_header",
    "read_start",
    "write_tensors",
]
