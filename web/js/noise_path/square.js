/** The square of the two noise levels: draws a path and turns pointer and keyboard into changes of the node's values. */

import { asDrawn, drag, handlesOf, insertPoint, PRESETS, removePoint } from "./handles.js";
import { CORNERS, cornersOf, DRAWN, nearest, pathOf, pointAt } from "./paths.js";
import { MAX_LEVEL } from "./schedule.js";
import { addStyle, noiseGround } from "./style.js";
import { fill, happening, levelsText, summary } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [300, 300]; // of the view box
const [LEFT, TOP, SIDE] = [32, 14, 252]; // of the plot
const NEAR = 45; // levels within which the pointer is on the path
const MOVED = 3; // pixels from which a press on the line is a drag
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const MOST_DOTS = 60; // with more steps the dots would be a line

const toX = (level) => LEFT + (SIDE * level) / MAX_LEVEL;
const toY = (level) => TOP + SIDE - (SIDE * level) / MAX_LEVEL;
const place = ([x, y]) => [toX(x), toY(y)];

function make(tag, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
}

const put = (element, attributes) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
};

const lineOf = (points) => points.map((point) => place(point).map((n) => n.toFixed(2)).join(",")).join(" ");

/**
 * The editor's element and its behaviour.
 *
 * `node` is what the square edits: values() of the node, set(changes), commit() after a finished change, isLinked(handle id),
 * executed(): the points of the last run where values come from links, and words.
 */
export class NoiseSquare {
    constructor(node) {
        this.node = node;
        this.held = null; // {id, pointer} while a point is dragged
        this.pressed = null; // {x, y, at} of a press on the line that is not a drag yet
        this.reason = null;
        this.probe = null; // point under the pointer
        this.marker = null; // position of a run along the path, in steps
        this.focusOn = null; // id of the handle to focus after drawing
        this.lastPressed = undefined; // id of the handle under the last press
        addStyle();
        this.build();
        this.render();
    }

    get words() {
        return this.node.words;
    }

