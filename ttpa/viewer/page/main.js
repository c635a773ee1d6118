// The page as a whole: what is chosen, the address that remembers it, the keyboard.

const state = { tree: 0, mode: "entropy", pair: null };
const fields = ["search", "code", "kind", "paired", "low", "high"].map((id) => document.getElementById(id));
let records, list, view;

try {
  records = await readRecords();
  start();
} catch (error) {
  const why = typeof DecompressionStream === "undefined" ? "it needs a browser of 2023 or later" : String(error);
  document.getElementById("state").textContent = `The trees could not be read: ${why}`;
}

function start() {
  const { header } = records;
  const pairs = header.rows.reduce((sum, row) => sum + row.pairs, 0);
  document.getElementById("facts").textContent = `${plural(header.rows.length, "tree")}, ${plural(pairs, "pair")}`;
  document.getElementById("facts").title = `${header.file}; tokens of ${header.tokenizer}`;
  fillChoices(document.getElementById("code"), "any error", header.codes);
  fillChoices(document.getElementById("kind"), "any kind", header.kinds);
  for (const mode of MODES.filter((each) => available(each, header))) {
    const input = element("input", "");
    Object.assign(input, { type: "radio", name: "mode", value: mode.name });
    const label = element("label", "", input, mode.name);
    label.title = mode.title;
    document.getElementById("modes").append(label);
  }
  list = new TreeList(records, chooseTree);
  view = new TreeView(records, new Hover(header), choosePair);
  document.getElementById("modes").addEventListener("change", (event) => chooseMode(event.target.value));
  document.getElementById("filter").addEventListener("input", () => filter(true));
  document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("keys").addEventListener("click", () => document.getElementById("help").showModal());
  document.addEventListener("keydown", key);
  addEventListener("hashchange", recall);
  recall();
  document.documentElement.dataset.ready = performance.now();
}

// What the address says; anything it does not say is as at first.
function recall() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const field of fields) field.value = said.get(field.id) || "";
  state.mode = MODES.some((mode) => mode.name === said.get("color") && available(mode, records.header))
    ? said.get("color")
    : records.rows.length && !records.header.rows.some((row) => row.leaves.some(([kind]) => kind !== "given"))
      ? "class"
      : "entropy";
  filter(false);
  const named = records.rows.findIndex((row) => row.id === said.get("tree"));
  const pair = said.has("pair") ? Number(said.get("pair")) : null;
  chooseTree(named >= 0 ? named : list.found[0], pair);
}

function remember() {
  const said = new URLSearchParams();
  if (records.rows[state.tree]) said.set("tree", records.rows[state.tree].id);
  said.set("color", state.mode);
  if (state.pair !== null) said.set("pair", state.pair);
  for (const field of fields) if (field.value) said.set(field.id, field.value);
  history.replaceState(null, "", `#${said}`);
}

function filter(show) {
  const wanted = Object.fromEntries(fields.map((field) => [field.id, field.value]));
  const found = matching(records, wanted), all = records.rows.length;
  document.getElementById("count").textContent = found.length === all
    ? plural(all, "tree")
    : `${found.length.toLocaleString("en")} of ${plural(all, "tree")}`;
  list.show(found);
  if (show && !found.includes(state.tree)) chooseTree(found[0]);
  else if (show) remember();
}

function chooseTree(index, pair = null) {
  if (index === undefined) {
    state.tree = -1;
    state.pair = null;
    const why = records.rows.length ? "No tree fits the search." : "The file holds no tree.";
    document.getElementById("main").replaceChildren(element("p", "empty", why));
  } else {
    state.tree = index;
    state.pair = withPair(pair);
    view.show(index, state.mode, state.pair);
  }
  list.select(state.tree);
  legendOf(state.mode);
  remember();
}

// Weights are those of a pair, so that colouring never goes without one.
function withPair(pair) {
  const count = records.rows[state.tree].pairs;
  if (pair !== null && pair >= 0 && pair < count) return pair;
  return state.mode === "weight" && count ? 0 : null;
}

function choosePair(pair) {
  state.pair = withPair(pair);
  view.draw(state.mode, state.pair);
  remember();
}

function chooseMode(mode) {
  state.mode = mode;
  legendOf(mode);
  if (state.tree >= 0) choosePair(state.pair);
  else remember();
}

function legendOf(mode) {
  document.querySelector(`#modes input[value="${mode}"]`).checked = true;
  document.getElementById("legend").replaceChildren(...legend(mode, records.header));
}

function key(event) {
  const writing = event.target.matches("input:not([type=radio]), select"), search = document.getElementById("search");
  if (document.getElementById("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && writing) event.target.blur();
  else if (event.key === "Escape" && state.pair !== null) choosePair(null);
  else if (writing) return;
  else if (event.key === "j" || event.key === "k") chooseTree(list.neighbour(event.key === "j" ? 1 : -1));
  else if ((event.key === "n" || event.key === "p") && state.tree >= 0) stepPair(event.key === "n" ? 1 : -1);
  else if (event.key === "c") stepMode();
  else if (event.key === "/") search.focus();
  else if (event.key === "?") document.getElementById("help").showModal();
  else return;
  event.preventDefault();
}

function stepPair(step) {
  const count = records.rows[state.tree].pairs;
  if (count) choosePair(state.pair === null ? (step > 0 ? 0 : count - 1) : (state.pair + step + count) % count);
}

function stepMode() {
  const modes = MODES.filter((mode) => available(mode, records.header)).map((mode) => mode.name);
  chooseMode(modes[(modes.indexOf(state.mode) + 1) % modes.length]);
}
