"""What tests of compiled code share."""

import pytest

from mia.engine.visits import Visits


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes at which Python was called."""
    nodes: list[int] = []
    plain = Visits.visit

    def visit(self: Visits, index: int, addr: int) -> None:
        nodes.append(index)
        plain(self, index, addr)

    monkeypatch.setattr(Visits, "visit", visit)
    return nodes
