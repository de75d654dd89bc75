/** Elements of nodes, kept in their place by both renderers. */

/** Types of nodes that show images with their captions. */
export const WITH_PAIRS = ["UniDiffuserShowPairs", "UniDiffuserGibbsChain"];

const owners = new Map(); // element -> node

/** Whether a node is the one of its graph, and not replaced by an undo or by opening a workflow. */
export const isLive = (node) => !!node.graph && node.graph.getNodeById?.(node.id) === node;

/**
 * Add an element as the last widget of a node. It holds no value: workflows and prompts do not know it.
 *
 * @param {() => number} leastHeight of the widget
 */
export function addElement(node, name, element, leastHeight) {
    const widget = node.addDOMWidget(name, `unidiffuser_${name}`, element, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: leastHeight,
        getValue: () => "",
        setValue: () => {},
    });
    widget.serialize = false;
    owners.set(element, node);
    return widget;
}

/** Enlarge a new node to hold its widgets. */
export function makeRoom(node, leastWidth) {
    const [width, height] = node.computeSize?.() ?? node.size;
    node.setSize?.([Math.max(node.size[0], width, leastWidth), Math.max(node.size[1], height)]);
}

/**
 * Bring the elements of new nodes into view. The Vue renderer keeps the element of a node whose successor has the same id, as
 * after an undo.
 */
export function remount() {
    const lost = [];
    for (const [element, node] of owners) {
        const live = isLive(node);
        if (!live && !element.isConnected && node.graph) owners.delete(element); // of a workflow that was closed
        else if (live && !element.isConnected) lost.push([element, node]);
    }
    if (!lost.length) return;
    for (const [element, node] of owners) {
        if (!element.isConnected || isLive(node)) continue;
        const heir = lost.find(([other, next]) => next.id === node.id && next.type === node.type);
        if (!heir) continue;
        element.replaceWith(heir[0]);
        owners.delete(element);
    }
}
