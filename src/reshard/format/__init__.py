"""The contract of Checkpoint 2.0 on disk: names, metadata, common information, extras, tracker, safetensors files."""
