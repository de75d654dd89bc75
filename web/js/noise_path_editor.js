/**
 * UniDiffuser Noise Path: the square of the two noise levels as the control of the node.
 *
 * The node's own widgets hold all values; the square only shows and sets them, so a workflow, a prompt and an undo know nothing of
 * it, and the node works without it.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addElement, isLive, makeRoom, remount } from "./elements.js";
import { NoiseSquare } from "./noise_path/square.js";
import { wordsOf } from "./noise_path/words.js";

const NODE = "UniDiffuserNoisePath";
const SHOWN = "unidiffuser_path"; // in nodes/nodes_path.py
const WIDGET = "path";
const [LEAST_WIDTH, LEAST_HEIGHT] = [320, 390]; // of the node, and of the widget in it
const LINKED_BY = { start: ["start", "hold"], end: ["hold"], line: ["hold"], speeds: ["speed_image", "speed_text"] };
const editors = new Set();

/** One node seen by its square. */
class EditedNode {
    constructor(node) {
        this.node = node;
        this.words = wordsOf(app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en");
        this.ran = null;
    }

    /** The values by the names of the node's inputs, without the prefix of the task. */
    values() {
        const named = (this.node.widgets ?? []).map((widget) => [widget.name.replace(/^task\./, ""), widget.value]);
        return Object.fromEntries(named.filter(([name]) => name !== WIDGET));
    }

    widget(name) {
        const widgets = this.node.widgets ?? [];
        return widgets.find((one) => one.name === name) ?? widgets.find((one) => one.name === `task.${name}`);
    }

    /** Set values; the task first, because it brings its own widgets. */
    set(changes) {
        const { task, ...others } = changes;
        if (task !== undefined && task !== this.values().task) this.setOne("task", task);
        for (const [name, value] of Object.entries(others)) this.setOne(name, value);
        this.ran = null;
        this.node.setDirtyCanvas?.(true, true);
    }

    setOne(name, value) {
        const widget = this.widget(name);
        if (!widget || widget.value === value) return;
        widget.value = value;
        showValue(widget, value);
        widget.callback?.(value, app.canvas, this.node);
    }

    /** One step of the front end's undo, after two frames: a new task changes the height, which the Vue renderer measures. */
    commit() {
        const capture = () => {
            const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
            if (tracker?.captureCanvasState) tracker.captureCanvasState();
            else tracker?.checkState?.();
        };
        requestAnimationFrame(() => requestAnimationFrame(capture));
    }

    linkedInputs() {
        const inputs = (this.node.inputs ?? []).filter((input) => input.link != null && input.name !== "spacing");
        return inputs.map((input) => input.name.replace(/^task\./, ""));
    }

    /** Whether a value behind a handle comes from a link. */
    isLinked(id) {
        const linked = this.linkedInputs();
        const { task } = this.values();
        if (task === "drawn") return linked.includes("points");
        if (task === "joint" && id === "start") return linked.some((name) => name.endsWith("_start"));
        if (task === "through a corner") return [`image_${id}`, `text_${id}`].some((name) => linked.includes(name));
        return (LINKED_BY[id] ?? []).some((name) => linked.includes(name));
    }

    /** The points of the last run, where links hold values that are not known before it. */
    executed() {
        return this.ran && this.linkedInputs().length ? this.ran : null;
    }

    /** What the drawing depends on. */
    signature() {
        return JSON.stringify([this.values(), this.linkedInputs(), this.ran]);
    }

    /** Whether a node samples along this node's path. */
    feeds(id) {
        const { graph, outputs } = this.node;
        const seen = new Set();
        const follow = (links) =>
            (links ?? []).some((key) => {
                const link = graph.links?.get?.(key) ?? graph.links?.[key];
                if (!link || seen.has(key)) return false;
                seen.add(key);
                if (String(link.target_id) === id) return true;
                const next = graph.getNodeById(link.target_id);
                return next?.type === "Reroute" && follow(next.outputs?.[0]?.links);
            });
        return !!graph && (outputs ?? []).some((output) => follow(output.links));
    }
}

/**
 * Let the Vue renderer show a value. The dynamic combo of older front ends has a `value` of its own, which the renderer does not
 * know, so the one of its class is set too.
 */
function showValue(widget, value) {
    if (!Object.getOwnPropertyDescriptor(widget, "value")?.set) return;
    for (let type = Object.getPrototypeOf(widget); type; type = Object.getPrototypeOf(type)) {
        const { set } = Object.getOwnPropertyDescriptor(type, "value") ?? {};
        if (set) return set.call(widget, value);
    }
}

/** An editor in a node: the square, and what keeps it up to date. */
class Editor {
    constructor(node) {
        this.edited = new EditedNode(node);
        this.square = new NoiseSquare(this.edited);
        this.seen = this.edited.signature();
        const { element } = this.square;
        addElement(node, WIDGET, element, () => LEAST_HEIGHT);
        forwardToCanvas(element);
        const configured = node.onConfigure;
        node.onConfigure = (form, ...rest) => {
            configured?.call(node, form, ...rest);
            this.restore(form);
        };
        const executed = node.onExecuted;
        node.onExecuted = (output, ...rest) => {
            executed?.call(node, output, ...rest);
            if (output?.[SHOWN]) this.edited.ran = output[SHOWN];
        };
        const removed = node.onRemoved;
        node.onRemoved = (...rest) => {
            removed?.apply(node, rest);
            editors.delete(this);
        };
        const added = node.onAdded;
        node.onAdded = (...rest) => {
            added?.apply(node, rest);
            editors.add(this);
        };
        editors.add(this);
        makeRoom(node, LEAST_WIDTH);
    }

