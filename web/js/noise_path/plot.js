/** The plot of the two noise levels in an SVG: its places, and how elements are made. */

import { MAX_LEVEL } from "./schedule.js";

const SVG = "http://www.w3.org/2000/svg";
export const [WIDTH, HEIGHT] = [300, 300]; // of the view box
export const [LEFT, TOP, SIDE] = [32, 14, 252]; // of the plot

export const toX = (level) => LEFT + (SIDE * level) / MAX_LEVEL;
export const toY = (level) => TOP + SIDE - (SIDE * level) / MAX_LEVEL;
export const place = ([x, y]) => [toX(x), toY(y)];

export function make(tag, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
}

export const put = (element, attributes) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
};

export const lineOf = (points) => points.map((point) => place(point).map((n) => n.toFixed(2)).join(",")).join(" ");
