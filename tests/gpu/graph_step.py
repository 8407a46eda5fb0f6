"""A CUDA graph of one forward and backward with paged weights: what can be captured, and what cannot. JSON lines.

    python tests/gpu/graph_step.py                    everything, on a GPU
    python tests/gpu/graph_step.py --device host      the same schedule without streams and graphs: checks the script

Two experiments.

``runtime``: a step of an offloaded model is captured as it is, in each capture mode, in processes of their own (a failed capture
leaves a process unusable). The line says what the driver or the runtime answered, or whether replays were right.

``own_copies``: the runtime gives the memory only: permanent addresses over a ring of frames, homes in pinned memory. The schedule
is fixed, so the copies become nodes of the graph: each unit up before its forward and before its recomputation, each gradient
down. Replays are compared with a resident model, bit by bit, over several updates of the homes between replays. A control that
leaves out the copies of the backward has to differ.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import funicular
from funicular import testing

LR = 0.05


class Block(nn.Module):
    """Causal attention and a gated MLP."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, w))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A decoder whose blocks are checkpointed."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embed = nn.Embedding(args.vocab, args.dim)
        self.layers = nn.ModuleList(Block(args.dim, args.heads, args.hidden) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.dim), nn.Linear(args.dim, args.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids[:, :-1])
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), ids[:, 1:].flatten())


def build(args: argparse.Namespace) -> Model:
    torch.manual_seed(0)
    return Model(args).to(torch.bfloat16)


def tokens(args: argparse.Namespace) -> Tensor:
    ids = torch.randint(args.vocab, (args.batch, args.seq + 1), generator=torch.Generator().manual_seed(1))
    return ids.to("cuda" if args.device == "cuda" else "cpu")


def policy(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    block = sum(p.numel() for p in model.layers[0].parameters()) * 2
    chunk = 2 << 20 if args.device == "cuda" else 4096
    frame = -(-block // chunk) * chunk + 2 * chunk
    return {
        "device": args.device,
        "budget": {"hbm": f"{args.frames * frame}B"},
        "params": {"tier": "host"},
        "optimizer": {"tier": "host"},
    }


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# ---------------------------------------------------------------------------------------------- the runtime's own step


def runtime_capture(args: argparse.Namespace, mode: str) -> None:
    """Capture the step of an offloaded model as it is. Runs in a process of its own."""
    model = build(args)
    resident = copy.deepcopy(model).cuda()
    funicular.offload(model, policy(args, model))
    ids = tokens(args)
    resident(ids).backward()
    want = {n: p.grad.clone() for n, p in resident.named_parameters()}
    for _ in range(3):
        model(ids).backward()
        model.zero_grad()
    torch.cuda.synchronize()
    stage = "capture"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=mode):
            loss = model(ids)
            stage = "capture of the backward"
            loss.backward()
            stage = "end of the capture"
        stage = "replay"
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        worst = max(float((p.grad.float() - want[n].float()).abs().max()) for n, p in model.named_parameters())
        say(experiment="runtime", mode=mode, captured=True, largest_difference=worst, right=worst == 0.0)
    except BaseException as error:
        where = [
            f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
        ]
        say(
            experiment="runtime",
            mode=mode,
            captured=stage == "replay",
            failed_in=stage,
            error=f"{type(error).__name__}: {error}"[:600],
            at=where[-4:],
        )


def runtime(args: argparse.Namespace, argv: list[str]) -> None:
    """Try every capture mode in a child."""
    for mode in ("thread_local", "relaxed", "global"):
        command = [sys.executable, __file__, *argv, "--child", mode]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.patience, check=False)
        except subprocess.TimeoutExpired:
            say(experiment="runtime", mode=mode, captured=False, error=f"hung: nothing within {args.patience} s")
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if lines:
            print("\n".join(lines), flush=True)
        else:
            say(experiment="runtime", mode=mode, captured=False, exit=done.returncode, error=done.stderr[-600:])


# ------------------------------------------------------------------------------------------------- copies of our own


