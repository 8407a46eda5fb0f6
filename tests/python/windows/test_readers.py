"""Other threads look at the weights, or use the model, while one thread trains."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funicular
from models import WIDTH, stack
from twin import Run, case, compare

pytestmark = pytest.mark.io_engines

Check = Callable[[torch.Tensor], None]


def detached(run: Run, see: Check) -> None:
    for p in run.model.parameters():
        see(p.detach())


def itself(run: Run, see: Check) -> None:
    for p in run.model.parameters():
        see(p.square().sum())


def without_grad(run: Run, see: Check) -> None:
    with torch.no_grad():
        for p in run.model.parameters():
            see(p)
        see(torch.stack(torch._foreach_norm(list(run.model.parameters()))))


def snapshot(run: Run, see: Check) -> None:
    for value in run.model.state_dict().values():
        see(value.clone())


def kept_for_a_while(run: Run, see: Check) -> None:
    kept = [p.detach() for p in run.model.parameters()]
    time.sleep(0.002)
    for value in kept:
        see(value)


def evaluates(run: Run, see: Check) -> None:
    with torch.no_grad():
        see(run.model(torch.ones(4, WIDTH, device=run.device)))


def differentiates(run: Run, see: Check) -> None:
    """A step in its midst is an error in plain torch, too."""
    try:
        for p in run.model.parameters():
            see(torch.autograd.grad((p * p).sum(), p)[0])
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise


def of_the_model(run: Run, see: Check) -> None:
    """As above; and torch takes a step at another time for something that a saved-tensor hook did."""
    try:
        for grad in torch.autograd.grad(
            run.model(torch.ones(4, WIDTH, device=run.device)).square().mean(), list(run.model.parameters())
        ):
            see(grad)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error) and "pack hook" not in str(error):
            raise


READERS = [detached, itself, without_grad, snapshot, kept_for_a_while, evaluates, differentiates, of_the_model]


def beside(run: Run, readers: list[Callable[..., None]], train: Callable[[], Any]) -> None:
    """Train while others read; every number that they see is finite, though stale bytes are NaN here (``debug.poison``)."""
    stop, wrong, reads = threading.Event(), [], [0] * len(readers)

    def work(i: int) -> None:
        name = readers[i].__name__

        def see(tensor: torch.Tensor) -> None:
            # A copy: isfinite compares each element with itself, and a step may come between the two reads.
            stale = int((~torch.isfinite(tensor.detach().clone())).sum())
            if stale:
                wrong.append(f"{name}: {stale} of {tensor.numel()} not finite")

        try:
            while not stop.is_set():
                readers[i](run, see)
                reads[i] += 1
        except BaseException as error:
            wrong.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(readers))]
    for thread in threads:
        thread.start()
    try:
        while not all(reads) and not wrong:
            time.sleep(0.001)
        train()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]


@pytest.mark.covering(1)
@pytest.mark.parametrize("reader", READERS)
def test_beside_training(reader, world):
    """Readers see weights, and the training is, bit for bit, the one without them."""

    def script(run: Run) -> None:
        run.train(1)
        if run.offloaded:
            beside(run, [reader], lambda: run.train(4, look=False))
        else:
            run.train(4, look=False)

    compare(world, stack(), script)


def test_all_at_once(world):
    def script(run: Run) -> None:
        run.train(1)
        if run.offloaded:
            beside(run, READERS, lambda: run.train(3, look=False))
        else:
            run.train(3, look=False)

    compare(world, stack(), script)


def slowly(run: Run, p: torch.Tensor, begun: threading.Event, over: threading.Event) -> None:
    """Run operations that take long enough for a step in their midst, until another thread has trained."""
    big = torch.full((1_000_000, WIDTH), 3.5, device=run.device)
    with torch.no_grad():
        while not over.is_set():
            begun.set()
            assert torch.isfinite(torch.atan2(big, p)).all(), "stale bytes"


def gradients(run: Run, hook: Callable[..., None]) -> None:
    """Run a backward whose last block but one comes to a hook, with the last one's window open."""
    block = run.model.layers[0]
    handle = block.register_forward_hook(lambda module, args, output: output.register_hook(hook) and None)
    x = torch.ones(4, WIDTH, device=run.device, requires_grad=True)
    out = run.model(x)
    handle.remove()
    torch.autograd.grad(out.square().mean(), x)


