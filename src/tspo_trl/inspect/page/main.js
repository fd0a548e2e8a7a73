// Where the reader is and how they move; `show` draws what has changed.
const KEYS = [
  [["←", "→"], "step before, next step"],
  [["j", "k"], "next group, group before"],
  [["l", "h"], "next rollout, rollout before"],
  [["n", "N"], "next match, previous match"],
  [["/"], "search"],
  [["1", "…", "7"], "filters"],
  [["e"], "training or evaluation"],
  [["t"], "light or dark"],
  [["Esc"], "clear search and filters"],
  [["?"], "this help"],
];
let drawn = {};

function show() {
  const changed = (name, value) => drawn[name] !== value && ((drawn[name] = value), true);
  if (changed("mode", at.mode)) {
    sift();
    drawCurves();
    $("step").max = steps().length - 1;
    for (const button of $("modes").children) button.setAttribute("aria-pressed", String(button.dataset.mode === at.mode));
  }
  const place = `${at.mode} ${at.step} ${at.filters} ${at.search} ${Boolean(texts)}`;
  if (changed("place", place)) {
    for (const curve of $("curves").children) curve.refresh();
    $("step").value = at.step;
    $("where").replaceChildren(`Step ${steps()[at.step].step}`, el("small", {}, ` of ${steps().at(-1).step}`));
    tiles = MOST_TILES;
    while (at.group >= tiles) tiles += MOST_TILES;
    drawFilters();
    drawGroups();
  }
  for (const tile of $("groups").querySelectorAll(".tile")) {
    const here = Number(tile.dataset.group) === at.group;
    tile.setAttribute("aria-current", String(here));
    if (here && changed("tile", `${place} ${at.group}`)) tile.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  drawGroup();
  drawRollout();
  history.replaceState(null, "", `#${at.mode}/${steps()[at.step].step}/${at.group + 1}/${at.rollout + 1}`);
}

function go(place, turn = null) {
  Object.assign(at, place);
  at.step = Math.max(0, Math.min(at.step, steps().length - 1));
  at.group = Math.max(0, Math.min(at.group, groups().length - 1));
  at.rollout = Math.max(0, Math.min(at.rollout, group().rollouts.length - 1));
  show();
  if (turn !== null) $(`turn-${turn}`)?.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function toStep(by) {
  const step = Math.max(0, Math.min(at.step + by, steps().length - 1));
  if (step === at.step) return;
  const first = matching ? Math.max(0, matching[step].findIndex((found) => found.length)) : 0;
  go({ step, group: first, rollout: firstOf(step, first) });
}

// The next group that is shown in the list
function toGroup(by) {
  let g = at.group + by;
  while (matching && g >= 0 && g < groups().length && !matching[at.step][g].length) g += by;
  if (g < 0 || g >= groups().length) return;
  if (g >= tiles) {
    tiles += MOST_TILES;
    drawGroups();
  }
  go({ group: g, rollout: firstOf(at.step, g) });
}

function toRollout(by) {
  go({ rollout: at.rollout + by });
}

function toMode(mode) {
  if (!(mode in index.modes) || mode === at.mode) return;
  Object.assign(at, { mode, step: 0, group: 0, rollout: 0 });
  matching = null;
  drawn = {};
  show();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("tspo-theme", theme); } catch { /* not every browser keeps it for files */ }
}

function otherTheme() {
  const now = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

function clear() {
  $("search").value = at.search = "";
  at.filters = 0;
  changeFilter();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target === $("search")) {
    if (event.key === "Escape") { clear(); $("search").blur(); }
    if (event.key === "Enter") { $("search").blur(); search(); }
    return;
  }
  const modes = Object.keys(index.modes);
  const actions = {
    ArrowLeft: () => toStep(-1),
    ArrowRight: () => toStep(1),
    j: () => toGroup(1),
    k: () => toGroup(-1),
    l: () => toRollout(1),
    h: () => toRollout(-1),
    n: () => toMatch(1),
    N: () => toMatch(-1),
    "/": () => $("search").focus(),
    e: () => toMode(modes[(modes.indexOf(at.mode) + 1) % modes.length]),
    t: otherTheme,
    "?": () => $("help").showModal(),
    Escape: clear,
  };
  Object.keys(FILTERS).forEach((name, i) => (actions[String(i + 1)] = () => toggleFilter(name)));
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

let waiting = null;
function search() {
  clearTimeout(waiting);
  if (at.search === $("search").value) return;
  at.search = $("search").value;
  changeFilter();
}

// #train/42/3/5: mode, step, group and rollout, so that a place can be passed on
function readHash() {
  const [mode, step, group, rollout] = decodeURIComponent(location.hash.slice(1)).split("/");
  at.mode = mode in index.modes ? mode : Object.keys(index.modes)[0];
  const found = steps().findIndex((one) => one.step === Number(step));
  Object.assign(at, { step: found >= 0 ? found : steps().length - 1, group: (Number(group) || 1) - 1, rollout: (Number(rollout) || 1) - 1 });
}

const SETTINGS = {
  advantage_level: (value) => ({ stage: "stage-aware advantages", turn: "turn advantages", trajectory: "trajectory advantages (GRPO)" })[value] ?? value,
  folr_alpha: (value) => `partial reward α = ${value}`,
  folr_placement: (value) => (value === "first" ? null : "paid up to the first occurrence"),
  folr_guard: (value) => `guard “${value}”`,
  success_threshold: (value) => `correct from ${value} on`,
  num_generations: (value) => `${value} rollouts a group`,
};

function drawHead() {
  $("name").querySelector("h1").textContent = index.name;
  const told = Object.entries(SETTINGS).flatMap(([name, say]) => (name in index.settings ? (say(index.settings[name]) ?? []) : []));
  $("settings").textContent = told.length ? told.join("  ·  ") : "Settings were not saved: defaults are assumed";
  const names = { train: "Training", eval: "Evaluation" };
  $("modes").replaceChildren(
    ...Object.keys(index.modes).map((mode) => el("button", { "data-mode": mode, onclick: () => toMode(mode), title: "e" }, names[mode] ?? mode)),
  );
  $("modes").hidden = Object.keys(index.modes).length < 2;
  $("notes").hidden = !index.notes.length;
  $("notes").querySelector("summary").textContent = index.notes.length === 1 ? index.notes[0] : `${index.notes.length} notes on what is shown and what could not be read`;
  $("notes").querySelector("ul").replaceChildren(...(index.notes.length === 1 ? [] : index.notes.map((note) => el("li", {}, note))));
  $("keys").replaceChildren(...KEYS.flatMap(([keys, what]) => [el("dt", {}, keys.map((key) => (key === "…" ? "… " : el("kbd", {}, key)))), el("dd", {}, what)]));
}

async function start() {
  try {
    const kept = localStorage.getItem("tspo-theme");
    if (kept) document.documentElement.dataset.theme = kept; // else as the system says
  } catch { /* as above */ }
  if (!window.DecompressionStream) {
    $("name").querySelector("h1").textContent = "This browser is too old to unpack the page (it lacks DecompressionStream).";
    return;
  }
  index = await unpack("index");
  drawHead();
  readHash();
  go({});
  performance.mark("drawn");
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => { readHash(); drawn = {}; matching = null; go({}); });
  $("step").addEventListener("input", () => toStep(Number($("step").value) - at.step));
  $("back").addEventListener("click", () => toStep(-1));
  $("forth").addEventListener("click", () => toStep(1));
  $("previous").addEventListener("click", () => toMatch(-1));
  $("next").addEventListener("click", () => toMatch(1));
  $("theme").addEventListener("click", otherTheme);
  $("ask").addEventListener("click", () => $("help").showModal());
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 180); });
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done))); // paint first
  texts = await unpack("texts");
  if (at.search) sift();
  show();
  performance.mark("complete");
  document.documentElement.dataset.ready = "true";
}

start();
