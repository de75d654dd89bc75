/** What can be dragged in each task, and how far: a dragged path stays a path. */

import { CORNERS, DRAWN, cornersOf, nearest, pointsText } from "./paths.js";
import { MAX_LEVEL } from "./schedule.js";

const EDGE = 12; // a level this close to 0 or 1000 snaps to it
const FEWEST = 10; // lowest start of a path
const SPEEDS = [0.01, 100]; // as in the node
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const round2 = (value) => Math.round(value * 100) / 100;

/** A level under the pointer: whole, and at the edges exactly 0 or 1000. */
export function snapped(level) {
    if (Math.abs(level) < EDGE) return 0;
    if (Math.abs(level - MAX_LEVEL) < EDGE) return MAX_LEVEL;
    return Math.round(level);
}

/** Handles of the current values: {id, point, kind: start | corner | end | slope}. */
export function handlesOf(values) {
    const { points } = cornersOf(values);
    if (!points.length) return [];
    const [first, last] = [points[0], points.at(-1)];
    switch (values.task) {
        case "joint": {
            if (values.image_start <= 0 || values.text_start <= 0) break;
            const middle = [(first[0] + last[0]) / 2, (first[1] + last[1]) / 2];
            const turn = points.length > 2 ? { point: points[1], kind: "corner" } : { point: middle, kind: "slope" };
            return [start(first), { id: "speeds", ...turn }, end(last)];
        }
        case CORNERS:
            return ["start", "corner", "end"].map((id) => ({
                id,
                kind: id,
                point: [values[`image_${id}`], values[`text_${id}`]],
            }));
        case DRAWN:
            return points.map((point, k) => ({
                id: String(k),
                kind: k === 0 ? "start" : k === points.length - 1 ? "end" : "corner",
                point,
            }));
    }
    return [start(first), end(last)];
}

const start = (point) => ({ id: "start", kind: "start", point });
const end = (point) => ({ id: "end", kind: "end", point });

/**
 * Drag a handle to a point; with `exact` (the keyboard) nothing snaps.
 *
 * @returns {{changes: object, reason: string | null}} values of the node to set, and why the handle did not follow
 */
export function drag(values, id, target, exact = false) {
    const slack = exact ? 0 : EDGE;
    const outside = target.some((level) => level < -slack || level > MAX_LEVEL + slack) ? "square" : null;
    const at = target.map((level) => clamp(level, 0, MAX_LEVEL)).map(exact ? round2 : snapped);
    const { changes, reason } = dragInside(values, id, at, exact);
    return { changes, reason: reason ?? outside };
}

function dragInside(values, id, [x, y], exact) {
    switch (values.task) {
        case "text to image":
            return conditional(x, y, id, "imageEnds");
        case "image to text":
            return conditional(y, x, id, "textEnds");
        case "image":
            return single(x, y, id, "imageEnds", "captionIgnored");
        case "text":
            return single(y, x, id, "textEnds", "imageIgnored");
        case "joint":
            return joint(values, id, x, y, exact);
        case CORNERS: {
            const ids = ["start", "corner", "end"];
            const points = ids.map((name) => [values[`image_${name}`], values[`text_${name}`]]);
            const { point, reason } = between(points, ids.indexOf(id), [x, y]);
            return { changes: { [`image_${id}`]: point[0], [`text_${id}`]: point[1] }, reason };
        }
        default: {
            const { points } = cornersOf(values);
            if (points.length === 1) points.push(points[0]); // all were dragged together: this one leaves the others
            const k = Number(id);
            const { point, reason } = between(points, k, [x, y]);
            return { changes: { points: pointsText(points.map((p, i) => (i === k ? point : p))) }, reason };
        }
    }
}

/** One side is denoised from `start` to 0 while the other stays at `hold`; dragging the line or its end moves `hold`. */
function conditional(start, hold, id, ends) {
    if (id !== "start") return { changes: { hold }, reason: id === "end" && start > EDGE ? ends : null };
    return { changes: { start: Math.max(start, FEWEST), hold }, reason: start < FEWEST ? "someNoise" : null };
}

