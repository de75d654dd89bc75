/**
 * Draws while one types: with *Run (On Change)*, each letter typed into a workflow with a fast model counts as a change.
 *
 * The front end itself looks for changes when the text field is left. With a model of many steps that is better, since half a
 * word would start a long run. Without this script the image is drawn then.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const FAST = " (fast)"; // ends the model's name, see nodes/folders.py

/** All nodes of a workflow, those inside its subgraphs too. */
function* nodesOf(graph) {
    for (const node of graph?._nodes ?? []) {
        yield node;
        if (node.subgraph) yield* nodesOf(node.subgraph);
    }
}

function isFast() {
    for (const node of nodesOf(app.rootGraph ?? app.graph)) {
        if ((node.comfyClass ?? node.type) !== "UniDiffuserLoader") continue;
        if (String(node.widgets?.find((one) => one.name === "model_name")?.value).endsWith(FAST)) return true;
    }
    return false;
}

/** Tell the front end's queue of a change, which it heeds in the mode Run (On Change) only; undo still sees a text as a whole. */
function tellQueue() {
    const state = app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.activeState;
    api.dispatchCustomEvent?.("autoQueueGraphChanged");
    if (state) api.dispatchCustomEvent?.("graphChanged", state); // what front ends before 1.49 listen to
}

app.registerExtension({
    name: "UniDiffuser.Typing",
    setup() {
        document.addEventListener("input", ({ target }) => {
            // After a frame, since the Vue renderer gives the text to the widget late.
            if (target instanceof HTMLTextAreaElement && isFast()) requestAnimationFrame(tellQueue);
        });
    },
});
