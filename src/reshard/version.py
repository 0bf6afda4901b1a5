"""The version of this package: read by the build, the command and the files that are written."""

__version__ = "0.1.0"