function single(start, other, id, ends, ignored) {
    const reason = other < MAX_LEVEL - EDGE ? ignored : null;
    if (id !== "start") return { changes: {}, reason: id === "end" && start > EDGE ? ends : reason };
    return { changes: { start: Math.max(start, FEWEST) }, reason: start < FEWEST ? "someNoise" : reason };
}

function joint(values, id, x, y, exact) {
    if (id === "end") return { changes: {}, reason: "jointEnds" };
    if (id === "start") {
        const reason = Math.min(x, y) < FEWEST ? "someNoise" : null;
        return { changes: { image_start: Math.max(x, FEWEST), text_start: Math.max(y, FEWEST) }, reason };
    }
    // The first line runs from the start through the pointer, so the speeds are in the ratio of its two sides.
    const [dx, dy] = [values.image_start - x, values.text_start - y];
    if (dx <= 0 && dy <= 0) return { changes: {}, reason: "onlyFalls" };
    const ratio = clamp(Math.max(dx, 0) / Math.max(dy, 1e-9), SPEEDS[0], SPEEDS[1]);
    const straight = values.image_start / values.text_start;
    const used = !exact && Math.abs(Math.log(ratio / straight)) < 0.03 ? straight : ratio; // snaps to the straight line
    const [speed_image, speed_text] = used >= 1 ? [round2(used), 1] : [1, round2(1 / used)];
    const changes = { speed_image: clamp(speed_image, ...SPEEDS), speed_text: clamp(speed_text, ...SPEEDS) };
    return { changes, reason: dx < 0 || dy < 0 ? "onlyFalls" : null };
}

/** The place closest to `target` for point k of a falling path: between its neighbours, the last one on an axis. */
function between(points, k, [x, y]) {
    const before = points[k - 1] ?? [MAX_LEVEL, MAX_LEVEL];
    const after = k === points.length - 1 ? [0, 0] : points[k + 1];
    let point = [0, 1].map((axis) => clamp([x, y][axis], after[axis], before[axis]));
    let reason = point[0] !== x || point[1] !== y ? "onlyFalls" : null;
    if (k === points.length - 1 && Math.min(...point) > 0) {
        if (Math.min(...point) > EDGE) reason ??= "oneClean";
        point = point[0] <= point[1] ? [0, point[1]] : [point[0], 0];
    }
    if (k === 0 && point[0] === after[0] && point[1] === after[1]) reason ??= "someNoise";
    return { point, reason };
}

/** The points of any task as a drawn path. */
export function asDrawn(values) {
    const { points, error } = cornersOf(values);
    return error ? null : { task: DRAWN, points: pointsText(points) };
}

/** Insert a point into the path where it is closest to `target`; returns {changes, id} or null. */
export function insertPoint(values, target) {
    const { points, error } = cornersOf(values);
    if (error) return null;
    const { line, point } = nearest(points, target);
    const added = [...points.slice(0, line + 1), point.map(snapped), ...points.slice(line + 1)];
    return { changes: { task: DRAWN, points: pointsText(added) }, id: String(line + 1) };
}

/** Remove a point of a drawn path; returns {changes, reason}. */
export function removePoint(values, id) {
    const { points } = cornersOf(values);
    const k = Number(id);
    if (points.length < 3) return { changes: {}, reason: "twoPoints" };
    if (k === points.length - 1 && Math.min(...points[k - 1]) > 0) return { changes: {}, reason: "oneClean" };
    return { changes: { points: pointsText(points.filter((_, i) => i !== k)) }, reason: null };
}

/** The presets as icons: their values, and the corners to draw. */
export const PRESETS = [
    { id: "text to image", values: { task: "text to image", start: 1000, hold: 0 } },
    { id: "image to text", values: { task: "image to text", start: 1000, hold: 0 } },
    ...[["joint", 1, 1], ["caption first", 1, 2], ["image first", 2, 1]].map(([id, speed_image, speed_text]) => ({
        id,
        values: { task: "joint", image_start: 1000, text_start: 1000, speed_image, speed_text },
    })),
    { id: "image", values: { task: "image", start: 1000 } },
    { id: "text", values: { task: "text", start: 1000 } },
];
