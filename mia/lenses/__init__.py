"""From residual vectors to scores over the vocabulary."""

from mia.lenses.logit_lens import LogitLens as LogitLens
from mia.lenses.logit_lens import Readout as Readout
