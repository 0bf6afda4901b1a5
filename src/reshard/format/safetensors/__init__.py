"""safetensors files: the header, reading it with every offset checked, and writing a file without copying its tensors."""

from reshard.format.safetensors.block_check import BlockCheck, check_bytes, count_whole
from reshard.format.safetensors.header import Header, TensorEntry
from reshard.format.safetensors.parsing import parse_header
from reshard.format.safetensors.planned import PlannedHeader, plan_columns, plan_header
from reshard.format.safetensors.reader import read_header, read_start
from reshard.format.safetensors.writer import StreamedArray, write_tensors

__all__ = [
    "BlockCheck",
    "Header",
    "PlannedHeader",
    "StreamedArray",
    "TensorEntry",
    "check_bytes",
    "count_whole",
    "parse_header",
    "plan_columns",
    "plan_header",
    "read_header",
    "read_start",
    "write_tensors",
]