    /** Bring back what setting the task of a loaded node loses: the saved height, and in older front ends the shown task. */
    restore({ size }) {
        const { node } = this.edited;
        const task = this.edited.widget("task");
        if (task) showValue(task, task.value);
        if (size?.[1] > node.size[1]) node.setSize([node.size[0], size[1]]);
    }

    /** Whether another workflow took the place of the node's. */
    isGone() {
        const { node } = this.edited;
        return !!node.graph && !isLive(node) && !this.square.element.isConnected;
    }

    /** Draw again if a value was typed, loaded, undone or linked. */
    follow() {
        if (!this.square.element.isConnected || !isLive(this.edited.node)) return;
        const now = this.edited.signature();
        if (now === this.seen) return;
        this.seen = now;
        this.square.render();
    }
}

/**
 * Put the inputs of a new node in the order that a loaded one has. Older front ends put those of the task before the task, so that
 * an undo, which loads the graph, would look like a change and forget what can be done again.
 */
function orderInputs({ inputs = [] }) {
    const first = inputs.findIndex((input) => input.name.startsWith("task."));
    const task = inputs.findIndex((input) => input.name === "task");
    if (first >= 0 && task > first) inputs.splice(first, 0, ...inputs.splice(task, 1));
}

/** In the classic renderer the square lies over the canvas: zoom and pan go through it, as through the host's own widgets. */
function forwardToCanvas(element) {
    const classic = () => !window.LiteGraph?.vueNodesMode;
    element.addEventListener("wheel", (event) => {
        if (!classic()) return;
        event.preventDefault();
        app.canvas.processMouseWheel(event);
    });
    const forward = (kind, handler, wanted) =>
        element.addEventListener(kind, (event) => classic() && wanted(event) && app.canvas[handler](event));
    forward("pointerdown", "processMouseDown", (event) => event.button === 1);
    forward("pointermove", "processMouseMove", (event) => (event.buttons & 4) !== 0);
    forward("pointerup", "processMouseUp", (event) => event.button === 1);
}

function followAll() {
    remount();
    for (const editor of editors) {
        if (editor.isGone()) editors.delete(editor);
        else editor.follow();
    }
    requestAnimationFrame(followAll);
}

function onProgress({ detail }) {
    const id = String(detail.node ?? "").split(":").at(-1);
    for (const { square, edited } of editors) {
        if (square.points.length - 1 === detail.max && edited.feeds(id)) square.setMarker(detail.value);
    }
}

function onEnd() {
    for (const { square } of editors) if (square.marker !== null) square.setMarker(null);
}

app.registerExtension({
    name: "UniDiffuser.NoisePathEditor",
    setup() {
        api.addEventListener("progress", onProgress);
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(kind, onEnd);
        followAll();
    },
    nodeCreated(node) {
        if ((node.comfyClass ?? node.type) !== NODE) return;
        orderInputs(node);
        if (node.addDOMWidget) new Editor(node);
    },
});
