"""Python programs in processes of their own that need not import torch again: forks of a process that has imported it.

An import of torch and funicular takes seconds of a processor, a fork milliseconds. The fork runs the program as ``python -c`` would: in a
``__main__`` of its own, with an environment, a folder and streams of its own, and the interpreter ends as it always does.

The processes that share the tests (``pytest -n``) are such forks, too, and each begins with a server of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_PR_SET_CHILD_SUBREAPER = 36
#: What a program may rely on to be imported already; ``import`` of it still binds the name. The first optimizer imports torch._dynamo.
_READY = (
    "import pytest, torch, torch._dynamo, torch.distributed, funicular, models, twin, facts; torch.set_num_threads(1)"
)
#: The same for programs that plan a model: what that imports takes longer than the plan.
TO_PLAN = """
import contextlib, torch, torch._dynamo, torch._inductor.utils, runpy, funicular
with contextlib.suppress(ImportError):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
torch.set_num_threads(1)
"""
#: The same for the processes that share the tests: what most of them would import, and the servers that they would start.
TO_TEST = f"""
import importlib, sys
sys.path[:0] = [{str(HERE)!r}]
{_READY}
{TO_PLAN}
for name in ("accelerate", "numpy", "safetensors.torch", "torch._functorch.config", "transformers.conversion_mapping", "transformers.trainer"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# pytest would rewrite the assertions of its plugins, and warns where they are imported already: here by transformers.
for name in {{"anyio", "hypothesis"}} & sys.modules.keys():
    sys.modules[name].__doc__ = "PYTEST_DONT_REWRITE"
"""
#: How execnet begins a process that shares the tests.
_AS_WORKER = "import sys, forks; exec(eval(sys.stdin.readline())); forks.end()"


def python(code: str, ready: str = _READY, **options: Any) -> subprocess.Popen[str]:
    """Start ``code``, with the options of ``subprocess.Popen`` for streams, text, ``env`` and ``cwd``.

    ``ready`` is what the process that is forked has run before; each has one of its own, which all but the first are forked for.
    """
    return _Fork([ready, "-c", code], executable="python", **options)


def plan(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start ``python -m funicular plan``, with pipes for its output."""
    command = ["funicular", "plan", *arguments]
    program = f"""
import forks, runpy, sys
sys.argv = {command!r}
try:
    runpy.run_module("funicular", None, "__main__", True)
except SystemExit as ended:
    forks.end(ended.code)
"""
    return python(program, TO_PLAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def fork_workers() -> None:
    """Have execnet, and so pytest-xdist, begin its processes as forks."""
    from execnet import gateway_base, gateway_io

    class Worker(gateway_io.Popen2IOMaster):
        def __init__(self, _: list[str], execmodel: gateway_base.ExecModel) -> None:
            program = [TO_TEST, "-c", "import forks; exec(forks.begin_worker())"]
            self.popen: Any = _Fork(program, executable="python", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            gateway_base.Popen2IO.__init__(self, self.popen.stdin, self.popen.stdout, execmodel)

    gateway_io.Popen2IOMaster = Worker


def begin_worker() -> str:
    """Fork a server for this process, while nothing but imports has happened in it. Returns the program that it, or a fork of the server, is to run."""
    ours, theirs = socket.socketpair()
    number = os.fork()
    if number:
        theirs.close()
        _forked.append(_Server(ours, lambda: os.waitpid(number, 0)))
        return _AS_WORKER
    ours.close()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    return serve(theirs.detach())


def end(status: int | None = 0) -> None:
    """End this program as Python does, except that its modules are not taken apart: in a fork that takes a quarter of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class _Fork(subprocess.Popen[str]):
    """A process that the server forks for this one. Once the server's helper between them has ended, it is this process's child."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        folder, environment = rest[4], rest[5]
        pipes = rest[9:15]  # both ends for stdin, stdout, stderr; -1 where the caller asked for none
        streams = [pipes[at] if pipes[at] != -1 else own for own, at in enumerate((0, 3, 5))]
        request = {
            "code": args[-1],
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
        }
        self.pid = _server(args[0]).fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


class _Server:
    """The process that forks. It ends when this one's end of the socket is closed."""

    def __init__(self, requests: socket.socket, wait: Callable[[], object]) -> None:
        if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")
        self.socket, self.wait = requests, wait
        atexit.register(self.end)

    def fork(self, request: dict[str, object], streams: list[int]) -> int:
        body = json.dumps(request).encode()
        socket.send_fds(self.socket, [len(body).to_bytes(8, "little")], streams)
        self.socket.sendall(body)
        answer = self.socket.recv(8, socket.MSG_WAITALL)
        if len(answer) != 8:
            raise RuntimeError("the process that forks has ended; its last words are above")
        return int.from_bytes(answer, "little")

    def end(self) -> None:
        self.socket.close()
        self.wait()


#: the server that this process began with, which has run ``TO_TEST``
_forked: list[_Server] = []


@functools.cache
def _server(ready: str) -> _Server:
    if _forked and ready in (_READY, TO_PLAN):
        return _forked[0]
    ours, theirs = socket.socketpair()
    process: subprocess.Popen[Any]
    with theirs:
        if ready in (_READY, TO_TEST):
            program = f"import sys; sys.path[:0] = [{str(HERE)!r}]; import forks; exec(forks.serve({theirs.fileno()}, {ready!r}))"
            process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()])
        else:  # torch is there already: a fork of the process that has imported it
            process = python(f"import forks; exec(forks.serve(0, {ready!r}))", stdin=theirs)
    return _Server(ours, process.wait)


def serve(number: int, ready: str = "") -> str:
    """Fork for each request until the socket is closed, which ends this process. Returns the program that a fork is to run."""
    exec(ready, {})
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=number) as requests:
        while (received := socket.recv_fds(requests, 8, 3))[0]:
            request = json.loads(requests.recv(int.from_bytes(received[0], "little"), socket.MSG_WAITALL))
            child = _fork()
            if not child:
                requests.close()
                return _become(request, received[1])
            for stream in received[1]:
                os.close(stream)
            requests.sendall(child.to_bytes(8, "little"))
    os._exit(0)  # nothing to write; to take its modules apart takes a quarter of a second


def _fork() -> int:
    """Fork twice, so that the child is not this process's: its number, or 0 in the child."""
    inside, outside = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the threads of OpenBLAS know about forks
        between = os.fork()
        child = 0 if between else os.fork()
    if not between:
        if child:
            os.write(outside, child.to_bytes(8, "little"))
            os._exit(0)
        os.close(inside)
        os.close(outside)
        return 0
    os.close(outside)
    os.waitpid(between, 0)
    child = int.from_bytes(os.read(inside, 8), "little")
    os.close(inside)
    return child


def _become(request: dict[str, Any], streams: list[int]) -> str:
    """Take over the streams, the environment and the folder of a request; its program."""
    for own, given in enumerate(streams):
        os.dup2(given, own)
    for given in streams:
        os.close(given)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["-c"]
    if (torch := sys.modules.get("torch")) is not None:
        # torch makes its pool of threads anew at the first call after a fork, and ends the process where two threads make that call at once,
        # as autograd's do.
        torch.set_num_threads(torch.get_num_threads())
    return request["code"]
