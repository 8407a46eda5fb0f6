"""The AdamW step of docs/arithmetic.md in plain torch: the same bits as the CPU and CUDA kernels.

It imports nothing of the package, not its table of number formats either: it judges the rest, and runs without the extension module.
Slow, and meant for tests: every line is one elementwise operation that rounds once. Two of torch's own operations do
not round correctly and are avoided: `torch.sqrt` of fp32 on the CPU (off by one unit in the last place for one value in
six) and division by a Python number on CUDA (a multiplication by the reciprocal).
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "Hyper",
    "ReferenceAdamW",
    "adamw_step",
    "backward_of_ranks",
    "hyper",
    "join_master",
    "mean_of_ranks",
    "norm_sq",
    "split_master",
]

NORM_BLOCK = 8192
"""Elements per partial sum of a norm."""
NORM_LANES = 32
"""Interleaved sums in a block of a norm."""

_NAN32 = 0x7FC0_0000
_NAN16 = 0x7E00


class Hyper(NamedTuple):
    """The scalars of one step: computed in fp64, each rounded once to fp32."""

    decay: float
    lerp_coeff: float
    lerp_from_grad: bool
    beta2: float
    one_minus_beta2: float
    bias_correction2_sqrt: float
    step_size: float
    eps: float
    grad_factor: float
    clip: float


def _f32(value: float) -> float:
    return ctypes.c_float(value).value


def hyper(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip: float = 1.0,
) -> Hyper:
    """Scalars of step number `step`, which counts from 1. `grad_scale` multiplies the gradient, after `clip` did."""
    beta1, beta2 = betas
    from_grad = 1 - beta1 >= 0.5
    return Hyper(
        decay=_f32(1 - lr * weight_decay),
        lerp_coeff=_f32(-beta1 if from_grad else 1 - beta1),
        lerp_from_grad=from_grad,
        beta2=_f32(beta2),
        one_minus_beta2=_f32(1 - beta2),
        bias_correction2_sqrt=_f32(math.sqrt(1 - beta2 ** float(step))),
        step_size=_f32(lr / (1 - beta1 ** float(step))),
        eps=_f32(eps),
        grad_factor=_f32(-grad_scale if maximize else grad_scale),
        clip=_f32(clip),
    )


def _canonical(x: Tensor) -> Tensor:
    """fp32 `x` with every NaN as 0x7fc00000: the processors disagree on sign and payload."""
    return x.view(torch.int32).masked_fill(x.isnan(), _NAN32).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Cut fp32 into its high half, rounded half up, and the signed rest: `(bf16, int16)`."""
    if master.dtype != torch.float32:
        raise TypeError(f"split_master takes fp32, not {master.dtype}")
    bits = _canonical(master.contiguous()).view(torch.int32)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    low = bits.to(torch.int16)
    return high, low


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """Restore the fp32 values that `split_master` cut, bit for bit."""
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        raise TypeError(f"join_master takes bf16 and int16, not {high.dtype} and {low.dtype}")
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def _moments_and_weight(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, h: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    if h.clip != 1:
        grad = (grad.to(torch.float32) * h.clip).to(grad.dtype)
    g = grad.to(torch.float32) * h.grad_factor
    w = w * h.decay
    delta = (g - m) * h.lerp_coeff
    m = (g if h.lerp_from_grad else m) + delta
    first = v * h.beta2
    second = (g * h.one_minus_beta2) * g
    v = first + second
    root = v.double().sqrt().to(torch.float32)
    denom = root / torch.tensor(h.bias_correction2_sqrt, dtype=torch.float32, device=w.device)
    denom = denom + h.eps
    scaled = m * h.step_size
    quotient = scaled / denom
    return _canonical(w - quotient), _canonical(m), _canonical(v)


@torch.no_grad()
def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip: float = 1.0,
    reset_master: bool = False,
) -> None:
    """One step, in place.

    Parameters
    ----------
    param
        fp32, bf16 or fp16.
    grad
        Same type and shape as `param`.
    exp_avg, exp_avg_sq
        First and second moment, fp32.
    master
        None for fp32, the int16 rest for bf16, the fp32 value for fp16.
    lr, betas, eps, weight_decay, maximize
        As in `torch.optim.AdamW`.
    step
        Number of this step, from 1.
    grad_scale
        Multiplies the gradient.
    clip
        Multiplies the gradient first, rounded to its type, as ``grad.mul_(clip)`` would.
    reset_master
        The weight was edited: start from `param` alone.
    """
    h = hyper(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        maximize=maximize,
        grad_scale=grad_scale,
        clip=clip,
    )
    if grad.dtype != param.dtype:
        raise TypeError(f"the gradient is {grad.dtype}, its parameter {param.dtype}")
    if param.dtype == torch.float32:
        w = param
    elif master is None:
        raise ValueError(f"a {param.dtype} parameter needs its master")
    elif reset_master:
        w = param.to(torch.float32)
    elif param.dtype == torch.bfloat16:
        w = join_master(param, master)
    elif param.dtype == torch.float16:
        w = master
    else:
        raise TypeError(f"no AdamW for {param.dtype}")
    w, m, v = _moments_and_weight(w, grad, exp_avg, exp_avg_sq, h)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if param.dtype == torch.float32 or master is None:
        param.copy_(w)
    elif param.dtype == torch.bfloat16:
        high, low = split_master(w)
        param.copy_(high)
        master.copy_(low)
    else:
        half = w.to(torch.float16).view(torch.int16).masked_fill(w.isnan(), _NAN16)
        param.copy_(half.view(torch.float16))
        master.copy_(w)


