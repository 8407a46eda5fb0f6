"""Vertical micro-batches: a block runs over slices of the batch while its weights stay where they are.

Only the block's inputs are kept for its backward, which runs every slice once more, last one first, as autograd itself
would. Gradients of weights are summed over the slices in fp32 and rounded once; what autograd sees is one operation.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular._core import BACKWARD
from funicular.errors import UsageError
from funicular.guard.classes import GuardedParameter, WindowParameter
from funicular.micro_batches.replay import Autocast, Randomness
from funicular.micro_batches.skip_last import Deferred, last_product
from funicular.micro_batches.slices import Outputs, arrange
from funicular.torch_internals.autograd import graph_is_kept, seen_by_others
from funicular.torch_internals.compiling import compilations, compiling, untraced
from funicular.torch_internals.modules import CALL, class_call, own_parameters
from funicular.torch_internals.overrides import unguarded
from funicular.units.dtypes import is_half
from funicular.units.param import link, ref_of
from funicular.units.unit import ModuleCall
from funicular.windows.leases import check_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from funicular.micro_batches.activations import Paged
    from funicular.micro_batches.slices import Call
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["MicroBatches"]

_OFF = 'or set activations.micro_batch = "off".'


def _plain_call(module: nn.Module) -> Any:
    """Return what calls a copied or pickled block: as any other module."""
    return types.MethodType(class_call(module), module)


class MicroBatches:
    """What calls a block: stands as ``_call_impl`` in it, so that its hooks and its ``forward`` stay the user's own."""

    def __init__(self, session: Session, module: nn.Module, units: tuple[Unit, ...], name: str, rows: int) -> None:
        self.session, self.units, self.name, self.rows = session, units, name, rows
        # Weak: the module holds this.
        self._module = weakref.ref(module)
        self._weights = {id(p) for p in module.parameters()}
        #: a block's weights are lent to one thread at a time
        self.lock = threading.RLock()
        #: whether nothing needed the values that ended the block when it was run again
        self.defers = True

    @classmethod
    def install(cls, session: Session, module: nn.Module, units: tuple[Unit, ...], name: str, rows: int) -> None:
        """Have a block run over slices of ``rows`` rows."""
        module.__dict__[CALL] = cls(session, module, units, name, rows)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Leave a model's blocks as they were."""
        for module in model.modules():
            if isinstance(module.__dict__.get(CALL), cls):
                del module.__dict__[CALL]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self._module()
        assert module is not None
        return _plain_call(memo.get(id(module), module))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_plain_call, (self._module(),))

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's forward over slices of the batch, or as it is where slices make no sense."""
        module: Any = self._module()
        if self.session.closed or not (torch.is_grad_enabled() or module.training) or seen_by_others():
            return class_call(module)(module, *args, **kwargs)
        self.session.alive()  # before the lock, which is never let go in a forked child
        with self.lock:
            # `functional_call` lends a block other weights: its gradients are that caller's.
            own = self._weights <= {id(p) for p in module.parameters()}
            with self._sliced_forward(module) if own else contextlib.nullcontext():
                return class_call(module)(module, *args, **kwargs)

    @contextlib.contextmanager
    def _sliced_forward(self, module: nn.Module) -> Iterator[None]:
        """Put the slices between the block's hooks and its forward, for the time of a call."""
        before = module.__dict__.get("forward")
        module.__dict__["forward"] = _Forward(self, module, module.forward)
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before

    @contextlib.contextmanager
    def windows(self) -> Iterator[None]:
        """Keep the block's windows open for the backward of all its slices."""
        session, visit = self.session, ModuleCall()
        try:
            with session.lock:
                for unit in self.units:
                    session.open(unit, BACKWARD)
                    unit.calls.append(visit)
            yield
        finally:
            with session.lock:
                for unit in self.units:
                    if visit in unit.calls:
                        unit.calls.remove(visit)


