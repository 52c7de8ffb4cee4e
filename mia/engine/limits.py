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
#: Few requests get MIN_SEQUENCES, more twice as many as they are, rounded up to a power of two (see
#: `sequences`).
MAX_SEQUENCES = 256
MIN_SEQUENCES = 16

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
LOGITS_BYTES = 48 << 20
MIN_OUTPUTS = 8


def sequences(n_jobs: int, n_vocab: int) -> int:
    """Sequences of a context that runs so many jobs together. llama.cpp keeps a row of logits for each,
    from the start: of a large vocabulary they stay within `LOGITS_BYTES`, and few jobs have few."""
    if n_jobs == 1:
        return 1
    enough = max(MIN_SEQUENCES, 1 << (2 * n_jobs - 1).bit_length())  # jobs, and where they fork
    return min(MAX_SEQUENCES, enough, max(MIN_OUTPUTS, LOGITS_BYTES // (4 * n_vocab)))


#: Of a stream (`mia.engine.stream`): cells of its cache, as far as `KV_BYTES` allows; requests that run
#: side by side; sequences beside them whose prefixes stay for later requests, in at most a part of the
#: cells. More of each serve more conversations. Guarded by "8 clients at once / one after the other"
#: (serve).
STREAM_CELLS = 8192
STREAM_REQUESTS = 16
STREAM_KEPT = 16
STREAM_KEPT_PART = 0.5
#: Every row passes over all cells in use, whichever sequence they belong to: on SmolLM2-135M 4000 kept
#: cells made a token cost a seventh more, on one thread. So only so many stay in the cache where the others
#: can be saved outside. Guarded by "the same, behind 16 other conversations" (serve).
STREAM_KEPT_CELLS = 256

#: Rows of prompts that a stream decodes at a time while other requests generate: their next tokens wait
#: for so many. Fewer share each weight that is read. No row guards it.
STREAM_ROWS = 64

#: A request shares a prefix of a stream that is at least so long, and waits for one that is being
#: decoded if that spares it WAIT_ROWS rows. No row guards them.
SHARED_ROWS = 4
WAIT_ROWS = 16

#: A segment with this many `Output.STATES` rows has them decoded apart from those whose logits are
#: read, so that the unembedding (a fifth of a small model's work) is left out for them. Below that
#: one more decode costs more. No row guards it: no row of the bench reads both the last block's
#: output at many tokens and logits.
STATES_APART = 16

#: This many prompts must be able to start from one unedited twin before it is decoded for them alone
#: (and it must spare what it costs). No row guards it: the bench has sweeps of hundreds, and single
#: requests.
MIN_RESUMED = 3

#: A batch of resumed segments runs from the lowest first block among them. After this many rows it
#: ends where the first block changes: fewer rows for each weight, but no block run in vain.
#: Guarded by "270 head replacements, one run / one by one".
RESUMED_ROWS = 32

#: llama.cpp attends over all cells up to the last in use, in steps of so many.
CELL_STEP = 256
#: Where attention is not fused, each step costs a row as much as UNFUSED_STEP / n_embd of all else:
#: measured on SmolLM2-135M in F32, 120 patches in batches of 232 rows (one step) took 0.88 of the time
#: that they took in batches of 300 (two). And a decode costs as much as DECODE_ROWS rows, whose
#: weights must be read. Fused attention passes over the cells of other sequences. Guarded by
#: "270 head replacements, one run / one by one" with an F32 file.
UNFUSED_STEP = 70
DECODE_ROWS = 8

#: After this many stops at blocks' inputs a session keeps them until a decode is over, which takes as
#: long as a thousand stops. No row guards it: each is far from it, on one side or the other.
KEPT_STOPS = 1000

#: Bytes that kept inputs may take. A model that needs more is so large that its stops are nothing
#: beside a token. Guarded by "decode of 64, every resid_post captured / llama.cpp".
KEPT_BYTES = 96 << 20

#: Bytes of a node that is only read up to which compiled code copies it and Python takes it behind the
#: decode. Above, copying twice takes longer than calling Python. Guarded by "decode of 64, every attn_out
#: captured / llama.cpp".
COPIED_BYTES = 64 << 10

#: A metric of more tokens than these has llama.cpp compute all logits: mia reads each token's row of the
#: unembedding and keeps it in float32. No row guards it: a sweep's metric is of one or two.
METRIC_TOKENS = 256
