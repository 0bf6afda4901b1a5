"""What PyTorch writes: `torch.save` files and checkpoints of torch.distributed.checkpoint, read without torch and without unpickling."""