class Streams:
    """Three streams, or none on the host."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.up, self.down = torch.cuda.Stream(), torch.cuda.Stream()

    def now(self) -> Any:
        """An event on the compute stream."""
        return torch.cuda.current_stream().record_event() if self.cuda else None

    def wait(self, event: Any) -> None:
        """Have the compute stream wait."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def copy(self, stream: str, after: list[Any], dst: Tensor, src: Tensor) -> Any:
        """Copy on a side stream after events; gives the event behind it."""
        if not self.cuda:
            dst.copy_(src)
            return None
        side = getattr(self, stream)
        for event in after:
            if event is not None:
                side.wait_event(event)
        with torch.cuda.stream(side):
            dst.copy_(src, non_blocking=True)
            return side.record_event()


class Paged:
    """An offloaded model whose copies this script issues: fixed order, no guesses, no host in between."""

    def __init__(self, args: argparse.Namespace, skip_backward: bool = False) -> None:
        self.model, self.skip_backward = build(args), skip_backward
        funicular.offload(self.model, policy(args, self.model))
        inspected = testing.inspect(self.model)
        self.units = inspected.units
        self.streams = Streams(args.device)
        self.homes = [unit.home_bytes() for unit in self.units]
        for handle in inspected.handles:
            handle.remove()
        self.sinks: dict[int, Tensor] = {}
        self.handles: list[Any] = []
        unit_of = {}
        for unit in self.units:
            for place in unit.parameters:
                p = place.parameter
                p.__class__, p.data = nn.Parameter, place.frame
                p.grad = None
                unit_of[id(p)] = unit
                self.sinks[id(p)] = torch.zeros(p.shape, dtype=p.dtype, pin_memory=self.streams.cuda)
                self.handles.append(p.register_post_accumulate_grad_hook(self.gradient))
        for module in [self.model.embed, *self.model.layers, self.model.norm, self.model.head]:
            units = list(dict.fromkeys(unit_of[id(p)] for p in module.parameters()))
            module.register_forward_pre_hook(lambda m, a, units=units: self.enter(units))
            module.register_forward_hook(lambda m, a, o, units=units: self.leave(units), always_call=True)
        self.forget()

    def forget(self) -> None:
        """Forget events: those of a capture mean nothing outside of it."""
        self.used: dict[int, Any] = {}
        self.inside: list[int] = []
        self.leaving: collections.deque[tuple[Any, Tensor]] = collections.deque()
        self.ups = self.downs = 0

    def enter(self, units: list[Any]) -> None:
        again = torch._C._current_graph_task_id() != -1
        for unit in units:
            if again and self.skip_backward:
                continue
            # The frames are filled behind the last work of the units that share them.
            after = (
                [self.streams.now()]
                if not self.used
                else [self.used[n.number] for n in [unit, *unit.neighbours] if n.number in self.used]
            )
            flat = unit.frame_bytes()
            event = self.streams.copy("up", [*after, self.fork], flat, self.homes[unit.number][: flat.numel()])
            self.ups += 1
            self.streams.wait(event)
            self.inside.append(unit.number)

    def leave(self, units: list[Any]) -> None:
        for unit in units:
            self.used[unit.number] = self.streams.now()

    def gradient(self, p: Tensor) -> None:
        """Send a gradient down; it lives until the compute stream has waited for its copy."""
        grad = p.grad
        p.grad = None
        for unit in self.units:  # its backward is work with the frames, too
            if unit.number in self.used and any(place.parameter is p for place in unit.parameters):
                self.used[unit.number] = self.streams.now()
        event = self.streams.copy("down", [self.streams.now()], self.sinks[id(p)], grad)
        self.downs += 1
        self.leaving.append((event, grad))
        while len(self.leaving) > 8:
            self.streams.wait(self.leaving.popleft()[0])

    def step(self, ids: Tensor) -> Tensor:
        """Forward and backward; at its end the compute stream has waited for every copy."""
        self.forget()
        self.fork = self.streams.now()
        loss = self.model(ids)
        loss.backward()
        for event, _ in self.leaving:
            self.streams.wait(event)
        self.leaving.clear()
        return loss.detach()

    def update(self) -> None:
        """Plain SGD on the homes, by the CPU."""
        for unit in self.units:
            flat = self.homes[unit.number]
            for place in unit.parameters:
                p = place.parameter
                home = torch.as_strided(
                    flat.view(p.dtype),
                    p.shape,
                    p.stride(),
                    place.offset // p.element_size(),
                )
                home.add_(self.sinks[id(p)], alpha=-LR)

    def gradients(self) -> dict[str, Tensor]:
        return {name: self.sinks[id(p)].clone() for name, p in self.model.named_parameters()}


