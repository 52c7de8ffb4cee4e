"""The eval callback: what to do at which node of a graph while it is computed.

llama.cpp's scheduler asks for every node "do you want to see this one?" (`ask`),
computes up to it if the answer is yes, and calls again with the node's data in place.
`Tracer` answers from a list made beforehand, so a node that is not visited costs one
comparison, in compiled code (_watch.c) if there is some.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from mia.arrays import Array
from mia.llama.library import Tensor, library
from mia.llama.watch import ASK_PYTHON, CHANGE, COPY, EDIT, OPERATIONS, Change, Watch, native_watch

#: `enum ggml_tensor_flag` of ggml.h: nodes without it are not computed
FLAG_COMPUTE = 16


class Tracer:
    """Answers the scheduler while one decode runs.

    The caller says what it expects: the nodes' addresses in graph order, and which of
    them to report. If another graph comes, nothing more is computed in this decode and every node
    is recorded in `seen`; the caller looks at them, says anew what it expects, and decodes again.

    Compiled code, if there is some, answers the questions about expected nodes; all the rest
    comes to `_answer`.
    """

    def __init__(self) -> None:
        self.addrs: Sequence[int] = ()
        self.skip: Sequence[int] = ()
        self.requested: Container[int] = ()
        self.on_data: Callable[[int, int], None] = lambda index, addr: None
        self.seen: list[int] = []
        self.error: BaseException | None = None
        self._index = 0
        self._n = 0
        self._left_out: list[int] = []
        watch = native_watch()
        kind = library().L.ggml_backend_sched_eval_callback
        self._watch: Watch | None = None
        self._addrs = np.empty(0, np.uint64)
        if watch is None:
            self.callback, self.user_data = kind(self._answer), None
            return
        self._python = kind(self._answer_watch)
        is_host = library().base.ggml_backend_buffer_is_host
        self._watch = Watch(
            python=C.cast(self._python, C.c_void_p),
            is_host=C.cast(is_host, C.c_void_p),
            data=Tensor.data.offset,
        )
        self.callback = kind(("mia_watch", watch))
        self.user_data = C.addressof(self._watch)

    def expect(
        self,
        addrs: Sequence[int],
        requested: Mapping[int, object],
        skip: Sequence[int],
        on_data: Callable[[int, int], None],
    ) -> None:
        """`requested`: indices of the nodes to report with `on_data(index, address)` once computed;
        `skip`: of those not to compute in this decode."""
        if self._watch is not None:
            known = addrs is self.addrs
            self.addrs = ()  # nothing is expected, should Ctrl-C cut this short
            nodes = self._addrs if known else np.array(addrs, np.uint64)
            flags = np.zeros(len(addrs), np.uint8)
            flags[list(requested)] = 1
            if skip:
                flags[0] = ASK_PYTHON  # which leaves out the skipped ones then
            self._watch.addrs, self._watch.requested = nodes.ctypes.data, flags.ctypes.data
            n_bytes = np.zeros(len(addrs), np.uint64)
            self._watch.bytes = n_bytes.ctypes.data
            self._addrs, self._flags, self._n_bytes = nodes, flags, n_bytes  # kept alive
        self.addrs, self.requested, self.skip, self.on_data = addrs, requested, skip, on_data

    def copy(self, copies: Mapping[int, Array]) -> None:
        """After `expect`: float32 arrays for some of the requested nodes. Compiled code, if there is
        some, fills one with the node's numbers in place of reporting it, if they are as many, side
        by side and in the host's memory."""
        if self._watch is None or not copies:
            return
        indices = list(copies)
        to = np.zeros(len(self._flags), np.uint64)
        to[indices] = [a.ctypes.data for a in copies.values()]
        self._n_bytes[indices] = [a.nbytes for a in copies.values()]
        self._watch.to = to.ctypes.data
        self._copies = copies, to  # kept alive
        self._turn(indices, COPY)

    def change(self, changes: Mapping[int, tuple[int, Sequence[Change]]]) -> None:
        """After `expect`: for some of the requested nodes how many float32 numbers they have, and
        changes of them in order. Compiled code, if there is some, makes them in place of reporting the
        node, on the same conditions as `copy`. If a number would get too large none is made, and the
        node is reported."""
        if self._watch is None or not changes:
            return
        tables = []
        at, n = np.zeros((2, len(self._flags)), np.uint64)
        n_old = 0
        for index, (n_numbers, parts) in changes.items():
            rows = [
                (
                    OPERATIONS.index(c.operation),
                    c.first,
                    len(c.values),
                    c.row,
                    c.row_n,
                    c.largest,
                    c.values.ctypes.data,
                )
                for c in parts
            ]
            tables.append(table := np.array(rows, CHANGE))
            at[index], n[index], self._n_bytes[index] = table.ctypes.data, len(table), 4 * n_numbers
            n_old = max(n_old, int(table["n"].sum()))
        old = np.empty(n_old, np.float32)
        self._watch.changes, self._watch.n_changes = at.ctypes.data, n.ctypes.data
        self._watch.old = old.ctypes.data
        self._changes = changes, tables, at, n, old  # kept alive
        self._turn(list(changes), EDIT)

    def _turn(self, indices: list[int], flag: int) -> None:
        where = self._flags[indices]
        self._flags[indices] = np.where(where == ASK_PYTHON, ASK_PYTHON, flag)

    def begin(self) -> None:
        self._index, self._n, self.error = 0, len(self.addrs), None
        if self._watch is not None:
            self._watch.index, self._watch.n = 0, self._n
        self.seen.clear()

    def end(self) -> bool:
        """True if the graph was the expected one, to the last node."""
        if self._watch is not None:
            self._index = self._watch.index
        for addr in self._left_out:
            Tensor.from_address(addr).flags |= FLAG_COMPUTE
        self._left_out.clear()
        expected = not self.seen and self._index == len(self.addrs)
        if not expected and not self.seen:  # it ended early: these nodes were all
            self.seen.extend(self.addrs[: self._index])
        return expected

    def stop(self, error: BaseException) -> None:
        """Ends the decode at the next node; the error is raised when the library has returned."""
        if self.error is None:
            self.error = error
        self._n = 0
        if self._watch is not None:
            self._watch.n = 0

    def _answer_watch(self, addr: int, ask: bool, _: Any) -> bool:
        watch = self._watch
        assert watch is not None
        self._index = watch.index
        answer = self._answer(addr, ask, None)
        watch.index, watch.n = self._index, self._n
        return answer

    def _answer(self, addr: int, ask: bool, _: Any) -> bool:
        if ask:
            i = self._index
            if i < self._n and self.addrs[i] == addr:
                self._index = i + 1
                if i == 0 and self.skip:
                    for skipped in self.skip:
                        self._leave_out(self.addrs[skipped])
                return i in self.requested
            return self._unexpected(addr)
        if self.error is not None:
            return False
        try:
            if not self.seen:
                self.on_data(self._index - 1, addr)
        except BaseException as err:
            self.stop(err)
            return False
        return True

    def _unexpected(self, addr: int) -> bool:
        if self.error is not None:
            return True  # so that we are called with the data, and can say stop
        if not self.seen:
            # the nodes before this one were the expected ones, and are already decided
            self.seen.extend(self.addrs[: self._index])
            self._n = 0
        self.seen.append(addr)
        self._leave_out(addr)
        return False

    def _leave_out(self, addr: int) -> None:
        """Takes a node out of this decode: every ggml backend passes over nodes without the flag."""
        t = Tensor.from_address(addr)
        if t.flags & FLAG_COMPUTE:
            t.flags &= ~FLAG_COMPUTE
            self._left_out.append(addr)