    build() {
        const { words } = this;
        this.element = document.createElement("div");
        this.element.className = "ud-path";
        this.element.tabIndex = -1;
        this.presets = document.createElement("div");
        this.presets.className = "ud-path-presets";
        this.presets.setAttribute("role", "toolbar");
        this.presets.append(...[...PRESETS, { id: DRAWN }].map((preset) => this.buildPreset(preset)));
        this.svg = make("svg", { class: "ud-path-square", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": words.editor });
        this.layers = {
            ground: make("g"),
            guides: make("g"),
            under: make("polyline", { class: "ud-line-under" }),
            line: make("polyline", { class: "ud-line" }),
            hit: make("polyline", { class: "ud-hit" }),
            steps: make("g"),
            arrow: make("polygon", { class: "ud-arrow" }),
            handles: make("g"),
            marker: make("g"),
        };
        this.svg.append(...Object.values(this.layers));
        this.buildGround();
        this.status = document.createElement("div");
        this.status.className = "ud-path-status";
        this.status.setAttribute("aria-live", "polite");
        this.element.append(this.presets, this.svg, this.status);
        this.listen();
    }

    buildGround() {
        const { ground } = this.layers;
        const { words } = this;
        ground.append(
            make("image", { href: noiseGround(), x: LEFT, y: TOP, width: SIDE, height: SIDE, preserveAspectRatio: "none" }),
        );
        for (const level of [250, 500, 750]) {
            ground.append(make("line", { class: "ud-grid", x1: toX(level), x2: toX(level), y1: toY(0), y2: toY(MAX_LEVEL) }));
            ground.append(make("line", { class: "ud-grid", y1: toY(level), y2: toY(level), x1: toX(0), x2: toX(MAX_LEVEL) }));
        }
        ground.append(make("rect", { class: "ud-box", x: LEFT, y: TOP, width: SIDE, height: SIDE }));
        const text = (content, attributes) => ground.append(make("text", attributes, content));
        const below = { y: toY(0) + 20 };
        const left = { transform: `translate(${LEFT - 14} ${toY(500)}) rotate(-90)` };
        text("0", { y: toY(0) + 16, x: LEFT - 12, "text-anchor": "middle" });
        text("1000", { ...below, x: toX(MAX_LEVEL) + 4, "text-anchor": "end" });
        text(`${words.x} →`, { ...below, x: toX(500), "text-anchor": "middle", class: "ud-axis" });
        text("1000", { ...left, x: SIDE / 2 + 4, "text-anchor": "end" });
        text(`${words.y} →`, { ...left, "text-anchor": "middle", class: "ud-axis" });
    }

    buildPreset({ id, values }) {
        const button = document.createElement("button");
        button.type = "button";
        button.dataset.preset = id;
        button.title = this.words.presets[id];
        button.setAttribute("aria-label", button.title);
        const corners = values ? cornersOf(values).points : [[1000, 1000], [800, 450], [250, 300], [0, 0]];
        const at = ([x, y]) => [2.5 + (x * 15) / MAX_LEVEL, 17.5 - (y * 15) / MAX_LEVEL];
        const icon = make("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" });
        icon.append(make("rect", { class: "ud-frame", x: 2.5, y: 2.5, width: 15, height: 15, rx: 1 }));
        icon.append(make("polyline", { class: "ud-way", points: corners.map((p) => at(p).join(",")).join(" ") }));
        const dots = values ? [corners.at(-1)] : corners;
        icon.append(...dots.map((p) => make("circle", { cx: at(p)[0], cy: at(p)[1], r: values ? 2.4 : 2 })));
        button.append(icon);
        button.addEventListener("click", () => {
            const changes = values ?? asDrawn(this.node.values());
            if (changes) this.change(changes, null, true);
        });
        return button;
    }

    // Drawing

    render() {
        const values = this.node.values();
        const executed = this.node.executed();
        const { corners, points, error } = executed ? { corners: executed, points: executed, error: null } : pathOf(values);
        this.points = points;
        this.error = error;
        const shown = points.length ? points : corners;
        this.element.classList.toggle("ud-bad", !!error);
        for (const name of ["under", "line", "hit"]) put(this.layers[name], { points: lineOf(shown) });
        this.renderSteps(points);
        this.renderHandles(executed ? [] : handlesOf(values));
        this.renderProbe();
        this.renderMarker();
        this.renderPresets(values);
        this.renderStatus();
    }

    renderSteps(points) {
        const dots = points.length <= MOST_DOTS + 1 ? points.slice(1, -1) : [];
        this.layers.steps.replaceChildren(
            ...dots.map((point) => {
                const [cx, cy] = place(point);
                return make("circle", { class: "ud-step", cx, cy, r: 2.6 });
            }),
        );
        const [x, y] = points.length ? place(points.at(-1)) : [0, 0];
        const before = [...points].reverse().map(place).find((p) => Math.hypot(p[0] - x, p[1] - y) > 1) ?? [x, y];
        const angle = (Math.atan2(y - before[1], x - before[0]) * 180) / Math.PI;
        put(this.layers.arrow, { points: "0,0 -13,-5.5 -13,5.5", transform: `translate(${x} ${y}) rotate(${angle})` });
    }

    renderHandles(handles) {
        const { words } = this;
        const old = [...this.layers.handles.children];
        if (old.length !== handles.length || handles.some((handle, k) => old[k].dataset.id !== handle.id)) {
            const focused = this.focusOn ?? document.activeElement?.closest?.(".ud-handle")?.dataset.id;
            const had = this.focusOn || old.includes(document.activeElement);
            this.layers.handles.replaceChildren(...handles.map((handle) => this.buildHandle(handle)));
            if (had) [...this.layers.handles.children].find((e) => e.dataset.id === focused)?.focus({ preventScroll: true });
            this.focusOn = null;
        }
        for (const [k, handle] of handles.entries()) {
            const element = this.layers.handles.children[k];
            const [x, y] = place(handle.point);
            put(element, {
                transform: `translate(${x} ${y})`,
                "data-kind": handle.kind,
                "aria-label": `${words.handle[handle.kind]} ${k + 1}`,
                "aria-valuetext": levelsText(words, handle.point),
            });
            element.classList.toggle("ud-held", this.held?.id === handle.id);
            element.classList.toggle("ud-locked", this.node.isLinked(handle.id));
        }
    }

    buildHandle({ id }) {
        return make(
            "g",
            { class: "ud-handle", tabindex: 0, role: "slider", "data-id": id },
            make("circle", { class: "ud-grip", r: 14 }),
            make("circle", { class: "ud-ring", r: 10 }),
            make("circle", { class: "ud-knob", r: 5.5 }),
        );
    }

    renderProbe() {
        const { guides } = this.layers;
        if (!this.probe || this.error) return guides.replaceChildren();
        const [x, y] = place(this.probe.point);
        guides.replaceChildren(
            make("line", { class: "ud-guide", x1: x, x2: x, y1: y, y2: toY(0) }),
            make("line", { class: "ud-guide", x1: toX(0), x2: x, y1: y, y2: y }),
            make("circle", { class: "ud-probe", cx: x, cy: y, r: 3.5 }),
        );
    }

    renderMarker() {
        if (this.marker === null || this.points.length < 2) return this.layers.marker.replaceChildren();
        const [cx, cy] = place(pointAt(this.points, this.marker));
        if (!this.layers.marker.children.length) {
            this.layers.marker.append(
                make("circle", { class: "ud-marker-halo", r: 5 }),
                make("circle", { class: "ud-marker", r: 5.5 }),
            );
        }
        for (const circle of this.layers.marker.children) put(circle, { cx, cy });
    }

    renderPresets(values) {
        for (const button of this.presets.children) {
            const preset = PRESETS.find(({ id }) => id === button.dataset.preset);
            const same = preset ? Object.entries(preset.values).every(([name, value]) => values[name] === value) : values.task === DRAWN;
            button.setAttribute("aria-pressed", String(same));
        }
    }

    renderStatus() {
        const { words } = this;
        const warning = this.reason ?? this.error?.key;
        this.status.classList.toggle("ud-warn", !!warning);
        const [bold, line] = [document.createElement("b"), document.createElement("span")];
        bold.textContent = this.heading();
        line.textContent = warning ? fill(words[warning], this.reason ? {} : this.error) : this.description();
        this.status.replaceChildren(...(bold.textContent ? [bold, document.createElement("br")] : []), line);
    }

    /** Levels and step of what is dragged, hovered over or running. */
    heading() {
        if (this.held) return this.heldText();
        if (this.error) return "";
        if (this.probe) return `${levelsText(this.words, this.probe.point)} · ${this.stepText(this.probe.step)}`;
        return this.marker === null ? "" : this.stepText(Math.min(this.marker + 1, this.points.length - 1));
    }

    description() {
        if (this.probe) return happening(this.words, ...this.probe.between);
        if (this.node.executed()) return this.words.executed;
        return this.points.length ? summary(this.words, this.points) : "";
    }

    heldText() {
        const handle = handlesOf(this.node.values()).find(({ id }) => id === this.held.id);
        return handle ? levelsText(this.words, handle.point) : "";
    }

    stepText(step) {
        return fill(this.words.step, { step: Math.floor(step), steps: this.points.length - 1 });
    }

    // Changes

    change(changes, reason = null, commit = false) {
        this.reason = reason;
        if (Object.keys(changes).length) this.node.set(changes);
        this.render();
        if (commit) this.node.commit();
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
        svg.addEventListener("focusout", () => this.held || !this.reason || this.change({}));
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

    // A run

    /** Show where a run is: `done` steps of the path, or null after it. */
    setMarker(done) {
        this.marker = done;
        this.renderMarker();
        this.renderStatus();
    }
}
