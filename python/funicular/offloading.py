"""``offload`` and ``unwrap``: making a model a paged one, in place, and back."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from funicular import _core
from funicular.checkpoint.meta import Weights
from funicular.errors import Error, UsageError
from funicular.gradients.arrival import make_grad
from funicular.guard.classes import GuardedParameter
from funicular.guard.kinds import guarded_classes
from funicular.homes.moved import build_places, share_version, tensor_over
from funicular.micro_batches.activations import Activations
from funicular.micro_batches.block import MicroBatches
from funicular.optim.other_optimizers import watch_optimizers
from funicular.policy import Policy
from funicular.ranks.group import resolve
from funicular.ranks.meeting import agreed, make_engine
from funicular.report.log import Progress, note
from funicular.torch_internals.autograd import hooks_of
from funicular.torch_internals.memory import dense_bytes
from funicular.torch_internals.modules import own_buffers
from funicular.torch_internals.nvrtc import tell_core
from funicular.torch_internals.overrides import unguarded
from funicular.units.cast import Cast
from funicular.units.classes import unpaged, unpaged_note
from funicular.units.discover import Found, describe, find_units
from funicular.units.param import PagedParam, link, ref_of
from funicular.units.unit import Unit
from funicular.windows.beside import warn_of_equal_budgets
from funicular.windows.hooks import AssignHook, ModuleHooks, RootHooks, counts_hooks, remove_hooks
from funicular.windows.lookup import ATTRIBUTE, offloaded, owner_of, session_of
from funicular.windows.moved_by_others import refuse_for_ranks, refuse_movers
from funicular.windows.ranked import leave_ranks, meet
from funicular.windows.replaced import Held
from funicular.windows.residents import keep, resident_session, unkeep
from funicular.windows.session import Session
from funicular.windows.shutdown import check_process
from funicular.windows.signals import note_step, refuse

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from funicular.ranks.group import Group

__all__ = ["offload", "session_of", "unwrap"]

_log = logging.getLogger("funicular")
#: what the C library may keep of the weights that have moved: it gives small pieces back only when it is told to
_TRIM_BYTES = 64 << 20


@torch.inference_mode(mode=False)
def offload(
    model: nn.Module,
    policy: str | os.PathLike[str] | Policy | Mapping[str, Any] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    group: Any = None,
) -> nn.Module:
    """Page a model's parameters and optimizer states, in place; gradients go to host memory, or to NVMe.

    Parameters
    ----------
    model : nn.Module
        Any module with weights, on the CPU or a CUDA device. Parameters keep identity, names and shapes, and dtypes unless the
        policy's ``params.dtype`` says otherwise; on a CUDA device they report that device. Buffers move to the compute device.
    policy : path, name of a preset, Policy, mapping or None
        What may be used and where things live (docs/policy.md); ``"host"`` and the other presets by name; ``None`` decides
        everything from the machine.
    checkpoint : path or None
        A checkpoint, a directory of the model's safetensors (one file, or shards with an index), or one such file: the weights
        are streamed from there to where they will live. The model may then be on the meta device, so that it never has
        to fit into memory. Its parameters stay the same objects: an optimizer may be made before or after.
    group : None, ProcessGroup, DeviceMesh or "single"
        Which processes train the model together (docs/ranks.md): ``None`` is all of the default group of torch.distributed, if there is
        one. They hold the weights once, and gradients become the mean over ranks. ``"single"``: this process trains a model of its own.

    Returns
    -------
    nn.Module
        The same object.

    Raises
    ------
    UsageError, BudgetError, StorageError
        Before anything is touched: bad policy (``FN-E50x``), budgets (``FN-E20x``), paths (``FN-E60x``), parameters that cannot be paged
        (``FN-E11x``) or that another library moves (``FN-E140``); weights that are missing (``FN-E404``), damaged (``FN-E406``) or of another
        model (``FN-E407``); several ranks that differ (``FN-E703``) or whose model or policy is not supported there (``FN-E704``,
        ``FN-E720``). What fails later leaves the model where it was; weights that ``params.dtype`` has rounded stay so.
    """
    if session_of(model) is not None:
        raise UsageError("FN-E110", "the model is offloaded already. To change its policy: funicular.unwrap(model).")
    for name, module in model.named_modules():
        if name and session_of(module) is not None:
            raise UsageError("FN-E110", f"its part '{name}' is offloaded already. Offload the whole model only.")
    for name, p in model.named_parameters():
        if isinstance(p, GuardedParameter) or ref_of(p) is not None or resident_session(p) is not None:
            raise UsageError("FN-E110", f"'{name}' belongs to another offloaded model. Unwrap that one first.")
    ranks = resolve(group)
    with agreed(ranks, "looked at its model and its policy"):
        refuse_movers(model)
        resolved = Policy.load(policy)
        if ranks is not None:
            refuse_for_ranks(model)
        told = Progress("FN-I301 offloading")
        cast = Cast(resolved.params.dtype)
        weights = None if checkpoint is None else Weights(model, checkpoint, cast)
    try:
        if weights is not None:
            weights.materialise()
        with told:
            session = _offload(model, resolved, weights, cast, ranks, told)
    except BaseException:
        if weights is not None:
            weights.undo()
        if ranks is not None:
            ranks.close()
        raise
    for text in session.engine.notes():
        note(text)
    session.growth.begin()
    if session.held.unpaged:
        _log.warning("FN-W112 not paged, in no budget, and left where they are: %s", unpaged_note(session.held.unpaged))
    warn_of_equal_budgets(session)
    _tell_homes(session, told)
    return model


def _tell_homes(session: Session, told: Progress) -> None:
    sizes = {"hbm": sum(p.nbytes for p in session.residents), "host": 0, "nvme": 0}
    for unit in session.units:
        sizes["nvme" if unit.on_nvme else "host"] += unit.nbytes
    homes = ", ".join(f"{size / 1e9:.2f} GB in {tier}" for tier, size in sizes.items() if size) or "none"
    told.end("FN-I302 offloaded in %.1f s; weights: %s", told.seconds, homes)


def _offload(
    model: nn.Module, resolved: Policy, weights: Weights | None, cast: Cast, ranks: Group | None, told: Progress
) -> Session:
    with agreed(ranks, "looked for its model's units"):
        check_process()
        resolved = resolved.on_current_gpu()  # once this is no forked child: CUDA fails there
        found = find_units(model, resolved.unit_patterns())
        if torch.version.cuda is not None:
            tell_core()
        left = unpaged(model)
        units = [(f.name, [describe(n, p, cast.dtype_of(p)) for n, p in f.params]) for f in found]
    engine = make_engine(units, resolved.to_json(), _freed(found), ranks)
    where = engine.device()
    session = Session(engine, torch.device("cpu" if where == "host" else where), resolved, ranks)
    session.held = Held(model, left)
    devices = {id(p): p.device for p in model.parameters()}
    buffers = [(m, name, b) for m in model.modules() for name, b in own_buffers(m).items() if b is not None]
    try:
        cast.apply(model)
        _build(session, found, told, filled=weights is None, sync=resolved.debug.sync)
        watch_optimizers()
        _move_buffers(model, session)
        _slice(session, found, resolved)
        _hook(model, session, found)
        model.__dict__[ATTRIBUTE] = session
        if weights is not None:
            weights.fill(session)
        meet(session, "the end of funicular.offload")
    except BaseException:
        # As it was: nothing of a model is lost because it could not be offloaded.
        for module, name, buffer in buffers:
            own_buffers(module)[name] = buffer
        values = None if weights is None else weights.values
        taken = [t._replace(value=t.value.to(devices[id(t.ref.param)])) for t in _taken(session, values)]
        for p in session.residents:
            p.data = p.data.to(devices[id(p)]) if values is None else values.get(id(p), p.data)

        def restore() -> None:
            _leave(model, session, taken)
            cast.undo()

        _core.complete(restore)
        engine.close()
        raise
    return session


def _freed(found: list[Found]) -> int:
    """Bytes of host memory that the weights take now and give back when they move in: those that are not files."""
    weights = (p for f in found for _, p in f.params if p.device.type == "cpu")
    return sum(p.nbytes for p in weights if p.untyped_storage().filename is None)


def _build(session: Session, found: list[Found], told: Progress, *, filled: bool, sync: bool) -> None:
    engine = session.engine
    streamed = any("nvme" in engine.homes(index) for index in range(len(found)))
    session.waits = sync or (engine.shares_processor() and not streamed)
    with torch.inference_mode(mode=False), torch.no_grad():
        residents = [engine.homes(index)[0] == "hbm" for index in range(len(found))]
        paged = {i: _build_unit(session, i, f) for i, f in enumerate(found) if not residents[i]}
        session.units.extend(paged.values())
        session.gradients.know(session.units)
        for index, unit in paged.items():
            unit.neighbours.extend(paged[v] for v in engine.neighbours(index))
        done, total = 0, sum(unit.nbytes for unit in session.units)
        for unit in session.units:
            if unit.on_nvme and filled:
                _write_out(session, unit)
                done += unit.nbytes
                told.at(done, total)
        # Everything that can fail has been done; from here parameters move.
        moved = 0
        if session.group is not None:
            _share_weights(session, filled=filled)
        for unit in session.units:
            _move_in(session, unit, filled=filled and session.group is None)
            if not unit.on_nvme:
                done += unit.nbytes
                told.at(done, total)
            moved += sum(ref.home.nbytes for ref in unit.params)
            if moved > _TRIM_BYTES:
                _core.trim()
                moved = 0
        for f, resident in zip(found, residents, strict=True):
            if resident:
                keep(session, [p for _, p in f.params])
        _core.trim()


def _build_unit(session: Session, index: int, found: Found) -> Unit:
    engine = session.engine
    (params, _, grads), spare_copy = engine.homes(index), engine.has_spare_copy(index)
    unit = Unit(
        session, index, found.name, on_nvme=params == "nvme", grads_on_nvme=grads == "nvme", spare_copy=spare_copy
    )
    for (name, p), place in zip(found.params, engine.places(index), strict=True):
        ref = PagedParam(p, name, unit, place, guarded_classes(type(p)))
        build_places(engine, ref)
        unit.add(ref)
    return unit


def _write_out(session: Session, unit: Unit) -> None:
    """Write a unit's weights to NVMe; the model keeps its own."""
    engine = session.engine
    engine.blank_shadow(unit.engine_id)
    _copy_home(session, unit)
    engine.store_shadow(unit.engine_id, session.stream())
    engine.discard_shadow(unit.engine_id)


