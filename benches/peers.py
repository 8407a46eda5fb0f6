"""What a user would run instead, each if it is installed: the CPU offloads of PyTorch's FSDP2, of torchao and of DeepSpeed.

Each function takes a model on the device, in bf16, and AdamW's options, and returns what computes the loss and what updates.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["PEERS"]


def one_process() -> None:
    """A process group of this process alone, as sharding asks for one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)


def fsdp2(model: nn.Module, hyper: dict[str, Any]) -> tuple[nn.Module, Any]:
    """PyTorch's own sharding with its CPU offload; fp32 masters on the host."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return sharded(model.to("cpu"), hyper, offload_policy=CPUOffloadPolicy())


def fsdp2_hbm(model: nn.Module, hyper: dict[str, Any]) -> tuple[nn.Module, Any]:
    """PyTorch's own sharding with everything on the GPUs; fp32 masters there too."""
    return sharded(model, hyper)


def sharded(model: nn.Module, hyper: dict[str, Any], **options: Any) -> tuple[nn.Module, Any]:
    """Each block a group of its own, in bf16 over fp32 masters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    one_process()
    model = model.float()
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), fused=True, **hyper)


def torchao(model: nn.Module, hyper: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Torchao's offloaded optimizer: weights stay on the GPU, moments are bf16, there is no master: other arithmetic."""
    from torchao.optim import CPUOffloadOptimizer

    return model, TorchaoAdamW(CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **hyper))


class TorchaoAdamW:
    """Gradients leave during backward, so that nothing can clip them."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def clip(self, max_norm: float) -> None:
        """It cannot."""

    def norm(self) -> Tensor:
        """None is known."""
        return torch.zeros(())

    def step(self) -> None:
        self.opt.step()

    def zero_grad(self) -> None:
        self.opt.zero_grad()


def deepspeed(model: nn.Module, hyper: dict[str, Any]) -> tuple[nn.Module, Any]:
    """ZeRO-3 with parameters and optimizer on the CPU, in its defaults; fp32 masters on the host."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29512")
    import deepspeed as ds

    one_process()
    on_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        # Of this model's own loop; the engine only divides by the number of accumulated backwards.
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": hyper}, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 3, "offload_param": on_cpu, "offload_optimizer": on_cpu},
    }  # fmt: skip
    engine, *_ = ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine, DeepSpeedAdamW(engine)


class DeepSpeedAdamW:
    """The engine's own backward, clipping and step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def clip(self, max_norm: float) -> None:
        """In the step."""
        self.engine.optimizer.clip_grad = max_norm

    def norm(self) -> Tensor:
        """Of the last step's gradients."""
        return torch.as_tensor(float(self.engine.get_global_grad_norm()))

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """Done by the step."""


PEERS = {"fsdp2": fsdp2, "fsdp2_hbm": fsdp2_hbm, "torchao": torchao, "deepspeed": deepspeed}