class _Forward:
    """A block's forward, slice by slice."""

    def __init__(self, block: MicroBatches, module: nn.Module, inner: Callable[..., Any]) -> None:
        self.block, self.module, self.inner = block, module, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = arrange(self.block.name, self.inner, args, kwargs, self.block.rows)
        if call is None:
            return self.inner(*args, **kwargs)
        params = [p for p in self.module.parameters() if p.requires_grad]
        run = _Run(self, call, params)
        outer = call.tensors
        if torch.is_grad_enabled() and (params or any(run.needs)):
            joined = _Sliced.apply(run, *outer, *params)  # type: ignore[no-untyped-call]
        else:
            # As in the first pass of a reentrant checkpoint: the numbers of the passes are the same.
            run.needs = [False] * len(outer)
            run.forward(graph=False)
            joined = tuple(run.outputs.tensors)
        return run.outputs.close(outer, joined)


class _Mark(torch.autograd.Function):
    """Does nothing: its node lives as long as the graph of a slice."""

    @staticmethod
    def forward(ctx: Any, token: _Token, x: torch.Tensor) -> torch.Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad


class _Token:
    """Something to hold a weak reference to."""


class _Sliced(torch.autograd.Function):
    """All slices of a block's call as one operation."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        kept = run.keep(given[: len(run.needs)])
        run.forward()
        ctx.save_for_backward(*kept)
        outputs = run.outputs
        fixed = [t for t, wanted in zip(outputs.tensors, outputs.differentiable, strict=True) if not wanted]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs.tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run: _Run = ctx.run
        if torch.is_grad_enabled():
            raise UsageError(
                "FN-E122",
                f"the block '{run.call.name}' runs in micro-batches and is differentiated once only; create_graph=True asks "
                f"for more. Leave it out, {_OFF}",
            )
        # Raises what torch raises for a second backward through a graph that was not kept.
        saved = ctx.saved_tensors
        return (None, *run.backward(list(saved), grads))


class _Run:
    """One call of a block: what its backward needs to run it again."""

    def __init__(self, forward: _Forward, call: Call, params: list[nn.Parameter]) -> None:
        self.block, self.module, self.inner = forward.block, forward.module, forward.inner
        self.call, self.params = call, params
        self.needs = [t.requires_grad and (t.is_floating_point() or t.is_complex()) for t in call.tensors]
        self.outputs = Outputs(call)
        self.autocast = Autocast(self.block.session.device)
        self.random = Randomness(self.block.session.device)
        self.paged: Paged | None = None
        self.held: list[tuple[torch.Tensor, int]] = []

    # ------------------------------------------------------------------ forward

    def forward(self, *, graph: bool = True) -> None:
        """Run every slice; its graph is built as in the backward, so that the same kernels run, and keeps nothing."""
        before, at_home = self._versions(), _at_home(self.module)
        for start, stop in self.call.bounds:
            self.random.before_slice()
            token, compiled = _Token(), compilations()
            with _lent(self.module, at_home) if at_home else contextlib.nullcontext():
                self._forward_slice(start, stop, token, graph)
            watch = weakref.ref(token)
            del token
            # While it compiles, torch may keep frames with everything in them; the next call is looked at again.
            if watch() is not None and compiled == compilations() and _still(watch):
                raise UsageError("FN-E121", self._refusal(
                    "a tensor that it made, with its graph, is kept by an attribute, a list or a hook. Its "
                    "gradient would be lost", "Return it from the block, or keep a .detach() of it",
                ))  # fmt: skip
        self.random.end()
        after = self._versions()
        self.call = self.call._replace(tensors=[])
        changed = [name for name, version in after.items() if before.get(name) != version]
        if changed:
            raise UsageError("FN-E121", self._refusal(
                f"its forward changes {changed[0]} in place, which would happen once per slice and again in backward",
                "Keep what it changes outside of the block",
            ))  # fmt: skip

    def _forward_slice(self, start: int, stop: int, token: _Token, graph: bool) -> None:
        parts = self.call.slice(start, stop)
        with torch.set_grad_enabled(graph), torch.autograd.graph.saved_tensors_hooks(_drop, self._dropped):
            pieces = [
                _Mark.apply(token, t.detach().requires_grad_()) if need else t  # type: ignore[no-untyped-call]
                for t, need in zip(parts, self.needs, strict=True)
            ]
            args, kwargs = self.call.arguments(pieces)
            result = self.inner(*args, **kwargs)
        self.outputs.add((start, stop), pieces, result)

    def _dropped(self, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:
            return kept
        raise UsageError("FN-E121", self._refusal("its forward runs a backward of its own", "Do that outside of the block"))  # fmt: skip

    def _versions(self) -> dict[str, int]:
        """Versions of what the block could change behind our back."""
        found: dict[str, torch.Tensor] = {f"its argument {i}": t for i, t in enumerate(self.call.tensors)}
        found.update((f"its parameter '{name}'", p) for name, p in self.module.named_parameters())
        found.update((f"its buffer '{name}'", b) for name, b in self.module.named_buffers())
        with unguarded():
            return {name: t._version for name, t in found.items() if not t.is_inference()}

    def _refusal(self, problem: str, action: str) -> str:
        return f"the block '{self.call.name}' cannot run in micro-batches: {problem}. {action}, {_OFF}"

    def keep(self, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Return what autograd is to keep until the backward.

        The first tensor waits in host memory where the policy says so. Where the library checkpoints this very block, its
        checkpoint holds the same tensors: they are kept past it, so that it has nothing to run again.
        """
        kept = list(given)
        activations = self.block.session.activations
        if activations is not None:
            self.paged = activations.keep(kept[0], self.call.bounds)
            if self.paged is not None:
                kept = kept[1:]
        if self.module.training and getattr(self.module, "gradient_checkpointing", False):
            self.held = [(t.detach(), t._version) for t in kept]
            return []
        return kept

    def _release(self) -> None:
        """Drop what autograd does not keep itself."""
        self.held = []
        if self.paged is not None:
            self.paged.drop()

    # ------------------------------------------------------------------ backward

    def backward(self, saved: list[torch.Tensor], grads: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """Run every slice again and return the gradients of arguments and weights."""
        sums = [_Sum() for _ in self.params]
        for t, version in self.held:
            check_version(f"{t.type()} {list(t.shape)}", t, version)
        inputs = _Inputs(self, [t for t, _ in self.held] or saved)
        block = self.block
        with block.lock, block.windows():
            params = self.params + [p for p in _at_home(self.module) if not p.requires_grad]
            with _lent(self.module, params) as lent:
                for index in reversed(range(len(self.call.bounds))):
                    self._backward_slice(index, inputs, grads)
                    # What follows the trained ones has no gradient.
                    for p, total in zip(lent, sums, strict=False):
                        total.add(p.grad, last=index == 0)
                        p.grad = None
        if not graph_is_kept():
            self._release()
        return inputs.grads + [total.take(p.dtype) for p, total in zip(self.params, sums, strict=True)]

    def _backward_slice(self, index: int, inputs: _Inputs, grads: tuple[torch.Tensor | None, ...]) -> None:
        start, stop = self.call.bounds[index]
        leaves = inputs.leaves(index)
        outputs = self._again(index, leaves)
        roots, seeds = [], []
        for output, grad in zip(outputs, grads, strict=True):
            if grad is not None and output.requires_grad:
                roots.append(output)
                seeds.append(grad.narrow(0, start, stop - start) if len(self.call.bounds) > 1 else grad)
        del outputs
        if roots:
            torch.autograd.backward(roots, seeds)
        inputs.take(leaves, index)

    def _again(self, index: int, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run a slice again, with its graph; what is not needed for that is not computed."""
        start, stop = self.call.bounds[index]
        args, kwargs = self.call.arguments(leaves)
        block, deferred = self.block, Deferred(self.block.session.poison)
        end = last_product(self.module) if block.defers else None
        with torch.enable_grad(), self.random.restored(index), self.autocast, deferred.after(end):
            result = self.inner(*args, **kwargs)
        outputs = self.outputs.check(result, stop - start)
        del result
        deferred.settle(outputs)
        block.defers &= not deferred.filled
        return outputs


def _still(watch: weakref.ref[_Token]) -> bool:
    """Whether something is alive that no cycle keeps so."""
    gc.collect()
    return watch() is not None


def _drop(tensor: torch.Tensor) -> torch.Tensor | None:
    """Keep nothing for a backward that will not be; the compiler of torch 2.4 runs one over imagined tensors while it compiles."""
    return tensor if compiling() else None


class _Inputs:
    """A block's arguments in its backward, slice by slice, and their gradients."""

    def __init__(self, run: _Run, saved: list[torch.Tensor]) -> None:
        self._call, self._needs, self._paged = run.call, run.needs, run.paged
        self._saved: list[torch.Tensor | None] = [*([None] if run.paged is not None else []), *saved]
        self.grads: list[torch.Tensor | None] = [None] * len(self._saved)
        self._shared: dict[int, _Sum] = {}

    def leaves(self, index: int) -> list[torch.Tensor]:
        """Return leaves over a slice."""
        start, stop = self._call.bounds[index]
        whole = stop - start == self._call.batch
        found = []
        for t, cut, need in zip(self._saved, self._call.cut, self._needs, strict=True):
            if t is None:
                assert self._paged is not None
                piece = self._paged.rows(index)
            else:
                piece = t.narrow(0, start, stop - start) if cut and not whole else t
            found.append(piece.detach().requires_grad_(need) if need else piece)
        return found

    def take(self, leaves: list[torch.Tensor], index: int) -> None:
        """Write the rows' gradients in their places; what is shared is summed."""
        start, stop = self._call.bounds[index]
        if self._paged is not None:
            self._paged.used(index)
        for i, (leaf, cut, need) in enumerate(zip(leaves, self._call.cut, self._needs, strict=True)):
            if not need:
                continue
            if len(self._call.bounds) == 1:
                self.grads[i] = leaf.grad
            elif not cut:
                total = self._shared.setdefault(i, _Sum())
                total.add(leaf.grad, last=start == 0)
                if start == 0:
                    self.grads[i] = total.take(leaf.dtype)
            elif leaf.grad is not None or self.grads[i] is not None:
                self._write(i, leaf, start, stop)

    def _write(self, i: int, leaf: torch.Tensor, start: int, stop: int) -> None:
        whole = self.grads[i]
        if whole is None:
            whole = self.grads[i] = leaf.new_zeros((self._call.batch, *leaf.shape[1:]))
        if leaf.grad is not None:
            whole.narrow(0, start, stop - start).copy_(leaf.grad)


class _Sum:
    """A gradient summed over slices: in fp32 where it has less, rounded once."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None

    def add(self, grad: torch.Tensor | None, *, last: bool) -> None:
        """Add a slice's part; ``last``: nothing follows."""
        total = self._total
        if grad is None:
            return
        if total is None:
            self._total = grad  # alone, it is what it is
        elif not is_half(grad.dtype):
            total.add_(grad)
        elif last:
            # The kernel adds in fp32 and rounds what it writes: nothing of fp32 passes through memory.
            self._total = torch.add(total, grad, out=grad)
        else:
            self._total = (total.float() if total.dtype == grad.dtype else total).add_(grad)

    def take(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Give the sum away, in a parameter's number format."""
        total, self._total = self._total, None
        return None if total is None else total.to(dtype)


def _leaf(p: nn.Parameter) -> nn.Parameter:
    """Return a leaf over a weight, of the class that weights have in their windows: graphs do not tell them apart."""
    inside = isinstance(p, WindowParameter)
    if inside:
        with unguarded():
            leaf = nn.Parameter(torch.Tensor.detach(p), p.requires_grad)
    else:
        leaf = nn.Parameter(p.detach(), p.requires_grad)
    ref = ref_of(p)
    if ref is not None:
        link(leaf, ref)
        leaf._funicular_inside = ref.unit.inside if inside else {threading.get_ident(): 0}  # type: ignore[attr-defined]
        leaf.__class__ = ref.window
    return leaf


@contextlib.contextmanager
def _lent(module: nn.Module, params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Let a block compute with leaves of its own over some weights, whose gradients and hooks are not the weights'."""
    lent = {id(p): _leaf(p) for p in params}
    places = [
        (m, name, p)
        for m in module.modules()
        for name, p in own_parameters(m).items()
        if p is not None and id(p) in lent
    ]
    try:
        for m, name, p in places:
            setattr(m, name, lent[id(p)])
        yield [lent[id(p)] for p in params]
    finally:
        for m, name, p in places:
            setattr(m, name, p)


def _at_home(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are used from their home: guarded, where the block would better see plain ones."""
    return [p for p in module.parameters() if isinstance(p, GuardedParameter) and not isinstance(p, WindowParameter)]
