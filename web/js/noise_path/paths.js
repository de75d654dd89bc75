/**
 * Noise paths from the values of the node, as nodes/path_inputs.py and unidiffuser/path.py make them.
 *
 * A point is [image noise, caption noise], each from 0 (clean) to 1000 (noise).
 */

import { LEAST, MAX_LEVEL, spaced } from "./schedule.js";

export const DRAWN = "drawn";
export const CORNERS = "through a corner";

const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);
const same = (p, q) => p[0] === q[0] && p[1] === q[1];
const pairs = (list) => list.slice(1).map((item, k) => [list[k], item]);
const lengthsOf = (corners) => pairs(corners).map(([p, q]) => Math.max(Math.abs(p[0] - q[0]), Math.abs(p[1] - q[1])));

/** As Python rounds: halves to the even neighbour. */
function roundHalfEven(x) {
    const low = Math.floor(x);
    if (x - low !== 0.5) return Math.round(x);
    return low % 2 === 0 ? low : low + 1;
}

/** A level as text, to two decimals. */
export const levelText = (level) => String(Math.round(level * 100) / 100);

/** "1000,1000 400,0 0,0" of points. */
export const pointsText = (points) => points.map((p) => p.map(levelText).join(",")).join(" ");

/** The points of a text, or an error {key, ...values} for `words.js`. */
export function parsePoints(text) {
    const points = [];
    for (const [k, written] of String(text).replaceAll(";", " ").split(/\s+/).filter(Boolean).entries()) {
        const parts = written.split(",");
        const point = parts.map((part) => (part.trim() === "" ? NaN : Number(part)));
        if (point.length !== 2 || point.some(Number.isNaN)) return { error: { key: "unreadable", number: k + 1, text: written } };
        if (point.some((level) => !(level >= 0 && level <= MAX_LEVEL))) return { error: { key: "outside", number: k + 1 } };
        points.push(point);
    }
    const corners = points.filter((p, k) => k === 0 || !same(p, points[k - 1]));
    const error = faultOf(corners);
    return error ? { error, points: corners } : { points: corners };
}

/** Why points are no path, or null. */
export function faultOf(corners) {
    if (corners.length < 2) return { key: "short" };
    for (const [k, [before, here]] of pairs(corners).entries()) {
        if (here[0] > before[0]) return { key: "imageRises", number: k + 2 };
        if (here[1] > before[1]) return { key: "textRises", number: k + 2 };
    }
    return Math.min(...corners.at(-1)) > LEAST ? { key: "noisyEnd" } : null;
}

/** The path through `corners` whose lines get steps in proportion to `lengths`, at least one each. */
function inProportion(corners, lengths, steps, spacing) {
    const bounds = [0];
    for (let k = 1; k < lengths.length; k++) {
        const index = roundHalfEven((steps * sum(lengths.slice(0, k))) / (sum(lengths) || 1));
        bounds.push(Math.min(Math.max(index, bounds.at(-1) + 1), steps - (lengths.length - k)));
    }
    bounds.push(steps);
    const points = [corners[0]];
    for (const [k, [p, q]] of pairs(corners).entries()) {
        const [x, y] = [0, 1].map((axis) => spaced(p[axis], q[axis], bounds[k + 1] - bounds[k], spacing));
        points.push(...x.slice(1).map((level, i) => [level, y[i + 1]]));
    }
    return points;
}

/** `steps` spread over the whole curve, where there are fewer of them than lines. */
function resampled(corners, lengths, steps, spacing) {
    const reached = [0];
    for (const length of lengths) reached.push(reached.at(-1) + length);
    const at = spaced(MAX_LEVEL, 0, steps, spacing).map((left) => reached.at(-1) * (1 - left / MAX_LEVEL));
    let k = 0;
    const inner = at.slice(1, -1).map((position) => {
        while (reached[k + 1] < position) k++;
        const part = (position - reached[k]) / (reached[k + 1] - reached[k]);
        return [0, 1].map((axis) => corners[k][axis] + (corners[k + 1][axis] - corners[k][axis]) * part);
    });
    return [corners[0], ...inner, corners.at(-1)];
}

