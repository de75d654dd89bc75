/**
 * An image of one's own in UniDiffuser Example Image: by a button, or dropped on the node.
 *
 * Without this script the node still offers its examples, and takes the name of any image in the input folder.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODE = "UniDiffuserExamplePicture";
const IMAGES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LABELS = { en: "your own image", zh: "自己的图像" };

const toast = (detail) => app.extensionManager?.toast?.add?.({ severity: "error", summary: "UniDiffuser", detail, life: 8000 });

/** Upload a file into the input folder and choose it. */
async function upload(node, file) {
    const body = new FormData();
    body.append("image", file);
    const answer = await api.fetchApi("/upload/image", { method: "POST", body });
    if (answer.status !== 200) return toast(`${file.name}: ${answer.status} ${answer.statusText}`);
    const { name, subfolder } = await answer.json();
    choose(node, subfolder ? `${subfolder}/${name}` : name);
    show(node, name, subfolder);
    return true;
}

function choose(node, value) {
    const widget = node.widgets.find((one) => one.name === "picture");
    const values = widget.options?.values;
    if (Array.isArray(values) && !values.includes(value)) widget.options.values = [...values, value];
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

/** Show the image before the first run. */
function show(node, filename, subfolder) {
    const image = new Image();
    image.onload = () => {
        node.imgs = [image];
        node.imageIndex = 0;
        node.setDirtyCanvas?.(true, true);
    };
    image.src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type: "input" })}`);
}

function ask(node) {
    const input = document.createElement("input");
    input.type = "file";
    input.accept = IMAGES.join(",");
    input.onchange = () => input.files[0] && upload(node, input.files[0]);
    input.click();
}

app.registerExtension({
    name: "UniDiffuser.ExampleImage",
    nodeCreated(node) {
        if ((node.comfyClass ?? node.type) !== NODE) return;
        const locale = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
        const label = LABELS[locale.split("-")[0]] ?? LABELS.en;
        const button = node.addWidget("button", label, null, () => ask(node), { serialize: false });
        button.serialize = false;
        node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
        node.onDragDrop = (event) => {
            const file = [...(event.dataTransfer?.files ?? [])].find((one) => IMAGES.includes(one.type));
            if (file) upload(node, file);
            return !!file;
        };
    },
});
