// What all parts share: the data, where the reader is, and building elements. Foreign text only ever becomes text nodes.
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

async function unpack(id) {
  const packed = Uint8Array.from(atob($(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = JSON.parse(await new Response(stream).text());
  $(id).remove(); // its memory is not needed twice
  return data;
}

function number(value, digits = 2, sign = false) {
  if (value === null || value === undefined) return "–";
  let text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : sign ? "+" : "") + text;
}

// A text of which the beginning and the end are kept, so that different answers look different
function short(text, most = 60) {
  const letters = [...text];
  if (letters.length <= most) return text;
  const end = Math.floor(most / 3);
  return `${letters.slice(0, most - end - 1).join("")}…${letters.slice(-end).join("")}`;
}

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// The colour of an advantage: how strong, and of which sign
function tint(node, advantage) {
  if (advantage) {
    node.style.setProperty("--much", Math.max(0.18, Math.min(1, Math.abs(advantage) / 2)).toFixed(2));
    node.style.setProperty("--sign", advantage > 0 ? "var(--good)" : "var(--bad)");
  }
  return node;
}

const TAGS = /<\/?(?:search|answer|think|information|tool_call|tool_response)>/g;

// A text with its golden answers marked; `marks` holds begins and ends
function marked(text, marks, withTags = false) {
  const pieces = [];
  for (let i = 0; marks && i < marks.length; i += 2) pieces.push([marks[i], marks[i + 1], "mark"]);
  if (withTags)
    for (const tag of text.matchAll(TAGS)) {
      const [begin, end] = [tag.index, tag.index + tag[0].length];
      if (!pieces.some((piece) => piece[0] < end && begin < piece[1])) pieces.push([begin, end, "tag"]);
    }
  pieces.sort((a, b) => a[0] - b[0]);
  const nodes = [];
  let at = 0;
  for (const [begin, end, kind] of pieces) {
    nodes.push(text.slice(at, begin));
    const piece = text.slice(begin, end);
    nodes.push(kind === "mark" ? el("mark", { title: "golden answer" }, piece) : el("span", { class: "tag" }, piece));
    at = end;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

const KINDS = {
  all_wrong: "all wrong",
  rescued: "all wrong, rescued",
  mixed: "mixed",
  all_correct: "all correct",
  unscored: "not scored",
};
const FILTERS = {
  near_miss: ["near miss", "found a golden answer, answered wrong"],
  all_wrong: ["all-wrong group", "no rollout of the group is correct"],
  rescued: ["rescued group", "all wrong with equal outcomes, but turn rewards give advantages"],
  invalid: ["invalid turn", "a turn without a well-formed action"],
  failed: ["failed retrieval", "a search timed out or failed"],
  truncated: ["truncated", "ran out of its tokens"],
  correct: ["answered correctly", "reached the success threshold"],
};

let index = null; // curves, groups, flags
let texts = null; // passages and turns, unpacked after the first paint
const at = { mode: "train", step: 0, group: 0, rollout: 0, filters: 0, search: "" };

const steps = () => index.modes[at.mode];
const groups = () => steps()[at.step].groups;
const group = () => groups()[at.group];
const groupTexts = () => texts.modes[at.mode][at.step][at.group];
const evaluated = () => at.mode === "eval"; // nothing is learned from these rollouts
const bit = (name) => 1 << index.flags.indexOf(name);
const dotClass = ([flags, outcome]) =>
  outcome === null ? "is-unscored" : flags & bit("correct") ? "is-correct" : flags & bit("near_miss") ? "is-near" : "";
const dotName = ([flags, outcome]) =>
  outcome === null ? "not scored" : flags & bit("correct") ? "correct" : flags & bit("near_miss") ? "near miss" : "wrong";
