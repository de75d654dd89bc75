/** The looks of the editor, in the colours of the front end's theme. */

const CSS = `
.ud-path {
    --ud-line: light-dark(#c2255c, #f06595);
    --ud-run: light-dark(#1971c2, #4dabf7);
    --ud-warn: light-dark(#b35c00, #ffa94d);
    --ud-text: var(--input-text, #ddd);
    --ud-quiet: var(--descrip-text, #999);
    --ud-field: var(--comfy-input-bg, #222);
    --ud-edge: var(--border-color, #4e4e4e);
    --ud-raise: color-mix(in srgb, var(--ud-text) 12%, transparent);
    display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; width: 100%; height: 100%; min-height: 368px;
    color: var(--ud-text); font: 12px/1.35 Inter, system-ui, sans-serif; user-select: none; -webkit-user-select: none;
}
.dark-theme .ud-path { color-scheme: dark; } /* newer front ends set it on the page */
.ud-path-presets { display: flex; gap: 4px; flex: none; }
.ud-path-presets button {
    flex: 1 1 0; min-width: 0; height: 28px; padding: 3px; border: 1px solid transparent; border-radius: 6px; cursor: pointer;
    background: var(--ud-field); color: var(--ud-quiet); display: flex; align-items: center; justify-content: center;
}
.ud-path-presets button:hover { border-color: var(--ud-edge); color: var(--ud-text); }
.ud-path-presets button[aria-pressed="true"] { border-color: var(--ud-line); color: var(--ud-line); }
.ud-path-presets svg { width: 22px; height: 22px; pointer-events: none; }
.ud-path-presets .ud-frame { fill: none; stroke: currentColor; opacity: 0.35; }
.ud-path-presets .ud-way { fill: none; stroke: currentColor; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.ud-path-presets circle { fill: currentColor; }
.ud-path-square {
    flex: 1 1 0; min-height: 0; width: 100%; display: block; touch-action: none; border-radius: 8px; background: var(--ud-field);
    cursor: default;
}
.ud-path-square text { fill: var(--ud-quiet); font-size: 11px; pointer-events: none; }
.ud-path-square .ud-axis { fill: var(--ud-text); }
.ud-grid { stroke: var(--ud-raise); stroke-width: 1; }
.ud-box { fill: none; stroke: var(--ud-edge); stroke-width: 1; }
.ud-line, .ud-line-under { fill: none; stroke-linecap: round; stroke-linejoin: round; pointer-events: none; }
.ud-line { stroke: var(--ud-line); stroke-width: 2.5; }
.ud-line-under { stroke: var(--ud-field); stroke-width: 6; opacity: 0.8; }
.ud-bad .ud-line { stroke: var(--ud-warn); stroke-dasharray: 5 5; }
.ud-hit { fill: none; stroke: transparent; stroke-width: 20; pointer-events: stroke; cursor: grab; }
.ud-step { fill: var(--ud-line); pointer-events: none; }
.ud-bad .ud-step, .ud-bad .ud-arrow { display: none; }
.ud-arrow { fill: var(--ud-line); pointer-events: none; }
.ud-handle { cursor: grab; outline: none; }
.ud-handle .ud-grip { fill: transparent; }
.ud-handle .ud-knob { fill: var(--ud-field); stroke: var(--ud-line); stroke-width: 2.5; transition: r 80ms; }
.ud-handle[data-kind="end"] .ud-knob { fill: var(--ud-line); }
.ud-handle[data-kind="slope"] .ud-knob { stroke-dasharray: 2.5 2.5; stroke-width: 2; }
.ud-handle:hover .ud-knob, .ud-handle.ud-held .ud-knob { fill: var(--ud-line); }
.ud-handle:focus-visible .ud-ring { stroke: var(--ud-text); }
.ud-handle.ud-held { cursor: grabbing; }
.ud-handle.ud-locked { cursor: not-allowed; opacity: 0.55; }
.ud-ring { fill: none; stroke: transparent; stroke-width: 1.5; }
.ud-guide { stroke: var(--ud-quiet); stroke-width: 1; stroke-dasharray: 2 3; pointer-events: none; }
.ud-probe { fill: var(--ud-text); pointer-events: none; }
.ud-marker { fill: var(--ud-run); stroke: var(--ud-field); stroke-width: 2; pointer-events: none; }
.ud-marker-halo { fill: var(--ud-run); opacity: 0.3; pointer-events: none; animation: ud-pulse 1.2s ease-out infinite; }
@keyframes ud-pulse { from { r: 5px; opacity: 0.5; } to { r: 15px; opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .ud-marker-halo { animation: none; } }
.ud-path-status { flex: none; height: 49px; padding: 0 2px; overflow: hidden; }
.ud-path-status b { font-weight: 600; font-variant-numeric: tabular-nums; }
.ud-path-status span { color: var(--ud-quiet); }
.ud-path-status.ud-warn span { color: var(--ud-warn); }
`;

/** Add the style sheet to the page, once. */
export function addStyle() {
    if (document.getElementById("ud-path-style")) return;
    const style = document.createElement("style");
    style.id = "ud-path-style";
    style.textContent = CSS;
    document.head.append(style);
}

let grain;

/** A picture of noise that grows to the upper right, as a data URL: the ground of the square. */
export function noiseGround() {
    if (grain) return grain;
    const side = 128;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const pen = canvas.getContext("2d");
    const picture = pen.createImageData(side, side);
    let state = 1;
    for (let k = 0; k < side * side; k++) {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0; // the same grain on every page
        const [x, y] = [(k % side) / side, 1 - Math.floor(k / side) / side];
        const grey = state >>> 24;
        picture.data.set([grey, grey, grey, 70 * ((x + y) / 2) ** 1.5], 4 * k);
    }
    pen.putImageData(picture, 0, 0);
    grain = canvas.toDataURL();
    return grain;
}