class Struck(Exception):
    pass


def after_a_backward_that_failed(run: Run, begun: threading.Event, over: threading.Event) -> None:
    def strike(grad: torch.Tensor) -> None:
        raise Struck

    with pytest.raises(Struck):
        gradients(run, strike)
    slowly(run, run.model.layers[0].up.bias, begun, over)


def amid_a_backward(run: Run, begun: threading.Event, over: threading.Event) -> None:
    def look(grad: torch.Tensor) -> None:
        slowly(run, run.model.layers[0].up.bias, begun, over)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(run, look)


@pytest.mark.covering(1)
@pytest.mark.parametrize("reads", [after_a_backward_that_failed, amid_a_backward])
def test_frames_stay_while_another_thread_computes_from_them(reads, world):
    """Steps take no frames away that another thread's operation may be reading: it was let in by a backward, which may have failed."""

    def script(run: Run) -> None:
        run.train(1)
        for _ in range(3):
            begun, over, wrong = threading.Event(), threading.Event(), []

            def other(begun: threading.Event = begun, over: threading.Event = over, wrong: list[str] = wrong) -> None:
                try:
                    reads(run, begun, over)
                except BaseException as error:
                    wrong.append(repr(error))
                finally:
                    begun.set()

            thread = threading.Thread(target=other)
            if run.offloaded:
                thread.start()
                assert begun.wait(60)
            run.train(1)
            over.set()
            if run.offloaded:
                thread.join()
            assert not wrong, wrong

    compare(world, stack(), script)


@case(stack())
def test_edited_by_another_thread(run: Run):
    """Edits count wherever the training thread is, between its steps."""
    for _ in range(3):
        run.train(1)
        thread = threading.Thread(target=halve, args=(run,))
        thread.start()
        thread.join()
    run.train(1)


def halve(run: Run) -> None:
    with torch.no_grad():
        for p in list(run.model.parameters())[::3]:
            p.mul_(0.5)
        run.model.layers[1].up.weight.data.add_(0.01)


def test_edited_inside_the_window_of_another_thread(world):
    """A weight edited by another thread while its module runs, before it is used: the run after has it, if not this one."""

    def script(run: Run) -> None:
        def edit(*_: Any) -> None:
            thread = threading.Thread(target=halve, args=(run,))
            thread.start()
            thread.join()

        run.train(1)
        hook = run.model.layers[2].register_forward_pre_hook(edit)
        with torch.no_grad():
            run.model(run.data(4, WIDTH))
        hook.remove()
        run.record_weights()
        run.train(2)

    compare(world, stack(), script)


@case(stack())
def test_steps_while_another_thread_is_inside(run: Run):
    """A step by one thread in the middle of another's evaluation: the training thread's next forward has the new weights."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is other:
            inside.set()
            assert go_on.wait(60)

    def evaluate() -> None:
        with torch.no_grad():
            run.model(torch.ones(4, WIDTH, device=run.device))

    run.train(1)
    hook = run.model.layers[3].register_forward_pre_hook(wait)
    other = threading.Thread(target=evaluate)
    other.start()
    assert inside.wait(60)
    run.train(2)
    go_on.set()
    other.join()
    hook.remove()
    run.train(2)


@pytest.mark.parametrize("function", [torch.nn.functional.layer_norm, torch.layer_norm], ids=["python", "C++"])
def test_functions_of_another_thread_are_guarded(host_world, function):
    """Also those of torch's that are written in Python, while this thread computes with the weight in its frame."""

    def script(run: Run) -> None:
        norm = run.model.layers[2].norm
        seen = []

        def elsewhere(module: Any, args: Any) -> None:
            with torch.no_grad():
                seen.append(function(args[0].detach(), (WIDTH,), norm.weight, norm.bias))

        def inside(module: Any, args: Any) -> None:
            before = funicular.stats(run.model).stray_reads if run.offloaded else 0
            thread = threading.Thread(target=elsewhere, args=(module, args))
            thread.start()
            thread.join()
            if run.offloaded:
                assert funicular.stats(run.model).stray_reads == before + 1, "nobody was asked"

        handle = norm.register_forward_pre_hook(inside)
        run.train(2, look=False)
        handle.remove()
        run.record("seen", seen)

    compare(host_world, stack(), script)
