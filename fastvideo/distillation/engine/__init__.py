"""Infrastructure: processes, optimizers, checkpoints, metrics. The only folder that may import torch.distributed."""