def _move_in(session: Session, unit: Unit, *, filled: bool) -> None:
    """Copy the weights home, if there are any yet, and make the parameters views of it."""
    if filled and not unit.on_nvme:
        _copy_home(session, unit)
    for ref in unit.params:
        p = ref.param
        if ref.trainable:
            ref.give_gradient(make_grad(ref))
            hooked: Any = p
            session.handles.append(hooked.register_post_accumulate_grad_hook(_Arrived(session)))
            session.handles.append(hooked.register_hook(_BeforeAccumulate(ref)))
        grad = None if p.grad is None else p.grad.to(session.device)
        link(p, ref)
        p._funicular_inside = unit.inside  # type: ignore[attr-defined]
        ref.move_in(grad)
        with unguarded():
            share_version(ref)
    session.leases.add(unit)
    unit.count_idle()


def _share_weights(session: Session, *, filled: bool) -> None:
    """Have rank 0's weights in the memory of all ranks. The others are told if theirs differ."""
    group = session.group
    assert group is not None
    if filled and group.rank == 0:
        for unit in session.units:
            _copy_home(session, unit)
    meet(session, "the weights of rank 0 in their places")
    if not filled or group.rank == 0:
        return
    for ref in (ref for unit in session.units for ref in unit.params):
        p = ref.param.data
        if not torch.equal(dense_bytes(p), dense_bytes(ref.home).to(p.device)):
            _log.warning(
                "FN-W720 '%s' has other values on rank %d than on rank 0, whose weights count. Seed all ranks alike, or load the same checkpoint.",
                ref.name,
                group.rank,
            )
            return


