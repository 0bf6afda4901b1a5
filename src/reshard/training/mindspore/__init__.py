"""The reference trainer under MindSpore: a dense Qwen3 with the names of MindSpore Transformers, by data parallelism under msrun."""
