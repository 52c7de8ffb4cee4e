"""A small task on a tiny model."""

import pytest
from letters import SETUP, TASK
from tiny import Tiny

from mia.methods.icl import IclExperiment


@pytest.fixture
def ex(llama: Tiny) -> IclExperiment:
    return IclExperiment(llama.model, TASK, SETUP)
