/** The noise schedule and the spacing of steps, as in unidiffuser/schedule.py and unidiffuser/path.py. */

export const MAX_LEVEL = 1000;
export const LEAST = 1; // lowest level that the network was trained on; counts as clean
const BETA_START = 0.00085;
const BETA_END = 0.012;
const KARRAS_RHO = 7;

/** -log alpha of the levels 0..1000. */
const FALLS = (() => {
    const [first, last] = [Math.sqrt(BETA_START), Math.sqrt(BETA_END)];
    const falls = [0];
    for (let k = 0; k < MAX_LEVEL; k++) {
        const beta = (first + ((last - first) * k) / (MAX_LEVEL - 1)) ** 2;
        falls.push(falls[k] - 0.5 * Math.log1p(-beta));
    }
    return falls;
})();

function fallOf(level) {
    const low = Math.min(Math.floor(level), MAX_LEVEL - 1);
    return FALLS[low] + (FALLS[low + 1] - FALLS[low]) * (level - low);
}

function levelOfFall(fall) {
    let [low, high] = [0, MAX_LEVEL];
    while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (FALLS[middle] < fall) low = middle;
        else high = middle;
    }
    const level = low + (fall - FALLS[low]) / (FALLS[low + 1] - FALLS[low]);
    return Math.min(Math.max(level, 0), MAX_LEVEL);
}

const halfLogsnr = (level) => -fallOf(level) - 0.5 * Math.log(-Math.expm1(-2 * fallOf(level)));
const levelOfHalfLogsnr = (lambda) => levelOfFall(0.5 * Math.log1p(Math.exp(-2 * lambda)));
const sigmaOf = (level) => Math.sqrt(Math.expm1(2 * fallOf(level)));
const levelOfSigma = (sigma) => levelOfFall(0.5 * Math.log1p(sigma * sigma));

/** By name: [level -> axis of equal steps, its inverse]. */
const SPACINGS = {
    uniform: [(t) => t, (u) => u],
    logsnr: [halfLogsnr, levelOfHalfLogsnr],
    karras: [(t) => sigmaOf(t) ** (1 / KARRAS_RHO), (u) => levelOfSigma(u ** KARRAS_RHO)],
};

/** steps + 1 levels from `start` down to `end`, equally spaced on the axis named by `spacing`. */
export function spaced(start, end, steps, spacing) {
    if (start === end) return Array(steps + 1).fill(start);
    if (steps === 1) return [start, end];
    const known = spacing in SPACINGS && Math.max(start, end) > LEAST ? spacing : "uniform";
    const [warp, unwarp] = SPACINGS[known];
    const jump = known !== "uniform" && end < LEAST && start > LEAST;
    const last = jump ? LEAST : end;
    const count = jump ? steps - 1 : steps;
    const [from, to] = [warp(start), warp(last)];
    const inner = [];
    for (let k = 1; k < count; k++) inner.push(unwarp(from + ((to - from) * k) / count));
    return jump ? [start, ...inner, last, end] : [start, ...inner, end];
}
