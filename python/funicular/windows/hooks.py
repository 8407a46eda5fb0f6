"""Module hooks: a unit's window opens before its modules' forward and closes after it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular._core import BACKWARD, EVAL, FORWARD
from funicular.torch_internals.autograd import in_backward
from funicular.torch_internals.compiling import (
    compile_forward,
    keep_out,
    not_captured,
    scripted,
    untraced,
    untraced_itself,
)
from funicular.torch_internals.modules import (
    CALL,
    call_of,
    compiled_call_of,
    hook_tables,
    on_load,
    own_parameters,
    pre_hooks,
    set_compiled_call,
)
from funicular.torch_internals.saved_hooks import pop, push, top
from funicular.torch_internals.trees import tree_leaves, tree_map
from funicular.units.unit import ModuleCall
from funicular.windows.moved_by_others import refuse_added, warn_of_frozen
from funicular.windows.replaced import check_replaced
from funicular.windows.signals import refuse

if TYPE_CHECKING:
    from funicular.torch_internals.saved_hooks import Pair
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["AssignHook", "ModuleHooks", "RootHooks", "counts_hooks", "remove_hooks"]

_local = threading.local()


def _inert(*args: Any, **kwargs: Any) -> None:
    """Stands in for a hook on a copied model."""


class _Hook:
    """A callable bound to a session; a copied or pickled model gets one that does nothing."""

    session: Session

    @property
    def __name__(self) -> str:
        if scripted():
            raise not_captured()
        kind: type = type(self)
        return kind.__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> tuple[Any, ...]:
        return (_get_inert, ())


def _get_inert() -> Any:
    return _inert


def _stack() -> list[_Call]:
    """Return the calls of hooked modules under way in this thread."""
    if not hasattr(_local, "stack"):
        _local.stack = []
    return _local.stack  # type: ignore[no-any-return]


class _Call(ModuleCall):
    """One call of a hooked module: what has been done for it, noted in such an order that it can be undone after any interruption."""

    __slots__ = ("enter", "pair", "range", "units")

    def __init__(self, enter: _Enter) -> None:
        super().__init__()
        self.enter = enter
        self.units: list[Unit] = []
        self.pair: Pair | None = None
        self.range: Any = None

    def push_hooks(self) -> None:
        self.pair = self.enter.session.leases.pair()
        if self.pair is not None:
            push(*self.pair)

    def pop_hooks(self) -> None:
        pair = self.pair
        if pair is None:
            return
        found = top()
        # Asked once more: a signal handler that runs the model may have popped it. None can come between this and the pop.
        if self.pair is pair and found and found[0] is pair[0]:
            pop()
        self.pair = None

    def leave(self) -> None:
        """End the windows; may be called again after an interruption."""
        self.pop_hooks()
        session = self.enter.session
        with session.lock:
            while self.units:
                unit = self.units[-1]
                unit.leave(self)
                self.units.pop()
                if unit.depth == 0 and not in_backward():
                    session.close(unit)
        started, self.range = self.range, None
        session.ranges.end(started)


def _unwind(stack: list[_Call], depth: int) -> None:
    """End the calls that were begun since the stack had this depth. A signal handler that runs the model may end them meanwhile."""
    for call in reversed(stack[depth:]):
        call.leave()
        with contextlib.suppress(ValueError):
            stack.remove(call)


class _Enter(_Hook):
    def __init__(self, session: Session, units: tuple[Unit, ...]) -> None:
        self.session, self.units = session, units
        self.name = ", ".join(unit.name for unit in units)

    # Of a hook that another thread has removed meanwhile, by unwrapping the model, torch no longer knows that it takes keyword arguments.
    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        refuse(self.session, "a forward")
        phase = BACKWARD if in_backward() else FORWARD if torch.is_grad_enabled() else EVAL
        if phase == FORWARD and self.session.trained != self.session.log.step:
            refuse_added(self.session)
            if not self.session.trained:
                warn_of_frozen(self.session)
            self.session.trained = self.session.log.step
        call = _Call(self)
        _stack().append(call)
        call.range = self.session.ranges.start(f"{self.name} {'recompute' if phase == BACKWARD else 'forward'}")
        with self.session.lock:
            for unit in () if self.session.unwrapped else self.units:
                if unit.depth == 0 or unit.is_open:
                    self.session.open(unit, phase)
                call.units.append(unit)
                unit.calls.append(call)
        if torch.is_grad_enabled():
            call.push_hooks()
        if call not in _stack():
            call.leave()  # a signal handler ran the model, which gave this call up


class _Leave(_Hook):
    def __init__(self, session: Session, units: tuple[Unit, ...], enter: _Enter) -> None:
        self.session, self.units, self.enter = session, units, enter

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)  # as for `_Enter`
        stack = _stack()
        depth = len(stack) - 1
        call = next(iter(stack[-1:]), None)
        if call is None or call.enter is not self.enter:
            return None  # its window was never opened, or has been given up
        call.pop_hooks()
        try:
            return self._replace(args, kwargs, output)
        finally:
            _unwind(stack, depth)

    def _replace(self, args: Any, kwargs: Any, output: Any) -> Any:
        replaced = None
        if output is not None:
            replaced = self._detach_from_frames(output)
            if not in_backward() and torch.is_grad_enabled():
                self._hint_backward(args, kwargs, output if replaced is None else replaced)
        return replaced

    def _detach_from_frames(self, output: Any) -> Any:
        """Return the output with views of frames replaced by copies; None if there are none."""
        leaves = tree_leaves(output)
        if not any(isinstance(t, torch.Tensor) and self._escapes(t) for t in leaves):
            return None
        return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) and self._escapes(t) else t, output)

    def _escapes(self, t: torch.Tensor) -> bool:
        if isinstance(t, nn.Parameter):
            return False
        owner = self.session.leases.owner(t)
        return owner is not None and owner.unit.is_open

    def _hint_backward(self, args: Any, kwargs: Any, output: Any) -> None:
        """Open the window when the backward reaches the outputs: a hint only, since saved tensors open it in any case."""
        inputs = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(output):
            if isinstance(t, torch.Tensor) and t.requires_grad and not t.is_leaf and id(t) not in inputs:
                hooked: Any = t
                hooked.register_hook(_Hint(self.session, self.units))


class _Hint(_Hook):
    def __init__(self, session: Session, units: tuple[Unit, ...]) -> None:
        self.session, self.units = session, units

    def __call__(self, grad: torch.Tensor) -> None:
        if not self.session.closed:
            for unit in self.units:
                self.session.open_for_backward(unit)


class _Around:
    """Around a module's call: what ended it, all that was begun in it is ended. Hooks do not hear of Ctrl-C, ``always_call`` or not.

    It sits where ``Module.compile`` puts its result, which no copy and no pickle takes along.
    """

    def __init__(self, session: Session, module: nn.Module) -> None:
        # Weak, as the session holds this.
        self.session = weakref.ref(session)
        self.module = weakref.ref(module)
        self.compiled = compiled_call_of(module)

    @untraced_itself
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        keep_out()
        stack = _stack()
        depth = len(stack)
        module: Any = self.module()
        call = call_of(module) if self.compiled is None else self.compiled
        quiet = module.__dict__.get(_QUIET)
        try:
            return call(*args, **kwargs) if quiet is None else _between(quiet, module, call, args, kwargs)
        except BaseException:
            _unwind(stack, depth)
            session = self.session()
            # A signal handler's call that was refused leaves what it struck as it is.
            if session is not None and depth == 0 and not in_backward() and not session.busy():
                session.recover()
            raise

    def remove(self) -> None:
        module = self.module()
        if module is not None and compiled_call_of(module) is self:
            set_compiled_call(module, self.compiled)


def _compile_forward(session: Session, module: nn.Module) -> None:
    """Move what ``Module.compile`` compiled inwards, behind the windows."""
    around = compiled_call_of(module)
    compiled = around.compiled if isinstance(around, _Around) else around
    if compiled is not None and compile_forward(module, compiled):
        set_compiled_call(module, None)
    _surround(session, module)


class ModuleHooks:
    """The pair of hooks of one module."""

    @staticmethod
    def install(session: Session, module: nn.Module, units: tuple[Unit, ...], *, quiet: bool = False) -> None:
        """Register them: ours run before and after the user's. ``quiet``: around the call, where code that counts hooks sees none."""
        enter = _Enter(session, units)
        leave = _Leave(session, units, enter)
        if quiet:
            _quietly(module, enter, leave)
        else:
            session.handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            session.handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        _surround(session, module)


