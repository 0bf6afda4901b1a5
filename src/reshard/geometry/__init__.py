"""The one vocabulary of place: regions, meshes, layouts, and the dtypes of what lies there."""

from reshard.geometry.dtypes import DType
from reshard.geometry.layout import Layout, Mesh
from reshard.geometry.region import Region

__all__ = ["DType", "Layout", "Mesh", "Region"]