class Resident:
    """The same model in device memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = build(args)
        if args.device == "cuda":
            self.model.cuda()

    def step(self, ids: Tensor) -> Tensor:
        for p in self.model.parameters():
            p.grad = None
        loss = self.model(ids)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """The CPU's arithmetic, so that the weights have the same bits."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.cpu().add_(p.grad.cpu(), alpha=-LR))

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.cpu().clone() for name, p in self.model.named_parameters()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


def sync(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def timed(args: argparse.Namespace, run: Callable[[], Any]) -> float:
    sync(args)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        run()
        sync(args)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@contextlib.contextmanager
def on_side_stream(args: argparse.Namespace) -> Iterator[None]:
    """As torch asks for warm-ups before a capture."""
    if args.device != "cuda":
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def own_copies(args: argparse.Namespace, skip_backward: bool) -> None:
    """Capture with the copies as nodes, replay, and compare over several steps."""
    ids = tokens(args)
    facts: dict[str, Any] = {"experiment": "own_copies", "control_without_backward_copies": skip_backward}
    resident, paged = Resident(args), Paged(args, skip_backward)
    with on_side_stream(args):
        for _ in range(3):
            paged.step(ids)
    sync(args)
    resident.step(ids)
    facts["eager_difference"] = difference(resident.gradients(), paged.gradients())
    facts |= {"copies_up": paged.ups, "copies_down": paged.downs, "units": len(paged.units)}
    stats = funicular.stats(paged.model)
    facts |= {
        "frames_bytes": stats.budgets["hbm"].used,
        "model_bytes": sum(p.numel() * 2 for p in paged.model.parameters()),
    }
    replay: Callable[[], Any] = lambda: paged.step(ids)
    if args.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = paged.step(ids)
        facts["captured"] = True
        replay = graph.replay
    else:
        loss = paged.step(ids)
    for sink in paged.sinks.values():
        sink.fill_(float("nan"))
    differences = []
    for _ in range(args.steps):
        want = resident.step(ids)
        now = replay()
        sync(args)
        if args.device != "cuda":
            loss = now
        differences.append([difference(resident.gradients(), paged.gradients()), abs(float(loss) - float(want))])
        resident.update()
        paged.update()
    facts["difference_per_step"] = [d for d, _ in differences]
    facts["loss_difference_per_step"] = [d for _, d in differences]
    facts["right"] = all(d == 0.0 for pair in differences for d in pair)
    facts["seconds"] = {
        "resident_eager": timed(args, lambda: resident.step(ids)),
        "paged_replayed": timed(args, replay),
    }
    if args.device == "cuda":
        with on_side_stream(args):
            facts["seconds"]["paged_eager"] = timed(args, lambda: paged.step(ids))
        facts["hbm_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        facts["card"] = torch.cuda.get_device_name()
    say(torch=torch.__version__, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "host"])
    defaults = {
        "dim": 2048,
        "layers": 12,
        "heads": 16,
        "hidden": 5504,
        "vocab": 8192,
        "batch": 4,
        "seq": 2048,
        "frames": 4,
        "steps": 4,
        "patience": 120,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        runtime_capture(args, args.child)
        return
    for control in (False, True):
        try:
            own_copies(args, control)
        except BaseException as error:
            say(
                experiment="own_copies",
                control_without_backward_copies=control,
                error=f"{type(error).__name__}: {error}"[:800],
                at=traceback.format_exc()[-1200:],
            )
    if args.device == "cuda":
        runtime(args, sys.argv[1:])


if __name__ == "__main__":
    main()
