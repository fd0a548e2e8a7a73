// A rollout as text: what the model wrote, what it read, what each turn got and why.
const STATUS = { no_answer: "no answer", truncated: "truncated: out of tokens", retrieval_failed: "retrieval failed" };
const RETRIEVAL = { empty: "search found nothing", timeout: "search timed out", error: "search failed" };

function drawRollout() {
  if (!texts) return;
  const [overview, detail] = [group().rollouts[at.rollout], groupTexts()];
  const rollout = detail.rollouts[at.rollout];
  const name = dotName(overview);
  const rewards = Object.entries(rollout.rewards).map(([name, value]) => `${name.replace(/_reward$/, "").replaceAll("_", " ")} ${number(value)}`);
  const tokens = rollout.turns.reduce((sum, turn) => [sum[0] + turn.tokens[0], sum[1] + turn.tokens[1]], [0, 0]);
  const header = el(
    "header",
    {},
    el("h2", {}, `Rollout ${at.rollout + 1}`),
    el("span", { class: `badge ${dotClass(overview)}` }, name),
    STATUS[rollout.status] ? el("span", { class: "badge is-trouble" }, STATUS[rollout.status]) : null,
    el("span", { class: "facts" }, `${rewards.join(" · ")} · ${plural(tokens[0], "token")} ${evaluated() ? "written" : "trained"}, ${tokens[1].toLocaleString("en")} ${evaluated() ? "read" : "only read"}`),
  );
  const prompt = detail.prompt ? el("details", { class: "prompt" }, el("summary", {}, "Prompt"), el("pre", {}, detail.prompt)) : "";
  $("rollout").replaceChildren(header, prompt, ...rollout.turns.map((turn, k) => drawTurn(detail, rollout, turn, k)));
  highlightSearch();
}

function drawTurn(detail, rollout, turn, k) {
  const score = el(
    "div",
    { class: "score" },
    el("h3", {}, `Turn ${k + 1}`),
    el("dl", {}, el("div", {}, el("dt", {}, "reward"), el("dd", {}, number(turn.reward))), el("div", {}, el("dt", {}, "advantage"), el("dd", {}, number(turn.advantage, 2, true)))),
  );
  const cut = rollout.status === "truncated" && k === rollout.turns.length - 1;
  const meta = el(
    "div",
    { class: "meta" },
    el("span", { class: `badge${turn.action === "invalid" ? " is-trouble" : ""}` }, turn.action === "invalid" ? "invalid: no well-formed action" : VERBS[turn.action] ?? turn.action),
    RETRIEVAL[turn.retrieval] ? el("span", { class: "badge is-trouble" }, RETRIEVAL[turn.retrieval]) : null,
    turn.action === "search" && !turn.retrieval ? el("span", { class: "badge" }, "not executed: the last turn cannot search") : null,
    turn.duplicate ? el("span", { class: "badge" }, "same query as before") : null,
    cut ? el("span", { class: "badge is-trouble" }, "cut off here") : null,
    el("span", {}, plural(turn.tokens[0], "token") + (turn.logprob === undefined ? "" : ` · mean log-probability ${number(turn.logprob)}`)),
  );
  const body = el(
    "div",
    { class: "body" },
    meta,
    el("div", { class: "says" }, marked(turn.text.trim(), shift(turn), true)),
    el("div", { class: "why" }, turn.why.map((sentence) => el("p", {}, sentence))),
    observation(detail, rollout, turn, k),
  );
  return tint(el("section", { class: "turn", id: `turn-${k}` }, score, body), turn.advantage);
}

// The marks of a text whose white space at the ends is not shown
function shift(turn) {
  const lost = turn.text.length - turn.text.trimStart().length;
  return turn.marks?.map((place) => place - lost);
}

function observation(detail, rollout, turn, k) {
  if (!turn.tokens[1]) return null;
  const paid = turn.reward - (group().rollouts[at.rollout][1] ?? 0);
  const first =
    rollout.first === k || rollout.credited === k
      ? el("span", { class: "first" }, `golden answer first found here${rollout.credited === k && paid > 1e-6 ? `: ${number(paid, 2, true)}` : ""}`)
      : null;
  const head = el("header", {}, el("b", {}, turn.passages ? "Passages" : "Hint"), first, el("span", {}, evaluated() ? plural(turn.tokens[1], "token") : `read, not trained: ${plural(turn.tokens[1], "token")} masked`));
  const content = turn.passages
    ? turn.passages.map((passage, i) => {
        const [title, text] = texts.passages[passage];
        const [inTitle, inText] = detail.marks[passage] ?? [];
        return el("p", { class: "passage" }, title ? [el("b", {}, marked(title, inTitle)), "  "] : "", marked(text, inText), el("small", { title: "score of the retriever" }, number(turn.scores[i])));
      })
    : el("p", { class: "passage" }, turn.hint?.trim() ?? "Its text needs the tokenizer, which is not in the folder of the run.");
  return el("div", { class: "seen" }, head, content);
}

function highlightSearch() {
  if (!window.Highlight) return;
  CSS.highlights.delete("searched");
  const wanted = at.search.trim().toLowerCase();
  if (!wanted) return;
  const ranges = [];
  const walk = document.createTreeWalker($("rollout"), NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const text = node.data.toLowerCase();
    if (text.length !== node.length) continue; // letters that change their length
    for (let i = text.indexOf(wanted); i >= 0; i = text.indexOf(wanted, i + wanted.length)) {
      const range = new Range();
      range.setStart(node, i);
      range.setEnd(node, i + wanted.length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("searched", new Highlight(...ranges));
}
