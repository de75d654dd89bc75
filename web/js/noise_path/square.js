/** The square of the two noise levels: turns pointer and keyboard into changes of the node's values. */

import { SquareDrawing } from "./drawing.js";
import { drag, handlesOf, insertPoint, removePoint } from "./handles.js";
import { CORNERS, cornersOf, DRAWN, nearest } from "./paths.js";
import { LEFT, SIDE, TOP } from "./plot.js";
import { MAX_LEVEL } from "./schedule.js";

const NEAR = 45; // levels within which the pointer is on the path
const MOVED = 3; // pixels from which a press on the line is a drag
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

/** The editor's element and its behaviour; `node` as in `SquareDrawing`. */
export class NoiseSquare extends SquareDrawing {
    constructor(node) {
        super(node);
        this.pressed = null; // {x, y, at} of a press on the line that is not a drag yet
        this.lastPressed = undefined; // id of the handle under the last press
        this.listen();
    }

    dragTo(target) {
        const { changes, reason } = drag(this.node.values(), this.held.id, target);
        this.change(changes, reason);
    }

    insert(target, commit) {
        const added = this.node.executed() ? null : insertPoint(this.node.values(), target);
        if (!added) return null;
        this.focusOn = added.id;
        this.change(added.changes, null, commit);
        return added.id;
    }

    remove(id) {
        if (this.node.values().task !== DRAWN) return;
        const { changes, reason } = removePoint(this.node.values(), id);
        this.focusOn = String(Math.max(Number(id) - 1, 0));
        this.change(changes, reason, !reason);
    }

    // Pointer

    levelsAt(event) {
        const matrix = this.svg.getScreenCTM();
        if (!matrix) return [0, 0];
        const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
        return [((x - LEFT) * MAX_LEVEL) / SIDE, ((TOP + SIDE - y) * MAX_LEVEL) / SIDE];
    }

    listen() {
        const { svg } = this;
        svg.addEventListener("pointerdown", (event) => this.onDown(event));
        svg.addEventListener("pointermove", (event) => this.onMove(event));
        for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) svg.addEventListener(kind, (event) => this.onUp(event));
        svg.addEventListener("pointerleave", () => this.setProbe(null));
        svg.addEventListener("dblclick", (event) => this.onDoubleClick(event));
        svg.addEventListener("keydown", (event) => this.onKey(event));
        // On the element, because a listener for focus lets a browser focus the square itself.
        this.element.addEventListener("focusout", () => this.held || !this.reason || this.change({}));
        // A press in the square must not start to drag the node; other buttons pan the canvas as everywhere.
        for (const kind of ["pointerdown", "pointermove", "pointerup", "mousedown", "touchstart"])
            this.element.addEventListener(kind, (event) => (event.button > 0 ? undefined : event.stopPropagation()));
    }

    onDown(event) {
        if (event.button > 0 || this.held || this.node.executed()) return;
        const id = event.target.closest(".ud-handle")?.dataset.id;
        const target = this.levelsAt(event);
        this.lastPressed = id; // the target of the events after it is the square, which captures the pointer
        if (id === undefined && !this.onLine(target)) return;
        if (this.node.isLinked(id ?? "line")) return this.change({}, "linked");
        this.capture(event);
        this.setProbe(null);
        if (id === undefined) this.pressed = { x: event.clientX, y: event.clientY, at: target };
        else this.hold(id, event);
    }

    capture(event) {
        try {
            this.svg.setPointerCapture(event.pointerId);
        } catch {
            // a synthetic pointer cannot be captured
        }
    }

    hold(id, event) {
        this.held = { id, pointer: event.pointerId };
        [...this.layers.handles.children].find((handle) => handle.dataset.id === id)?.focus({ preventScroll: true });
        this.change({});
    }

    /** The handle that a press on the line drags; in a path of points it is a new one. */
    lineHandle(target) {
        const { task } = this.node.values();
        if (task === DRAWN || task === CORNERS) return this.insert(target, false);
        return task === "joint" ? "speeds" : "line";
    }

    onMove(event) {
        const target = this.levelsAt(event);
        if (this.pressed && Math.hypot(event.clientX - this.pressed.x, event.clientY - this.pressed.y) >= MOVED) {
            const id = this.lineHandle(this.pressed.at);
            this.pressed = null;
            if (id !== null) this.hold(id, event);
        }
        if (this.held) this.dragTo(target);
        else if (!this.pressed) this.setProbe(target);
    }

    onUp() {
        this.pressed = null;
        if (!this.held) return;
        this.held = null;
        this.change({}, null, true);
    }

    onLine(target) {
        const shown = this.points.length ? this.points : [];
        return shown.length > 1 && nearest(shown, target).distance < NEAR;
    }

    onDoubleClick(event) {
        event.preventDefault();
        event.stopPropagation();
        const id = this.lastPressed;
        if (id !== undefined && this.node.values().task === DRAWN) this.remove(id);
        else if (this.onLine(this.levelsAt(event))) this.insert(this.levelsAt(event), true);
    }

    setProbe(target) {
        const found = target && this.points.length > 1 ? nearest(this.points, target) : null;
        const probe =
            found && found.distance < NEAR
                ? {
                      point: found.point,
                      between: [this.points[found.line], this.points[found.line + 1]],
                      step: found.line + 1,
                  }
                : null;
        if (!probe && !this.probe) return;
        this.probe = probe;
        this.renderProbe();
        this.renderStatus();
    }

    // Keyboard

    onKey(event) {
        const id = event.target.closest(".ud-handle")?.dataset.id;
        if (id === undefined || event.ctrlKey || event.metaKey) return;
        const handle = handlesOf(this.node.values()).find((one) => one.id === id);
        if (!handle) return;
        const step = event.shiftKey ? 100 : event.altKey ? 1 : 10;
        if (event.key in ARROWS) {
            const [dx, dy] = ARROWS[event.key].map((direction) => direction * step);
            this.keyDrag(id, [handle.point[0] + dx, handle.point[1] + dy]);
        } else if (event.key === "Delete" || event.key === "Backspace") this.remove(id);
        else if (event.key === "Insert" || event.key === "+") this.insertAfter(handle);
        else return;
        event.preventDefault();
        event.stopPropagation();
    }

    keyDrag(id, target) {
        if (this.node.isLinked(id)) return this.change({}, "linked");
        const { changes, reason } = drag(this.node.values(), id, target, true);
        this.change(changes, reason, true);
    }

    /** A new point halfway to the next one. */
    insertAfter(handle) {
        const { points, error } = cornersOf(this.node.values());
        if (error) return;
        const k = points.findIndex((p) => p[0] === handle.point[0] && p[1] === handle.point[1]);
        const [from, to] = k >= 0 && k < points.length - 1 ? [points[k], points[k + 1]] : points.slice(-2);
        this.insert([(from[0] + to[0]) / 2, (from[1] + to[1]) / 2], true);
    }
}
