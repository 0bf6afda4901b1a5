"""The reference trainer: a Qwen3 under any combination of data, tensor and pipeline parallelism, as `reshard train` runs it."""
