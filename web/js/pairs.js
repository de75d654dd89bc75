/**
 * Images with their captions beneath, in Show Pairs and in UniDiffuser Gibbs Chain, which grows round by round.
 *
 * Without this script the nodes show the images as every node does, and the captions as a text.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { addElement, makeRoom, WITH_PAIRS } from "./elements.js";

const SHOWN = "unidiffuser_captions"; // in nodes/nodes_pairs.py
const WIDGET = "pairs";
const [LEAST_WIDTH, LEAST_HEIGHT] = [320, 220];
const CSS = `
.ud-pairs {
    box-sizing: border-box; width: 100%; height: 100%; min-height: 180px; overflow: auto; padding: 8px; border-radius: 8px;
    background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 12px/1.35 Inter, system-ui, sans-serif;
    display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); align-content: start;
}
.ud-pairs:empty::before { content: attr(data-empty); color: var(--descrip-text, #999); grid-column: 1 / -1; align-self: center; text-align: center; }
.ud-pairs:empty { align-content: center; }
.ud-pairs figure { margin: 0; min-width: 0; display: flex; flex-direction: column; gap: 5px; }
.ud-pairs a { display: block; line-height: 0; border-radius: 5px; overflow: hidden; outline-offset: 2px; }
.ud-pairs img { width: 100%; height: auto; image-rendering: auto; background: var(--border-color, #444); }
.ud-pairs figcaption { overflow-wrap: anywhere; user-select: text; -webkit-user-select: text; cursor: text; }
.ud-pairs figcaption small { color: var(--descrip-text, #999); margin-right: 5px; font-variant-numeric: tabular-nums; }
`;
const EMPTY = { en: "Images and captions appear here.", zh: "图像和描述将显示在这里。" };

function addStyle() {
    if (document.getElementById("ud-pairs-style")) return;
    const style = document.createElement("style");
    style.id = "ud-pairs-style";
    style.textContent = CSS;
    document.head.append(style);
}

function figure({ filename, subfolder, type }, caption, number) {
    const address = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    const element = document.createElement("figure");
    const link = document.createElement("a");
    Object.assign(link, { href: address, target: "_blank", rel: "noopener", title: filename });
    const image = document.createElement("img");
    Object.assign(image, { src: address, alt: caption, loading: "lazy" });
    link.append(image);
    const text = document.createElement("figcaption");
    if (number) {
        const small = document.createElement("small");
        small.textContent = number;
        text.append(small);
    }
    text.append(caption);
    element.append(link, text);
    return element;
}

/** The gallery of one node. */
class Gallery {
    constructor(node, numbered) {
        addStyle();
        this.numbered = numbered;
        this.keys = [];
        this.element = document.createElement("div");
        this.element.className = "ud-pairs";
        const locale = String(app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en");
        this.element.dataset.empty = locale.startsWith("zh") ? EMPTY.zh : EMPTY.en;
        node.hideOutputImages = true; // in the Vue renderer
        node.onDrawBackground = () => {}; // in the classic renderer
        addElement(node, WIDGET, this.element, () => LEAST_HEIGHT);
        makeRoom(node, LEAST_WIDTH);
        const executed = node.onExecuted;
        node.onExecuted = (output, ...rest) => {
            executed?.call(node, output, ...rest);
            if (output?.[SHOWN]) this.show(output.images ?? [], output[SHOWN]);
        };
    }

    /** Show pairs; those that are already there stay, so that a growing strip does not flicker. */
    show(images, captions) {
        const keys = images.map((image, k) => JSON.stringify([image.type, image.subfolder, image.filename, captions[k]]));
        let kept = 0;
        while (kept < keys.length && keys[kept] === this.keys[kept]) kept++;
        while (this.element.children.length > kept) this.element.lastChild.remove();
        const number = (k) => (this.numbered ? String(k + 1) : "");
        this.element.append(...images.slice(kept).map((image, k) => figure(image, captions[kept + k] ?? "", number(kept + k))));
        this.keys = keys;
        if (this.numbered) this.element.scrollTop = this.element.scrollHeight;
    }
}

/** Show the results that the front end kept for the nodes of a workflow, after it was opened again. */
function restore() {
    for (const node of app.graph?._nodes ?? []) {
        const kept = app.nodeOutputs?.[node.id];
        if (WITH_PAIRS.includes(node.comfyClass ?? node.type) && kept?.[SHOWN]) node.onExecuted?.(kept);
    }
}

app.registerExtension({
    name: "UniDiffuser.Pairs",
    nodeCreated(node) {
        const type = node.comfyClass ?? node.type;
        if (WITH_PAIRS.includes(type) && node.addDOMWidget) new Gallery(node, type === "UniDiffuserGibbsChain");
    },
    afterConfigureGraph() {
        restore();
    },
});
