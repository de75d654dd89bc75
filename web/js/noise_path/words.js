/** What the editor says, in the language of the front end. */

import { levelText } from "./paths.js";
import { LEAST, MAX_LEVEL } from "./schedule.js";

const EN = {
    editor: "Noise path: drag the points",
    x: "image noise",
    y: "caption noise",
    clean: "clean",
    noise: "noise",
    levels: "image {image} · caption {caption}",
    step: "step {step} of {steps}",
    handle: { start: "Start", corner: "Corner", end: "End", slope: "Speeds" },
    presets: {
        "text to image": "Text to image: the caption is given",
        "image to text": "Image to text: the image is given",
        joint: "Image and caption together",
        "caption first": "Both, the caption first",
        "image first": "Both, the image first",
        image: "Image alone, any caption",
        text: "Caption alone, any image",
        drawn: "Draw: free points on the current path",
    },
    // What happens on a part of the path.
    image: {
        clean: "The image is denoised and follows the caption.",
        some: "The image is denoised and follows the caption loosely.",
        noise: "The image is denoised; the caption is ignored.",
    },
    text: {
        clean: "The caption is denoised and follows the image.",
        some: "The caption is denoised and follows the image loosely.",
        noise: "The caption is denoised; the image is ignored.",
    },
    both: "Image and caption are denoised together.",
    imageFaster: "Both are denoised, the image faster.",
    textFaster: "Both are denoised, the caption faster.",
    // What happens on the whole path.
    captionFirst: "The caption settles first, and the image follows it.",
    imageFirst: "The image settles first, and the caption follows it.",
    captionStays: "The image settles; the caption keeps noise {caption}.",
    imageStays: "The caption settles; the image keeps noise {image}.",
    together: "Image and caption settle together.",
    captionAhead: "The caption leads, and both end together.",
    imageAhead: "The image leads, and both end together.",
    keepsImage: " Starts from the connected image.",
    keepsText: " Starts from the connected text.",
    keepsBoth: " Starts from the connected image and text.",
    executed: "As it ran. Values from links are not drawn before a run.",
    // Why a point does not follow the pointer.
    onlyFalls: "Noise can only fall along the path.",
    square: "Noise runs from 0 (clean) to 1000.",
    oneClean: "A path ends with the image or the caption at 0.",
    someNoise: "The path has to start above its end.",
    imageEnds: "The image ends clean in this task.",
    textEnds: "The caption ends clean in this task.",
    captionIgnored: "The caption is ignored in this task.",
    imageIgnored: "The image is ignored in this task.",
    jointEnds: "Both end clean in this task. Draw a path to end elsewhere.",
    twoPoints: "A path needs two points.",
    linked: "This value comes from a link.",
    // Why values are no path.
    unreadable: "Point {number} is “{text}”. Write image,caption, such as 1000,500.",
    outside: "Point {number}: noise runs from 0 to 1000.",
    short: "Write at least two different points, such as 1000,0 0,0.",
    imageRises: "The image noise rises at point {number}; it can only fall.",
    textRises: "The caption noise rises at point {number}; it can only fall.",
    noisyEnd: "Both end noisy. Set the last point of one of them to 0.",
    still: "Nothing is left to denoise: raise the start.",
    fewSteps: "Needs at least {least} steps, one for each line.",
    steps: "Steps must be a whole number of at least 1.",
    unknown: "",
};

