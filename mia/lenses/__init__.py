"""From residual vectors to scores over the vocabulary.

`logit_lens` is the lens and `readout` what it reads, `walk` reads its steps off the graph, `linear` splits a sum through
them, `top_k` keeps the best tokens.
"""

from mia.lenses.logit_lens import LogitLens as LogitLens
from mia.lenses.readout import Readout as Readout
