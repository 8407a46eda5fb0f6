"""Limits of the system, met one after the other: the error names the limit, not a budget that has no part in it."""

import children
from conftest import DEVICE, PLACEMENTS

REFUSED = """
import resource
from models import CUDA
torch.zeros(1).to(world.torch_device)
funicular.unwrap(funicular.offload(Stack(), world.policy(Stack())))  # what is made once
used = len(os.listdir("/proc/self/fd"))
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
model = Stack()
policy = world.policy(model)
for more in range(60):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1 + more, hard))
    try:
        funicular.offload(model, policy)
    except (funicular.Error, OSError) as error:
        text = str(error)
    else:
        text = "offloaded"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(more, text.replace(chr(10), " "), flush=True)
    if text == "offloaded":
        break
"""


def test_open_files(two_worlds, disk: str):
    """With so few descriptors left that something is refused, wherever that is: raise ``ulimit -n``."""
    placement = PLACEMENTS["host" if two_worlds.params == "host" else "nvme-threads"]
    *refused, last = children.succeed(REFUSED, disk, placement, DEVICE)
    assert last.endswith(" offloaded"), last
    assert refused
    for line in refused:
        assert "ulimit -n" in line, line
        assert "ower budget" not in line, line


def test_size_of_a_file(disk: str):
    """A limit on the size of files is no full disk."""
    body = """
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    from models import Block
    model = Stack(lambda: Block(256), 8, width=256)
    try:
        funicular.offload(model, world.policy(model))
    except funicular.Error as error:
        print(error)
    """
    (said,) = children.succeed(body, disk, PLACEMENTS["nvme-threads"], DEVICE)
    assert "ulimit -f" in said, said
    assert "ree some" not in said, said
    assert "ower budget" not in said, said
