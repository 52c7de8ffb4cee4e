"""What is left out above the last node read changes nothing, on a file of any architecture."""

from pathlib import Path

import numpy as np

from mia import Capture, Model, Request, Site, TokenLogits
from mia.sites import BY_KEY

TOKENS = (3, 17, 50)


def ends_early(path: Path) -> None:
    """A capture that is all that is read, beside the same with logits, for which every block runs; then
    a decode after it; and logits of a few tokens, beside those of all."""
    with Model(path, threads=1, ctx=64) as m:
        prompt = [t % m.n_vocab for t in (5, 40, 77, 60, 12, 26, 5, 8, 91)]
        sites = [s for s in m.topology.sites if s.layer is not None and s.name not in BY_KEY]
        for layer in range(m.n_layer):
            here = [s for s in sites if s.layer == layer]
            last = next(s for s in (Site("resid_post", layer), *here) if s in m.topology.sites)
            for site in {*here[:1], last, *here[-1:]}:
                read = Capture(site, tokens=slice(-4, None))
                early = m.run([Request(prompt, captures=[read], logits=None)])[0]
                whole = m.run([Request(prompt, captures=[read], logits=slice(-4, None))])[0]
                np.testing.assert_array_equal(early[site], whole[site], err_msg=str(site))
                again = m.run([Request(prompt, captures=[read], logits=slice(-4, None))])[0]
                np.testing.assert_array_equal(again.logits, whole.logits, err_msg=str(site))
        assert whole.logits is not None
        few = m.run([Request(prompt, logits=slice(-4, None), metric=TokenLogits(TOKENS))])[0]
        error = np.abs(few.value - whole.logits[:, TOKENS]).max() / np.ptp(whole.logits)
        assert error < 1e-5, f"logits of a few tokens are off by {error:.1e} of their range"
