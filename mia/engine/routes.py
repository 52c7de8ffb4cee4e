"""How layers of experts choose: the router's logits, the chosen experts, their weights.

Names do not tell: llama.cpp calls logits `ffn_moe_probs` where the softmax is over the chosen
experts only. So the search goes from the chosen experts back to what was compared, and on to what
their outputs are multiplied by.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mia.engine.blocks import Part
from mia.engine.nodes import Graph

#: why a dense model has no such sites
NONE = "this model has no experts"
#: operations that make scores of a router's logits
_GATES = {"SOFT_MAX": "softmax", "SIGMOID": "sigmoid", "SQRT": "sqrt_softplus"}


@dataclass(frozen=True, slots=True)
class Route:
    """How one layer chooses: indices of the nodes of the router's logits, of what the choice
    compares if a bias was added to it, of the chosen experts and of their weights.

    `gate`: what makes scores of the logits: "softmax", "sigmoid" or "sqrt_softplus".
    """

    router: int
    choice: int | None
    ids: int
    weights: int
    n_expert: int
    gate: str


class Routes:
    """The routes of a graph, by layer."""

    def __init__(self, graph: Graph):
        self._graph = graph
        chosen: dict[int, list[int]] = defaultdict(list)
        for i, n in enumerate(graph.nodes):
            name, _, layer = n.name.rpartition("-")
            if name == "ffn_moe_topk" and layer.isdigit():
                chosen[int(layer)].append(i)
        self._chosen = set(chosen)
        routes = {k: self._route(k, ids[0]) for k, ids in chosen.items() if len(ids) == 1}
        self.by_layer = {layer: r for layer, r in routes.items() if r is not None}

    def part(self, name: str, layer: int) -> Part:
        """The node of `router`, `router_choice`, `experts` or `expert_weights`."""
        route = self.by_layer.get(layer)
        if route is None:
            return Part(None, self._why_none(layer))
        index = {
            "router": route.router,
            "router_choice": route.choice,
            "experts": route.ids,
            "expert_weights": route.weights,
        }[name]
        return Part(index, "" if index is not None else "this router chooses without a bias")

    def _why_none(self, layer: int) -> str:
        if layer in self._chosen:
            return "mia cannot read how this layer chooses its experts"
        return "this layer has no experts" if self._chosen else NONE

    def _route(self, layer: int, ids: int) -> Route | None:
        """None where a table chooses, not a router."""
        graph = self._graph
        topk = graph.nodes[ids]
        if not topk.src or graph.node(topk.src[0]).op not in ("ARGSORT", "TOP_K"):
            return None
        users = graph.users[topk.addr]
        picked = next((u for u in users if graph.nodes[u].op == "GET_ROWS"), None)
        weighted = graph.named.get(f"ffn_moe_weighted-{layer}")
        if picked is None or weighted is None:
            return None
        scores = graph.node(graph.root(graph.nodes[picked].src[0]))
        logits, gate = scores, "softmax"  # over the chosen ones, if there is no node of it
        if scores.op in _GATES:
            logits, gate = graph.node(scores.src[0]), _GATES[scores.op]
            if scores.op == "SQRT":  # of a softplus
                logits = graph.node(logits.src[0])
        weights = graph.index.get(graph.root(graph.nodes[weighted].src[1]))
        router = graph.index.get(logits.addr)
        if weights is None or router is None:
            return None
        bias = graph.named.get(f"ffn_moe_probs_biased-{layer}")
        if bias is not None and graph.nodes[bias].op != "ADD":
            bias = None
        return Route(router, bias, ids, weights, n_expert=logits.ne[0], gate=gate)