const ZH = {
    editor: "噪声路径：拖动各点",
    x: "图像噪声",
    y: "描述噪声",
    clean: "干净",
    noise: "噪声",
    levels: "图像 {image} · 描述 {caption}",
    step: "第 {step} 步，共 {steps} 步",
    handle: { start: "起点", corner: "转角", end: "终点", slope: "速度" },
    presets: {
        "text to image": "文生图：给定描述",
        "image to text": "图生文：给定图像",
        joint: "图像和描述同时生成",
        "caption first": "同时生成，描述在先",
        "image first": "同时生成，图像在先",
        image: "只生成图像，忽略描述",
        text: "只生成描述，忽略图像",
        drawn: "手绘：在当前路径上自由加点",
    },
    image: {
        clean: "图像去噪，遵循描述。",
        some: "图像去噪，大致遵循描述。",
        noise: "图像去噪，忽略描述。",
    },
    text: {
        clean: "描述去噪，遵循图像。",
        some: "描述去噪，大致遵循图像。",
        noise: "描述去噪，忽略图像。",
    },
    both: "图像和描述同时去噪。",
    imageFaster: "两者都在去噪，图像较快。",
    textFaster: "两者都在去噪，描述较快。",
    captionFirst: "描述先确定，图像随之生成。",
    imageFirst: "图像先确定，描述随之生成。",
    captionStays: "图像确定；描述保留噪声 {caption}。",
    imageStays: "描述确定；图像保留噪声 {image}。",
    together: "图像和描述同时确定。",
    captionAhead: "途中描述领先，两者同时结束。",
    imageAhead: "途中图像领先，两者同时结束。",
    keepsImage: "从所接的图像开始。",
    keepsText: "从所接的文字开始。",
    keepsBoth: "从所接的图像和文字开始。",
    executed: "这是运行时的路径。来自连线的值要运行后才能画出。",
    onlyFalls: "沿路径噪声只能下降。",
    square: "噪声从 0（干净）到 1000。",
    oneClean: "路径结束时，图像或描述必须为 0。",
    someNoise: "路径的起点必须高于终点。",
    imageEnds: "此任务中图像最终是干净的。",
    textEnds: "此任务中描述最终是干净的。",
    captionIgnored: "此任务忽略描述。",
    imageIgnored: "此任务忽略图像。",
    jointEnds: "此任务中两者最终都是干净的。要在别处结束，请手绘路径。",
    twoPoints: "路径至少需要两个点。",
    linked: "此值来自连线。",
    unreadable: "第 {number} 个点是“{text}”。请写成 图像,描述，例如 1000,500。",
    outside: "第 {number} 个点：噪声从 0 到 1000。",
    short: "请至少写两个不同的点，例如 1000,0 0,0。",
    imageRises: "第 {number} 个点的图像噪声上升了；它只能下降。",
    textRises: "第 {number} 个点的描述噪声上升了；它只能下降。",
    noisyEnd: "两者结束时都有噪声。请把最后一点的其中一个设为 0。",
    still: "没有噪声可去：请提高起点。",
    fewSteps: "至少需要 {least} 步，每段直线一步。",
    steps: "步数必须是不小于 1 的整数。",
    unknown: "",
};

/** The texts for a locale such as "en" or "zh-TW". */
export const wordsOf = (locale) => (String(locale).startsWith("zh") ? ZH : EN);

/** Fill {name} in a text. */
export const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");

/** The two levels of a point. */
export const levelsText = (words, [x, y]) => fill(words.levels, { image: levelText(Math.round(x)), caption: levelText(Math.round(y)) });

const held = (level) => (level <= LEAST ? "clean" : level >= MAX_LEVEL ? "noise" : "some");

/** What happens between two neighbouring points of a path. */
export function happening(words, before, after) {
    const [dx, dy] = [before[0] - after[0], before[1] - after[1]];
    if (dx > 0 && dy <= 0) return words.image[held(before[1])];
    if (dy > 0 && dx <= 0) return words.text[held(before[0])];
    if (dx > 1.1 * dy) return words.imageFaster;
    return dy > 1.1 * dx ? words.textFaster : words.both;
}

const LEAD = 60; // levels by which one is ahead on average

/** What a whole path does. */
export function summary(words, points) {
    const [first, last] = [points[0], points.at(-1)];
    const [image, text] = [0, 1].map((axis) => first[axis] > last[axis]);
    const [keepsImage, keepsText] = [image && first[0] < MAX_LEVEL, text && first[1] < MAX_LEVEL];
    const starts = keepsImage && keepsText ? words.keepsBoth : keepsImage ? words.keepsImage : keepsText ? words.keepsText : "";
    if (image && !text) return words.image[held(first[1])] + starts;
    if (text && !image) return words.text[held(first[0])] + starts;
    const levels = { image: Math.round(last[0]), caption: Math.round(last[1]) };
    if (last[1] > LEAST) return fill(words.captionStays, levels) + starts;
    if (last[0] > LEAST) return fill(words.imageStays, levels) + starts;
    const [imageDone, textDone] = [0, 1].map((axis) => points.findIndex((p) => p[axis] <= LEAST));
    if (textDone !== imageDone) return (textDone < imageDone ? words.captionFirst : words.imageFirst) + starts;
    const lead = points.reduce((sum, p) => sum + p[0] - p[1], 0) / points.length; // of the caption
    if (Math.abs(lead) < LEAD) return words.together + starts;
    return (lead > 0 ? words.captionAhead : words.imageAhead) + starts;
}
