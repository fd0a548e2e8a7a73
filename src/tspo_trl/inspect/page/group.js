// The groups of a step as tiles, and a group with its rollouts side by side.
const MOST_TILES = 200;
let tiles = MOST_TILES;

function drawGroups() {
  const shown = groups().flatMap((group, g) => (!matching || matching[at.step][g].length ? [[group, g]] : []));
  const nodes = shown.slice(0, tiles).map(([group, g]) => {
    const correct = group.rollouts.filter(([flags]) => flags & bit("correct")).length;
    return el(
      "button",
      { class: `tile ${group.kind}`, "data-group": g, "aria-current": String(g === at.group), onclick: () => go({ group: g, rollout: firstOf(at.step, g) }) },
      el("p", {}, group.question),
      el(
        "div",
        {},
        el("span", { class: "dots" }, group.rollouts.map((rollout, r) => dot(rollout, !matches(at.step, g, r)))),
        el("span", {}, group.kind === "mixed" ? `${correct} of ${group.rollouts.length}` : group.kind === "rescued" ? "rescued" : KINDS[group.kind]),
      ),
    );
  });
  if (!nodes.length) nodes.push(el("p", { class: "empty" }, "No rollout of this step matches."));
  if (shown.length > tiles)
    nodes.push(el("button", { id: "more", onclick: () => { tiles += MOST_TILES; drawGroups(); } }, `${shown.length - tiles} more groups`));
  $("groups").replaceChildren(...nodes);
}

const dot = (rollout, out = false) =>
  el("i", { class: `dot-rollout ${dotClass(rollout)}${out ? " is-out" : ""}`, title: dotName(rollout) });

const firstOf = (s, g) => (matching ? (matching[s][g][0] ?? 0) : 0);

function drawGroup() {
  const [overview, detail] = [group(), texts && groupTexts()];
  const golds = el("p", { class: "golds" }, "Golden answers: ", overview.golds.flatMap((gold, i) => [i ? " · " : "", el("mark", {}, gold)]));
  if (!detail) {
    $("group").replaceChildren(el("h2", {}, overview.question), golds, el("p", { class: "empty" }, "Unpacking the texts …"));
    $("rollout").replaceChildren();
    return;
  }
  const most = Math.max(...detail.rollouts.map((rollout) => rollout.turns.length), 0);
  const rows = [...Array(most).keys()].map((k) => {
    const rewards = detail.rollouts.flatMap((rollout) => rollout.turns[k]?.reward ?? []);
    const average = rewards.length ? rewards.reduce((a, b) => a + b) / rewards.length : null;
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, el("b", {}, `Turn ${k + 1}`), detail.by_turn ? `mean ${number(average)}` : ""),
      detail.rollouts.map((rollout, r) => el("td", {}, rollout.turns[k] ? cell(rollout, r, k) : "")),
    );
  });
  const outcomes = overview.rollouts.flatMap(([, outcome]) => outcome ?? []);
  const average = outcomes.length ? outcomes.reduce((a, b) => a + b) / outcomes.length : null;
  const head = el(
    "tr",
    {},
    el("th", {}, el("small", { class: "facts" }, detail.by_turn ? "" : `mean ${number(average)}`)),
    detail.rollouts.map((rollout, r) => el("th", { scope: "col" }, column(overview.rollouts[r], rollout, r))),
  );
  const sheet = el("div", { class: "sheet", tabindex: "-1" }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
  sheet.firstChild.style.setProperty("--columns", detail.rollouts.length);
  // Rollouts that do not fit into the window, on the right or else on the left
  const beyond = el("button", { class: "beyond", onclick: () => sheet.scrollBy({ left: Number(beyond.dataset.way) * sheet.clientWidth, behavior: "smooth" }) });
  const tellBeyond = () => {
    const [labels, ...columns] = sheet.querySelectorAll("thead th");
    const [begin, end] = [sheet.scrollLeft + labels.offsetWidth, sheet.scrollLeft + sheet.clientWidth];
    const right = columns.filter((th) => th.offsetLeft + th.offsetWidth - 8 > end).length;
    const left = columns.filter((th) => th.offsetLeft + 8 < begin).length;
    beyond.hidden = !right && !left;
    beyond.dataset.way = right ? 1 : -1;
    beyond.textContent = right ? `${plural(right, "more rollout")} →` : `← ${plural(left, "more rollout")}`;
  };
  sheet.addEventListener("scroll", tellBeyond);
  const scrolled = $("group").querySelector(".sheet")?.scrollLeft ?? 0;
  const same = $("group").dataset.key === `${at.mode} ${at.step} ${at.group}`;
  $("group").dataset.key = `${at.mode} ${at.step} ${at.group}`;
  $("group").replaceChildren(
    el("h2", {}, overview.question),
    golds,
    el("div", { class: "verdict" }, el("span", { class: `kind ${overview.kind}` }, KINDS[overview.kind]), el("p", {}, detail.why)),
    beyond,
    sheet,
    legend(),
  );
  if (same) sheet.scrollLeft = scrolled;
  const chosen = sheet.querySelector("[aria-current=true]")?.closest("th");
  if (chosen) {
    const [left, right] = [chosen.offsetLeft - 90, chosen.offsetLeft + chosen.offsetWidth + 20];
    if (left < sheet.scrollLeft) sheet.scrollLeft = left;
    if (right > sheet.scrollLeft + sheet.clientWidth) sheet.scrollLeft = right - sheet.clientWidth;
  }
  tellBeyond();
  new ResizeObserver(tellBeyond).observe(sheet);
}

function column([flags, outcome], rollout, r) {
  return el(
    "button",
    { class: `column${matches(at.step, at.group, r) ? "" : " is-out"}`, "aria-current": String(r === at.rollout), onclick: () => go({ rollout: r }), title: rollout.answer ?? "no answer" },
    el("span", {}, dot([flags, outcome]), `${r + 1} · ${dotName([flags, outcome])}${Number.isInteger(outcome ?? 0) ? "" : ` ${number(outcome)}`}`),
    el("em", {}, short(rollout.answer ?? rollout.status.replace("_", " "))),
  );
}

const VERBS = { search: "search", answer: "answer", invalid: "invalid", none: "no action" };

function cell(rollout, r, k) {
  const turn = rollout.turns[k];
  const star = rollout.credited === k && turn.reward !== null && turn.reward > (group().rollouts[r][1] ?? 0);
  const node = el(
    "button",
    { class: `cell${matches(at.step, at.group, r) ? "" : " is-out"}${r === at.rollout ? " is-here" : ""}`, title: turn.why.join("\n"), onclick: () => go({ rollout: r }, k) },
    el("i", {}, VERBS[turn.action] ?? turn.action),
    el("em", {}, short(turn.content.trim() || turn.text.trim() || "–")),
    el("div", {}, el("span", { class: star ? "star" : null }, `r ${number(turn.reward)}`), el("b", {}, `A ${number(turn.advantage, 2, true)}`)),
  );
  return tint(node, turn.advantage);
}

function legend() {
  const paid = index.settings.folr_alpha === undefined ? "partial reward" : `partial reward, α = ${number(index.settings.folr_alpha)}`;
  return el(
    "p",
    { class: "legend" },
    el("span", {}, "A = −2", el("i", { class: "ramp" }), "+2 advantage"),
    el("span", {}, el("mark", {}, "r 0.50"), `first found here: ${paid}`),
    el("span", {}, dot([bit("correct"), 1]), "correct"),
    el("span", {}, dot([bit("near_miss"), 0]), "near miss"),
    el("span", {}, dot([0, 0]), "wrong"),
  );
}
