"""From what is asked for to the grid of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mia.errors import SiteError, UsageError
from mia.ranges import Ranges, indices, parse_layers, parse_tokens
from mia.sites import BY_KEY, HEADED, KINDS, Site
from mia.sweeps.axes import Axis, Grid, Place
from mia.sweeps.experiments import Case, Experiment

if TYPE_CHECKING:
    from mia.model import Model


@dataclass(frozen=True, eq=False)
class Choice:
    """What the axes run over, and what is the same in every cell; None for all, or for what the
    experiment has itself."""

    experiment: Experiment
    site: str | Sequence[str] | None
    layers: Ranges | None
    tokens: Ranges | None
    heads: Ranges | None
    neurons: Ranges | None
    coeffs: Sequence[float] | None
    window: int

    def grid(self, model: Model, case: Case, names: Sequence[str]) -> Grid:
        """Raises `UsageError`, `RangeError` or `SiteError` for what the model or the experiment
        has not."""
        self._check_axes(names)
        sites = self._sites()
        layered = [s for s in sites if KINDS[s].layered]
        if "layer" in names and len(layered) < len(sites):
            bare = next(s for s in sites if s not in layered)
            raise UsageError(f"{bare} has no layers: it cannot be swept over them")
        layers = self._layers(model.n_layer)
        several: dict[str, list[Any]] = {
            "layer": layers,
            "token": self._tokens(case),
            "site": sites,
            "coeff": [1.0] if self.coeffs is None else list(self.coeffs),
            "head": self._in_row(model, sites, layers, "head", names),
            "neuron": self._in_row(model, sites, layers, "neuron", names),
        }
        for name in ("site", "coeff"):
            if name not in names and len(several[name]) > 1:
                raise UsageError(f"several values of {name} need the axis {name}")
        self.experiment.check(names, several["token"], case)
        rest = Place(
            sites[0],
            tuple(layers),
            tuple(several["token"]),
            None if self.heads is None else tuple(several["head"]),
            None if self.neurons is None else tuple(several["neuron"]),
            several["coeff"][0],
        )
        axes = tuple(
            Axis(name, tuple(several[name]), _labels(model, case, name, several[name]))
            for name in names
        )
        return Grid(axes, rest, model.n_layer, self.window)

    def _check_axes(self, names: Sequence[str]) -> None:
        """Refuses what would do nothing."""
        known = self.experiment.axes
        given = {"head": self.heads, "neuron": self.neurons, "coeff": self.coeffs}
        asked = [*names, *(name for name, value in given.items() if value is not None)]
        for name in asked:
            if name not in known:
                raise UsageError(
                    f"{self.experiment.title}: there is no {name} to choose, only {', '.join(known)}"
                )

    def _sites(self) -> list[str]:
        own = self.experiment.site
        if self.site is None:
            return [own or "resid_post"]
        sites = [self.site] if isinstance(self.site, str) else list(self.site)
        for site in sites:
            if site not in KINDS:
                raise UsageError(f"unknown site {site!r}; known: {', '.join(KINDS)}")
            if own is not None and site != own:
                raise UsageError(f"{self.experiment.title}: the site is {own}, not {site}")
        return sites

    def _layers(self, n_layer: int) -> list[int]:
        own = self.experiment.layers
        if self.layers is None:
            return list(range(n_layer) if own is None else own)
        layers = parse_layers(self.layers, n_layer)
        for layer in layers:
            if own is not None and layer not in own:
                raise UsageError(f"{self.experiment.title}: there is no layer {layer} to choose")
        return layers

    def _tokens(self, case: Case) -> list[int]:
        if self.tokens is None:
            return list(case.tokens)
        tokens = parse_tokens(self.tokens, len(case.base.tokens), "tokens of the sweep")
        for token in tokens:
            if token not in case.tokens:
                raise UsageError(f"token {token} has no partner in the other prompt")
        return tokens

    def _in_row(
        self,
        model: Model,
        sites: Sequence[str],
        layers: Sequence[int],
        axis: str,
        names: Sequence[str],
    ) -> list[int]:
        """Heads, or neurons of a head or row: those given, or all that every site has."""
        given = self.heads if axis == "head" else self.neurons
        if given is None and axis not in names:
            return []
        for name in sites:
            if axis == "head" and name not in HEADED:
                raise UsageError(f"{name} has no heads; {', '.join(HEADED)} have")
            if axis == "neuron" and name in BY_KEY:
                raise UsageError(f"{name} has keys, no neurons")
        topology = model.unfused_topology if any(s in BY_KEY for s in sites) else model.topology
        sizes: dict[int, Site] = {}
        for name in sites:
            for layer in layers if KINDS[name].layered else [None]:
                site = Site(name, layer)
                node = topology.sites.get(site)
                if node is None:
                    raise SiteError(topology.absence(site))
                sizes[node.shape[0 if axis == "head" else -1]] = site
        if given is None and len(sizes) > 1:
            said = ", ".join(f"{site} {n}" for n, site in sorted(sizes.items()))
            raise UsageError(f"the sites have unequal numbers of {axis}s ({said}): say which")
        n = min(sizes)
        return list(range(n)) if given is None else indices(given, n, f"{axis}s")


def _labels(model: Model, case: Case, name: str, values: Sequence[Any]) -> tuple[str, ...]:
    if name != "token":
        return ()
    rows = model.token_rows(case.base.tokens)
    return tuple(rows[i].label for i in values)
