"""Every constant of the engine that was tuned, what it trades, and which row of the bench guards it.

The rows are those that `scripts/bench` prints. Look a constant up here before you change it,
change it, and run the part of the bench that is named.
"""

from __future__ import annotations

#: Rows of one decode (llama.cpp's n_ubatch). More rows share each weight that is read, but the
#: compute buffers grow with them. Guarded by "prefill of 256, every resid_post captured" (speed)
#: and "5 prompts × every head, this machine, peak memory".
UBATCH = 512

#: Sequences of a context that runs several requests; llama.cpp allows no more. A single request
#: gets a context of one: the bookkeeping for many costs it a hundredth of each token. Guarded by
#: "270 head replacements, one run / one by one" (many) and "decode of 64, nothing changed" (one).
MAX_SEQUENCES = 256

#: Bytes that the KV cache may take so that requests run side by side; one long request may take
#: more. Guarded by "5 prompts × every head, this machine, peak memory".
KV_BYTES = 512 << 20

#: Cells for requests that run side by side: CELLS_PER_EMBD * n_embd, at least MIN_CELLS. Every row
#: of a batch attends over all cells in use, masked or not, so beyond a few times n_embd the
#: attention to other requests' cells costs more than fewer decodes save. Guarded by
#: "function vector: 100 prompts, 25 × 270 head effects, seconds".
CELLS_PER_EMBD = 3
MIN_CELLS = 1024

#: Bytes of logits that one decode may produce, and the fewest outputs that it may have all the
#: same. More outputs make fewer decodes; llama.cpp's output buffer grows with them. Guarded by
#: "5 prompts × every head, this machine, peak memory".
LOGITS_BYTES = 64 << 20
MIN_OUTPUTS = 8

#: A segment with this many `Output.STATES` rows has them decoded apart from those whose logits are
#: read, so that the unembedding (a fifth of a small model's work) is left out for them. Below that
#: one more decode costs more. No row guards it: no row of the bench reads both the last block's
#: output at many tokens and logits.
STATES_APART = 16

#: This many segments must be able to start from one unedited twin before the twin is decoded for
#: them alone. No row guards it: the bench has sweeps of hundreds, and single requests.
MIN_RESUMED = 3

#: A batch of resumed segments runs from the lowest first block among them. After this many rows it
#: ends where the first block changes: fewer rows for each weight, but no block run in vain.
#: Guarded by "270 head replacements, one run / one by one".
RESUMED_ROWS = 32