def _copy_home(session: Session, unit: Unit) -> None:
    host = tensor_over(session.engine.home_buffer(unit.engine_id, False))
    for ref in unit.params:
        p = ref.param
        target = torch.as_strided(host.view(p.dtype), p.size(), p.stride(), ref.offset // p.element_size())
        target.copy_(p.data)


class _Arrived:
    """Post-accumulate hook of a parameter."""

    def __init__(self, session: Session) -> None:
        self.session = weakref.ref(session)

    def __call__(self, param: torch.Tensor) -> None:
        session = self.session()
        if session is not None:
            session.gradient_arrived(param)


class _BeforeAccumulate:
    """Gradient hook of a parameter: autograd adds to the segment only what is there already and as it is to be."""

    def __init__(self, ref: PagedParam) -> None:
        self.ref, self.session = weakref.ref(ref), weakref.ref(owner_of(ref.unit))

    def __call__(self, grad: torch.Tensor) -> None:
        ref = self.ref()
        if ref is not None:
            owner_of(ref.unit).before_accumulate(ref)


def _remove_hooks(session: Session, p: Any) -> None:
    """Remove what a session hung on a parameter, also what an interruption kept out of its list of handles."""
    for hooks in hooks_of(p):
        for key, hook in list(hooks.items()):
            if isinstance(hook, (_Arrived, _BeforeAccumulate)) and hook.session() is session:
                del hooks[key]


def _move_buffers(model: nn.Module, session: Session) -> None:
    """Bring buffers to the device; one that several modules share stays one."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in own_buffers(module).items():
            if buffer is not None and buffer.device != session.device:
                if id(buffer) not in moved:
                    moved[id(buffer)] = buffer.to(session.device)
                own_buffers(module)[name] = moved[id(buffer)]


def _hook(model: nn.Module, session: Session, found: list[Found]) -> None:
    unit_of = {id(ref.param): unit for unit in session.units for ref in unit.params}
    blocks = {id(m) for f in found for m in f.modules}
    inside: set[int] = set()
    counted = counts_hooks(model)
    for module in model.modules():
        if id(module) in blocks and id(module) not in inside:
            inside.update(id(m) for m in module.modules())
            units = _units_of(module, unit_of, recurse=True)
        elif id(module) not in inside:
            units = _units_of(module, unit_of, recurse=False)
        else:
            continue
        if units:
            ModuleHooks.install(session, module, units, quiet=id(module) in counted)
    for module in model.modules():
        if any(id(p) in unit_of for p in module.parameters(recurse=False)):
            AssignHook.install(session, module)
    session.held.note(model, set(unit_of))
    # Last, so that they run before all others.
    RootHooks.install(session, model, quiet=id(model) in counted)


def _slice(session: Session, found: list[Found], policy: Policy) -> None:
    """Let blocks run in micro-batches, if the policy says so."""
    activations = policy.to_dict()["activations"]
    if activations["micro_batch"] == "off":
        return
    if activations["tier"] == "host":
        session.activations = Activations(session.engine, session.device)
    unit_of = {id(ref.param): unit for unit in session.units for ref in unit.params}
    blocks = [(f.name, module) for f in found for module in f.modules]
    inside = {id(m) for _, block in blocks for m in block.modules() if m is not block}
    for name, module in blocks:
        if id(module) not in inside:
            units = _units_of(module, unit_of, recurse=True)
            MicroBatches.install(session, module, units, name, activations["micro_batch"])


def _units_of(module: nn.Module, unit_of: dict[int, Unit], *, recurse: bool) -> tuple[Unit, ...]:
    return tuple(dict.fromkeys(unit_of[id(p)] for p in module.parameters(recurse=recurse) if id(p) in unit_of))


@torch.inference_mode(mode=False)
def unwrap(model: nn.Module) -> nn.Module:
    """Make an offloaded model a normal, resident one again, in place.

    All ranks that train it call it, but for those that have ended.

    Parameters
    ----------
    model : nn.Module
        A model given to :func:`offload`, or a module that wraps one.

    Returns
    -------
    nn.Module
        The same object; its parameters and gradients are ordinary tensors on the compute device. An ``AdamW`` over it
        keeps its states, as ordinary tensors too.

    Raises
    ------
    UsageError
        ``FN-E114`` if the model is not offloaded, or is a part of an offloaded one.
    StorageError
        ``FN-E301``, ``FN-E302`` if weights or optimizer states on NVMe cannot be read; the model stays as it is. Called again,
        it leaves such states behind. Weights in host memory can be taken back after a failure too.
    """
    part, session = offloaded(model)
    refuse(session, "unwrap")
    note_step(session)
    _core.saved(session.engine)
    leave_ranks(session)
    # Steps of other threads wait, and then find the model ordinary.
    with session.lock:
        if session.engine.failed():
            _log.warning(
                "FN-W301 unwrapping after a failure: weights in host memory are, element by element, as before or as after the step "
                "that failed. Optimizer states that cannot be read any more are lost: load a checkpoint's, or make a new optimizer."
            )
        else:
            session.engine.settle_all()
            session.close_all()
            session.take_all_edits()
        taken = _taken(session)
        session.log.ended()
        # Nothing has changed so far.
        _core.complete(lambda: _leave(part, session, taken))
    if session.group is not None:
        session.group.close()
    session.engine.close()
    return model


class _Taken(NamedTuple):
    """What a parameter becomes that leaves the runtime."""

    ref: PagedParam
    value: torch.Tensor
    grad: torch.Tensor | None
    states: dict[str, torch.Tensor]
    lost: Error | None


def _taken(session: Session, values: dict[int, torch.Tensor] | None = None) -> list[_Taken]:
    """Return copies of everything that has moved in; or these values, as far as there are any."""
    refs = [ref for unit in session.units for ref in unit.params if ref_of(ref.param) is ref]
    if values is None:
        return [_take(ref) for ref in refs]
    return [_Taken(ref, values[id(ref.param)], ref.param.grad, {}, None) for ref in refs if id(ref.param) in values]


def _take(ref: PagedParam) -> _Taken:
    p = ref.param
    with torch.no_grad():
        value = p.detach().clone(memory_format=torch.preserve_format)
        grad = None if p.grad is None else p.grad.detach().clone()
    states, lost = {}, None
    try:
        if ref.states is not None:
            states = ref.states.taken()
    except Error as error:
        session = owner_of(ref.unit)
        if not session.engine.failed() and not session.told_lost:
            session.told_lost = True
            raise
        lost = error
    return _Taken(ref, value, grad, states, lost)


def _leave(model: nn.Module, session: Session, taken: list[_Taken]) -> None:
    """Make the parameters ordinary ones. Interrupted, it can be run again."""
    for ref, value, grad, states, lost in taken:
        p = ref.param
        if ref.states is not None:
            ref.states.take(states, lost)
        p.__class__ = ref.kind
        with torch.no_grad():
            p.data = value
        p.grad = grad
        p.__dict__.pop("_funicular_ref", None)
        p.__dict__.pop("_funicular_inside", None)
    for handle in session.handles:
        handle.remove()
    remove_hooks(session, model)
    for p in model.parameters():
        _remove_hooks(session, p)
    MicroBatches.remove(model)
    unkeep(session)
    session.end_windows()
    model.__dict__.pop(ATTRIBUTE, None)