/** The corners of a joint path and the duration of each of its lines. */
function jointCorners({ image_start: x, text_start: y, speed_image: sx, speed_text: sy }) {
    const durations = [x / sx, y / sy];
    const corner = [Math.max(0, x - sx * durations[1]), Math.max(0, y - sy * durations[0])];
    const close = Math.abs(durations[0] - durations[1]) <= 1e-9 * Math.max(...durations);
    if (close || Math.max(...corner) < LEAST) return { corners: [[x, y], [0, 0]], lengths: [1] };
    return { corners: [[x, y], corner, [0, 0]], lengths: [Math.min(...durations), Math.abs(durations[0] - durations[1])] };
}

/** The corners of the path of the node's values {task, steps, spacing, and the task's own}, and an error if it is none. */
export function cornersOf(values) {
    const found = cornersOfTask(values);
    const known = found.points.flat().every(Number.isFinite); // not while the node's widgets are being replaced
    return known ? found : { points: [], error: { key: "unknown" } };
}

function cornersOfTask(values) {
    const { task, start, hold } = values;
    switch (task) {
        case "text to image":
            return checked([[start, hold], [0, hold]], start > 0);
        case "image to text":
            return checked([[hold, start], [hold, 0]], start > 0);
        case "image":
            return checked([[start, MAX_LEVEL], [0, MAX_LEVEL]], start > 0);
        case "text":
            return checked([[MAX_LEVEL, start], [MAX_LEVEL, 0]], start > 0);
        case "joint": {
            const { corners, lengths } = jointCorners(values);
            return { ...checked(corners, values.image_start > 0 || values.text_start > 0), lengths };
        }
        case CORNERS: {
            const points = ["start", "corner", "end"].map((end) => [values[`image_${end}`], values[`text_${end}`]]);
            const corners = points.filter((p, k) => points.findIndex((q) => same(p, q)) === k);
            return { points: corners, error: faultOf(points.filter((p, k) => k === 0 || !same(p, points[k - 1]))) };
        }
        case DRAWN: {
            const { points, error } = parsePoints(values.points);
            return { points: points ?? [], error: error ?? null };
        }
        default:
            return { points: [], error: { key: "unknown" } };
    }
}

const checked = (points, moves) => ({ points, error: moves ? null : { key: "still" } });

/** {corners, points: steps + 1 of them, error}; `points` is empty if the values are no path. */
export function pathOf(values) {
    const { points: corners, error, lengths = lengthsOf(corners) } = cornersOf(values);
    if (error) return { corners, points: [], error };
    const { steps, spacing } = values;
    if (!(Number.isInteger(steps) && steps >= 1)) return { corners, points: [], error: { key: "steps" } };
    if (steps >= lengths.length) return { corners, points: inProportion(corners, lengths, steps, spacing), error: null };
    if (values.task === DRAWN) return { corners, points: resampled(corners, lengths, steps, spacing), error: null };
    return { corners, points: [], error: { key: "fewSteps", least: lengths.length } };
}

/** The point at a position from 0 to points.length - 1 along a path. */
export function pointAt(points, position) {
    const k = Math.min(Math.max(Math.floor(position), 0), points.length - 2);
    const part = Math.min(Math.max(position - k, 0), 1);
    return [0, 1].map((axis) => points[k][axis] + (points[k + 1][axis] - points[k][axis]) * part);
}

/** The point of a broken line closest to `p`: {point, distance, line: index of the line, part: 0..1 on it}. */
export function nearest(points, p) {
    let best = { distance: Infinity, line: 0, part: 0, point: points[0] };
    for (const [line, [a, b]] of pairs(points).entries()) {
        const [dx, dy] = [b[0] - a[0], b[1] - a[1]];
        const squared = dx * dx + dy * dy;
        const part = squared ? Math.min(Math.max(((p[0] - a[0]) * dx + (p[1] - a[1]) * dy) / squared, 0), 1) : 0;
        const point = [a[0] + dx * part, a[1] + dy * part];
        const distance = Math.hypot(p[0] - point[0], p[1] - point[1]);
        if (distance < best.distance) best = { distance, line, part, point };
    }
    return best;
}
