/**
 * Texts and warnings that this pack shows in nodes, KSampler too: they stay after a run, and go when they no longer hold.
 *
 * The front end itself never takes a text away on request (it ignores an empty one), and from 1.58 it takes all away when a run
 * ends, before anyone has read them. Without this script the nodes show their texts as the front end does.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { isLive, WITH_PAIRS } from "./elements.js";

const EVENT = "progress_text";
const WIDGET = "$$node-text-preview"; // of the front end
const WARNING = "\u26a0"; // begins each warning, see nodes/types.py
const kept = new Map(); // node -> {nodeId, text}

/** The node of an execution id, such as "7", or "5:7" in a subgraph. */
function nodeOf(nodeId) {
    let graph = app.rootGraph ?? app.graph;
    let node = null;
    for (const part of String(nodeId).split(":")) {
        node = graph?.getNodeById(/^\d+$/.test(part) ? Number(part) : part);
        graph = node?.subgraph;
    }
    return node;
}

/** Whether a text is to stay: a warning, or one of our nodes. Where images have their captions beneath, they need no text. */
function stays(node, text) {
    if (text.startsWith(WARNING)) return true;
    const type = String(node.comfyClass ?? node.type);
    return type.startsWith("UniDiffuser") && !WITH_PAIRS.includes(type);
}

const placeOf = (node) => (node.widgets ?? []).findIndex((widget) => widget.name === WIDGET);

function onText({ detail: { nodeId, text } }) {
    const node = nodeOf(nodeId);
    if (!node) return;
    if (text && stays(node, text)) kept.set(node, { nodeId, text });
    else if (kept.delete(node) && !text) takeAway(node);
}

function takeAway(node) {
    const place = placeOf(node);
    if (place < 0) return;
    node.widgets[place].onRemove?.();
    node.widgets.splice(place, 1);
    node.setDirtyCanvas?.(true, true);
}

/** Show again what the front end has taken away, in its own way. */
function restore() {
    for (const [node, { nodeId, text }] of kept) {
        if (!isLive(node)) kept.delete(node);
        else if (node.graph === app.canvas.graph && placeOf(node) < 0) api.dispatchCustomEvent(EVENT, { nodeId, text });
    }
}

app.registerExtension({
    name: "UniDiffuser.NodeTexts",
    setup() {
        api.addEventListener(EVENT, onText);
        // The front end's own listeners of these events come first.
        const later = () => setTimeout(restore);
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(kind, later);
    },
});
