"""Blueprints: ready subgraphs with one IMAGE input, in the front end's format."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from flow import COLUMN, VERSION, Flow, Node, Out, join

GRAPH_IN, GRAPH_OUT = -10, -20  # the front end's ids of a subgraph's input and output node
INPUT = "@image"  # placeholder for the node that gives the image
LINK_KEYS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def blueprint(flow: Flow, build: Callable[[Out], dict[str, Out]]) -> dict[str, Any]:
    """The blueprint of a flow; `build` takes the image input and returns the outputs by name."""
    flow.info = {**flow.info, INPUT: {"output": ["IMAGE"]}}
    outputs = build(Out(Node(GRAPH_IN, INPUT, (0, 0), {}), 0))
    kinds = {name: flow.info[out.node.kind]["output"][out.slot] for name, out in outputs.items()}
    links: list[list[Any]] = []
    nodes = [flow.front_end_node(node, links) for node in flow.nodes]
    for slot, (name, out) in enumerate(outputs.items()):
        links.append([len(links) + 1, out.node.number, out.slot, GRAPH_OUT, slot, kinds[name]])
    join(nodes, links)
    ident = str(uuid.uuid5(uuid.NAMESPACE_URL, f"unidiffuser/{flow.title}"))
    right = max(node.at[0] for node in flow.nodes) + COLUMN

    def socket(name: str, kind: str, wanted: list[int], x: int) -> dict[str, Any]:
        unique = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{ident}/{name}"))
        return {"id": unique, "name": name, "type": kind, "linkIds": wanted, "pos": [x, 20]}

    into = [link[0] for link in links if link[1] == GRAPH_IN]
    ends = [[link[0] for link in links if link[3] == GRAPH_OUT and link[4] == slot] for slot in range(len(outputs))]
    subgraph = {
        "id": ident,
        "version": 1,
        "revision": 0,
        "config": {},
        "name": flow.title,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": GRAPH_IN, "bounding": [-200, 0, 120, 60]},
        "outputNode": {"id": GRAPH_OUT, "bounding": [right, 0, 120, 60]},
        "inputs": [socket("image", "IMAGE", into, -100)],
        "outputs": [socket(name, kinds[name], ends[slot], right + 20) for slot, name in enumerate(outputs)],
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [dict(zip(LINK_KEYS, link, strict=True)) for link in links],
        "extra": {},
    }
    holder = {
        "id": 1,
        "type": ident,
        "pos": [0, 0],
        "size": [300, 90],
        "flags": {},
        "order": 0,
        "mode": 0,
        "title": flow.title,
        "inputs": [{"name": "image", "type": "IMAGE", "link": None}],
        "outputs": [{"name": name, "type": kind, "links": None} for name, kind in kinds.items()],
        "properties": {"cnr_id": "unidiffuser", "ver": VERSION},
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
