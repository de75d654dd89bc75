"""Blueprints: ready subgraphs in the front end's format, with sockets and widgets of their inner nodes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flow import COLUMN, VERSION, Flow, Node, Out, join, kind_of

GRAPH_IN, GRAPH_OUT = -10, -20  # the front end's ids of a subgraph's input and output node
INPUT = "@image"  # placeholder for the node that gives the image
LINK_KEYS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
ROW = 20  # between the slots of a subgraph's input or output node


@dataclass(frozen=True)
class Ready:
    """What a blueprint shows of its inner nodes: outputs by name, and widgets (node, input) by label."""

    outputs: dict[str, Out]
    widgets: dict[str, tuple[Node, str]] = field(default_factory=dict)


def blueprint(flow: Flow, build: Callable[[Out], Ready], takes_image: bool = True) -> dict[str, Any]:
    """The blueprint of a flow; `build` takes the image input, if there is one, and returns what the blueprint shows."""
    flow.info = {**flow.info, INPUT: {"output": ["IMAGE"]}}
    ready = build(Out(Node(GRAPH_IN, INPUT, (0, 0), {}), 0))
    kinds = {name: flow.info[out.node.kind]["output"][out.slot] for name, out in ready.outputs.items()}
    links: list[list[Any]] = []
    nodes = [flow.front_end_node(node, links) for node in flow.nodes]
    inputs: list[dict[str, Any]] = [{"name": "image", "type": "IMAGE"}] if takes_image else []
    for label, (node, name) in ready.widgets.items():
        kind = kind_of(flow.slots(node.kind)[name])
        slots = nodes[node.number - 1]["inputs"]
        links.append([len(links) + 1, GRAPH_IN, len(inputs), node.number, len(slots), kind])
        slots.append({"name": name, "type": kind, "widget": {"name": name}, "link": len(links)})
        inputs.append({"name": label, "type": kind, "widget": {"name": label}})
    for slot, (name, out) in enumerate(ready.outputs.items()):
        links.append([len(links) + 1, out.node.number, out.slot, GRAPH_OUT, slot, kinds[name]])
    join(nodes, links)
    ident = str(uuid.uuid5(uuid.NAMESPACE_URL, f"unidiffuser/{flow.title}"))
    right = max(node.at[0] for node in flow.nodes) + COLUMN

    def sockets(named: Sequence[tuple[str, str]], end: int, of: int, x: int) -> list[dict[str, Any]]:
        return [
            {
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{ident}/{name}")),
                "name": name,
                "type": kind,
                "linkIds": [link[0] for link in links if link[end] == of and link[end + 1] == slot],
                "pos": [x, ROW * (slot + 1)],
            }
            for slot, (name, kind) in enumerate(named)
        ]

    subgraph = {
        "id": ident,
        "version": 1,
        "revision": 0,
        "config": {},
        "name": flow.title,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": GRAPH_IN, "bounding": [-200, 0, 120, ROW * (len(inputs) + 2)]},
        "outputNode": {"id": GRAPH_OUT, "bounding": [right, 0, 120, ROW * (len(kinds) + 2)]},
        "inputs": sockets([(given["name"], given["type"]) for given in inputs], 1, GRAPH_IN, -100),
        "outputs": sockets(list(kinds.items()), 3, GRAPH_OUT, right + 20),
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [dict(zip(LINK_KEYS, link, strict=True)) for link in links],
        "extra": {},
    }
    shown = [[str(node.number), name] for node, name in ready.widgets.values()]
    holder = {
        "id": 1,
        "type": ident,
        "pos": [0, 0],
        "size": [330, 90 + 26 * len(shown)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "title": flow.title,
        "inputs": [{**given, "link": None} for given in inputs],
        "outputs": [{"name": name, "type": kind, "links": None} for name, kind in kinds.items()],
        "properties": {"proxyWidgets": shown, "cnr_id": "unidiffuser", "ver": VERSION},
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [holder],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }
