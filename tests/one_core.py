"""A process of pytest-xdist keeps to its share of the cores, and so does all that it starts.

conftest imports this first: numpy's threads are counted when it is imported, and mia counts the cores
that it may use. Two processes with two threads each would wait for each other.
"""

import os
import sys


def keep_to_a_share() -> None:
    name = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, …
    if not name or sys.platform != "linux":
        return
    cores = sorted(os.sched_getaffinity(0))
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    share = cores[int(name.removeprefix("gw")) % count :: count]
    if share:  # where there are more processes than cores, some have none of their own
        os.sched_setaffinity(0, share)


keep_to_a_share()