def _tree(lanes: Tensor) -> Tensor:
    """Sum the last dimension, of `NORM_LANES`, by halving."""
    width = NORM_LANES // 2
    while width:
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
        width //= 2
    return lanes[..., 0]


def _padded(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % multiple))


@torch.no_grad()
def norm_sq(x: Tensor) -> float:
    """Sum of squares in fp64 in the order of docs/arithmetic.md. Finite exactly where every element is."""
    if x.numel() == 0:
        return 0.0
    rows = _padded(x.flatten().to(torch.float64), NORM_BLOCK).view(-1, NORM_BLOCK // NORM_LANES, NORM_LANES)
    lanes = torch.zeros_like(rows[:, 0])
    for i in range(rows.shape[1]):
        lanes = lanes + rows[:, i] * rows[:, i]
    partials = _padded(_tree(lanes), NORM_LANES).view(-1, NORM_LANES)
    total = torch.zeros_like(partials[0])
    for row in partials:
        total = total + row
    return float(_tree(total))


@torch.no_grad()
def mean_of_ranks(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Mean of what each rank has of one gradient: summed in fp32 ascending by rank, divided by the number of ranks, rounded once.

    A rank without one adds nothing, and counts. None if no rank has one.
    """
    present = [piece for piece in pieces if piece is not None]
    if not present:
        return None
    total = present[0].to(torch.float32)
    for piece in present[1:]:
        total = total + piece.to(torch.float32)
    ranks = torch.tensor(float(len(pieces)), dtype=torch.float32, device=total.device)
    return (total / ranks).to(present[0].dtype)


def backward_of_ranks(
    parameters: Iterable[Tensor], losses: Sequence[Callable[[], Tensor] | None]
) -> list[Tensor | None]:
    """Do to gradients what one backward on each of several ranks does, in one process.

    Each rank's loss is computed, and its backward run, one after the other; each parameter's gradient is the mean over ranks, or that is added to
    it as torch adds. What an offloaded model on so many ranks must equal, bit for bit.

    Parameters
    ----------
    parameters
        Those of the model.
    losses
        For each rank a function that computes its loss; None for a rank that has no backward.

    Returns
    -------
    list of Tensor or None
        Each rank's loss.
    """
    parameters = list(parameters)
    before = [p.grad for p in parameters]
    found, pieces = [], []
    for loss in losses:
        for p in parameters:
            p.grad = None
        found.append(None if loss is None else loss())
        if found[-1] is not None:
            torch.autograd.backward(found[-1])
        pieces.append([p.grad for p in parameters])
    for p, old, of_ranks in zip(parameters, before, zip(*pieces, strict=True), strict=True):
        mean = mean_of_ranks(of_ranks)
        p.grad = old if mean is None else mean if old is None else old.add_(mean)
    return found


class ReferenceAdamW(torch.optim.Optimizer):
    """Steps a plain torch model with `adamw_step`; what an offloaded model must equal, bit for bit.

    A parameter that was edited in place between two steps starts its master anew, as an offloaded one does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self.grad_scale = 1.0
        """Multiplies every gradient of the next steps."""
        self._seen: dict[Tensor, tuple[int, Tensor]] = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, without torch's cast of the moments to the parameters' type."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for param, key in zip(params, ids, strict=True):
            if given := state_dict["state"].get(key):
                state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
                state["step"] = int(given["step"])
                state.setdefault("master", _first_master(param))
                self.state[param] = state
                # The master belongs to the parameter's present value, however that came about: weights are loaded
                # first.
                self._seen[param] = (param._version, param.detach().clone())

    def _step_one(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            state["master"] = _first_master(param)
        state["step"] += 1
        assert param.grad is not None
        adamw_step(
            param,
            param.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["master"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"],
            maximize=group["maximize"],
            grad_scale=self.grad_scale,
            reset_master=self._edited(param),
        )
        self._seen[param] = (param._version, param.detach().clone())

    def _edited(self, param: Tensor) -> bool:
        """Whether `param` was edited since its last step, also through `param.data`, which leaves no trace but bits."""
        if param not in self._seen:
            return False
        version, value = self._seen[param]
        return version != param._version or not torch.equal(_bytes(value), _bytes(param.detach()))


def _first_master(param: Tensor) -> Tensor | None:
    if param.dtype == torch.bfloat16:
        return torch.zeros_like(param, dtype=torch.int16)
    if param.dtype == torch.float16:
        return param.detach().to(torch.float32)
    return None


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