#: attribute of modules whose hooks are run by what is around their call, the outermost first
_QUIET = "_funicular_quiet_hooks"


def _quietly(module: nn.Module, enter: _Hook, leave: _Hook) -> None:
    module.__dict__[_QUIET] = ((enter, leave), *module.__dict__.get(_QUIET, ()))


@untraced_itself
def _between(hooks: Any, module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
    """Call a module between its quiet hooks."""
    for enter, _ in hooks:
        enter(module, args, kwargs)
    output = call(*args, **kwargs)
    for _, leave in reversed(hooks):
        replaced = leave(module, args, kwargs, output)
        output = output if replaced is None else replaced
    return output


def counts_hooks(model: nn.Module) -> set[int]:
    """Return the modules whose hooks torch counts: an encoder layer that finds any, in itself or inside, leaves its fast path."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return {id(m) for layer in layers for m in layer.modules()}


def _surround(session: Session, module: nn.Module) -> None:
    if not isinstance(compiled_call_of(module), _Around):
        around = _Around(session, module)
        session.handles.append(around)
        set_compiled_call(module, around)


class AssignHook(_Hook):
    """``load_state_dict(assign=True)`` copies into paged parameters: replaced, they would leave the runtime unnoticed."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @staticmethod
    def install(session: Session, module: nn.Module) -> None:
        """Register it."""
        session.handles.append(on_load(module, AssignHook(session)))

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Refuse entries of another number format, as ``load_state_dict(assign=True)`` would put them in the parameters' place."""
        if not local_metadata.pop("assign_to_params_buffers", False):
            return
        for name, p in own_parameters(module).items():
            given = state_dict.get(prefix + name)
            if p is not None and isinstance(given, torch.Tensor) and given.dtype != p.dtype:
                errors.append(
                    f"FN-E115 '{prefix}{name}' is offloaded as {p.dtype} and cannot become {given.dtype}. Call "
                    "funicular.unwrap(model) first."
                )


def remove_hooks(session: Session, model: nn.Module) -> None:
    """Remove what a session hung on modules, also what an interruption kept out of its list of handles."""
    for module in model.modules():
        module.__dict__.pop(_QUIET, None)
        for hooks, others in hook_tables(module):
            for key, hook in list(hooks.items()):
                hook = getattr(hook, "hook", hook)  # torch wraps some
                if isinstance(hook, _Hook) and hook.session is session:
                    for marks in (hooks, *others):
                        marks.pop(key, None)


class _EnterRoot(_Hook):
    def __init__(self, session: Session, model: nn.Module) -> None:
        self.session = session
        # Weak: they hold this. What has hooks of the runtime, and what runs in micro-batches.
        ours = [m for m in model.modules() if CALL in m.__dict__ or _has_window(m)]
        self.hooked = [weakref.ref(m) for m in ours if m is not model]
        self.running = threading.local()

    @untraced
    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if in_backward():
            return
        refuse(self.session, "a forward")  # before what is under way is taken for a forward that ended
        keep_out()
        check_replaced(self.session)
        for ref in self.hooked:
            hooked = ref()
            if hooked is not None:
                _compile_forward(self.session, hooked)
        if getattr(self.running, "depth", 0) > 0:
            # An earlier forward ended without its hooks, as when the module was compiled in the meantime.
            _unwind(_stack(), 0)
            self.session.recover()
        self.running.depth = 1


def _has_window(module: nn.Module) -> bool:
    quiet = (enter for enter, _ in module.__dict__.get(_QUIET, ()))
    return any(isinstance(hook, _Enter) for hook in (*pre_hooks(module).values(), *quiet))


class _LeaveRoot(_Hook):
    def __init__(self, enter: _EnterRoot) -> None:
        self.session, self.enter = enter.session, enter

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.enter.running.depth = 0


class RootHooks:
    """Hooks of the whole model, which notice a forward that was interrupted."""

    @staticmethod
    def install(session: Session, model: nn.Module, *, quiet: bool = False) -> None:
        """Register them."""
        keep_out(load=True)
        enter = _EnterRoot(session, model)
        leave = _LeaveRoot(enter)
        if quiet:
            _quietly(model, enter, leave)
        else:
            session.handles.append(model.register_forward_pre_hook(enter, prepend=True))
            session.handles.append(model.register_forward_hook(leave, always_call=True))
        _surround(session, model)
