"""Work in a forked child, for what may crash or hang: a fork takes a hundredth of a new process."""

import os
import select
import signal
import time
from collections.abc import Callable


def in_child(do: Callable[[], object], seconds: float = 20) -> str:
    """What `do` gives in a forked child, as text; an exception as its text; "hangs"; or the
    name of the signal that killed the child."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what an assertion says as it dies
        try:
            text = str(do())
        except BaseException as err:
            text = f"{type(err).__name__}: {err}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    said, end = b"", time.monotonic() + seconds
    while select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
        block = os.read(read, 1 << 16)
        if not block:
            break
        said += block
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        return "hangs"
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said.decode()
