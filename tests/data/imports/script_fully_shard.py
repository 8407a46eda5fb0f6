import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

mp = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for block in model.blocks:
    fully_shard(block, mp_policy=mp, offload_policy=CPUOffloadPolicy(pin_memory=True))
fully_shard(model, mp_policy=mp, offload_policy=CPUOffloadPolicy(pin_memory=True))
