"""The reference trainer: a Qwen3 under any combination of data, tensor, pipeline and expert parallelism, as `reshard train` runs it."""
