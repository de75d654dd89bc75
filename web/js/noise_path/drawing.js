/** The square of the two noise levels as an element: ground, path, steps, handles, marker of a run, and the words below it. */

import { asDrawn, handlesOf, PRESETS } from "./handles.js";
import { cornersOf, DRAWN, pathOf, pointAt } from "./paths.js";
import { HEIGHT, LEFT, lineOf, make, place, put, SIDE, TOP, toX, toY, WIDTH } from "./plot.js";
import { MAX_LEVEL } from "./schedule.js";
import { addStyle, noiseGround } from "./style.js";
import { fill, happening, levelsText, summary } from "./words.js";

const MOST_DOTS = 60; // with more steps the dots would be a line

/**
 * The editor's element as it is drawn.
 *
 * `node` is what the square edits: values() of the node, set(changes), commit() after a finished change, isLinked(handle id),
 * executed(): the points of the last run where values come from links, and words.
 */
export class SquareDrawing {
    constructor(node) {
        this.node = node;
        this.held = null; // {id, pointer} while a point is dragged
        this.reason = null;
        this.probe = null; // point under the pointer
        this.marker = null; // position of a run along the path, in steps
        this.focusOn = null; // id of the handle to focus after drawing
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

    // A run

    /** Show where a run is: `done` steps of the path, or null after it. */
    setMarker(done) {
        this.marker = done;
        this.renderMarker();
        this.renderStatus();
    }
}
