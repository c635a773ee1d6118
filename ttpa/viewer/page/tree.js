// One tree: a row for each leaf, in depth-first order. What a row shares with one above it, or in a selected pair with
// the other side, is written faintly: every row reads from its beginning, and its first strong token is the one at
// which it parted.

const LONG_SHARE = 64; // shared tokens of which only the last are written
const KEPT_SHARE = 24;
const UNKNOWN = "unknown";

class TreeView {
  constructor(records, hover, choosePair) {
    this.records = records;
    this.hover = hover;
    this.choosePair = choosePair;
    this.main = document.getElementById("main");
    this.main.addEventListener("mouseover", (event) => this.pointAt(event.target.closest(".t, .error[data-leaf]")));
    this.main.addEventListener("mouseleave", () => this.pointAt(null));
    this.main.addEventListener("scroll", () => this.hover.hide());
    this.main.addEventListener("click", (event) => this.click(event.target));
  }

  show(index, mode, pair) {
    this.tree = this.records.tree(index);
    this.rows = layOut(this.tree);
    this.unfolded = new Set();
    const { tree } = this;
    const head = element(
      "div", "head",
      element("h2", "", tree.id),
      element("span", "", `turn ${tree.turn}`),
      element("span", "", plural(tree.leaves.length, "leaf")),
      element("span", "", plural(tree.pairs.length, "pair")),
    );
    const prompt = element("details", "prompt", element(
      "summary", "",
      element("b", "", `prompt, ${plural(tree.prompt_tokens, "token")}`),
      element("span", "about", tree.about),
    ), element("pre", "", tree.prompt));
    this.body = element("div", "rows");
    this.pairs = element("div", "pairlist");
    this.main.replaceChildren(head, prompt, this.body, this.pairs);
    this.main.scrollTop = 0;
    this.draw(mode, pair);
  }

  draw(mode, pair) {
    this.mode = mode;
    this.pair = pair;
    this.hover.hide();
    this.body.replaceChildren(...this.rows.map((row, at) => this.row(row, at)));
    this.drawPairs();
  }

  // What is known of the tokens from the prompt to the end of a leaf.
  tokens(row) {
    const { tree, records } = this, pair = tree.pairs[this.pair];
    const side = !pair || row.leaf === null ? null : { [pair.chosen]: "chosen", [pair.rejected]: "rejected" }[row.leaf];
    const weights = side ? pair.weights[side === "chosen" ? 0 : 1] : null;
    const mostWeight = side ? Math.max(...pair.weights.map((each) => each.reduce((a, b) => Math.max(a, b), 0))) : 0;
    const common = side ? commonNodes(tree, pair) : new Set();
    const errors = row.leaf === null ? [] : tree.leaves[row.leaf].errors;
    const tokens = [];
    for (const n of row.path) {
      const node = tree.nodes[n];
      node.tokens.forEach((token, i) => {
        const place = tokens.length, [id, text] = records.header.pieces[token];
        tokens.push({
          id, text, place, side, mostWeight,
          class: node.classes[i],
          entropy: node.entropy ? node.entropy[i] : null,
          logp: node.logps ? node.logps[i] : null,
          ratio: node.ratios ? node.ratios[i] : null,
          written: !node.trained || node.trained[i] === 1,
          weight: weights ? weights[place] : null,
          cancels: common.has(n) && pair.weights[0][place] === pair.weights[1][place],
          shared: side ? common.has(n) : place < row.shared,
          errors: errors.filter(({ tokens: range }) => range && touches(range, place)),
        });
      });
    }
    return tokens;
  }

  row(row, at) {
    const tokens = this.tokens(row), side = tokens.length ? tokens[0].side : null;
    const leaf = row.leaf === null ? null : this.tree.leaves[row.leaf];
    const label = element("div", "label");
    if (leaf) {
      const score = leaf.score === null ? "" : number(leaf.score, 2);
      label.append(
        element("span", "number", `${row.leaf}`),
        element("span", `kind ${leaf.kind}`, leaf.kind),
        element("span", leaf.score >= 1 ? "score right" : "score", score),
      );
    } else {
      label.append(element("span", "kind", "no leaf"));
    }
    const text = element("div", "text");
    const shared = tokens.filter((token) => token.shared).length;
    const hidden = this.unfolded.has(at) || shared <= LONG_SHARE ? 0 : shared - KEPT_SHARE;
    if (hidden) {
      const more = element("button", "fold", `${plural(hidden, "shared token")} …`);
      more.dataset.row = at;
      text.append(more);
    }
    for (const token of tokens.slice(hidden)) text.append(this.token(token, shared));
    if (leaf && leaf.finish === "length") text.append(element("span", "cut", "cut off"));
    const notes = element("div", "notes");
    (leaf ? leaf.errors : []).forEach((error, e) => {
      const note = errorNote(error);
      note.dataset.leaf = row.leaf;
      note.dataset.error = e;
      notes.append(note);
    });
    const faded = this.pair !== null && !side ? " faded" : "";
    const made = element("section", `row${side ? ` ${side}` : ""}${faded}`, graph(this.rows, at), label, text, notes);
    if (side) label.append(element("span", "side", side));
    row.tokens = tokens;
    row.element = made;
    made.dataset.row = at;
    return made;
  }

  token(token, shared) {
    const span = element("span", "t");
    span.dataset.place = token.place;
    if (token.shared) span.classList.add("shared");
    if (token.place === shared && shared > 0) span.classList.add("fork");
    if (token.errors.length) span.classList.add("wrong");
    const painted = paint(this.mode, token, this.records.header);
    if (painted) {
      span.classList.add("hue", painted[0]);
      span.style.setProperty("--strength", painted[1].toFixed(3));
    }
    // line ends around the parts of a call are marked and no more, so that a call stays in one piece
    const end = this.records.header.classes[token.class] === "scaffolding" ? "" : "\n";
    token.text.split("\n").forEach((line, i) => {
      if (i) span.append(element("span", "mark", "↵"), end);
      span.append(line);
    });
    if (!token.text) span.append(element("span", "mark", "·"));
    return span;
  }

  drawPairs() {
    const { tree } = this;
    const policy = this.records.header.policy !== null;
    if (!tree.pairs.length) return this.pairs.replaceChildren(element("p", "empty", "This tree has no pair."));
    const names = ["pair", "chosen", "rejected", "margin", ...(policy ? ["log-ratio", "weighted"] : [])];
    const titles = {
      margin: "Score of the chosen leaf minus that of the rejected one",
      "log-ratio": "Sum of log-ratios over the chosen side minus that over the rejected side, in nats",
      weighted: "The same, each token times its weight",
    };
    const table = element("table", "", element("thead", "", element("tr", "", ...names.map((name) => {
      const cell = element("th", "", name);
      if (titles[name]) cell.title = titles[name];
      return cell;
    }))));
    const body = element("tbody", "");
    tree.pairs.forEach((pair, p) => {
      const name = (leaf) => `${leaf} ${tree.leaves[leaf].kind}`;
      const button = element("button", "", `${p}`);
      button.setAttribute("aria-pressed", String(p === this.pair));
      const cells = [button, name(pair.chosen), name(pair.rejected), signed(pair.margin, 3)];
      if (policy) for (const weighted of [false, true]) cells.push(gain(tree, pair, weighted));
      const row = element("tr", p === this.pair ? "current" : "", ...cells.map((cell) => element("td", "", cell)));
      if (cells.includes(UNKNOWN)) row.title = "Nothing is known of some tokens; --ref_model computes it";
      row.dataset.pair = p;
      body.append(row);
    });
    table.append(body);
    this.pairs.replaceChildren(element("h3", "", "Pairs"), table);
  }

  click(target) {
    const fold = target.closest(".fold"), pair = target.closest("[data-pair]");
    if (fold) {
      this.unfolded.add(Number(fold.dataset.row));
      this.draw(this.mode, this.pair);
    } else if (pair) {
      const p = Number(pair.dataset.pair);
      this.choosePair(p === this.pair ? null : p);
    }
  }

  // Shows what is known of a token, or marks the tokens of an error.
  pointAt(target) {
    for (const marked of this.main.querySelectorAll(".lit")) marked.classList.remove("lit");
    if (!target) return this.hover.hide();
    const row = this.rows[Number(target.closest(".row").dataset.row)];
    if (target.classList.contains("t")) return this.hover.show(row.tokens[Number(target.dataset.place)], target);
    this.hover.hide();
    const range = this.tree.leaves[row.leaf].errors[Number(target.dataset.error)].tokens;
    target.classList.add("lit");
    for (const token of row.element.querySelectorAll(".t")) {
      if (range && touches(range, Number(token.dataset.place))) token.classList.add("lit");
    }
  }
}

function commonNodes(tree, pair) {
  const other = new Set(pathTo(tree, tree.leaves[pair.rejected].node));
  return new Set(pathTo(tree, tree.leaves[pair.chosen].node).filter((n) => other.has(n)));
}

// A range that is empty stands for a place: the token behind it, where there is one.
function touches([first, end], place) {
  return place >= first && place < Math.max(end, first + 1);
}

function gain(tree, pair, weighted) {
  let total = 0;
  for (const [leaf, sign, weights] of [[pair.chosen, 1, pair.weights[0]], [pair.rejected, -1, pair.weights[1]]]) {
    const nodes = pathTo(tree, tree.leaves[leaf].node).map((n) => tree.nodes[n]);
    const ratios = nodes.flatMap((node) => node.ratios);
    const written = nodes.flatMap((node) => node.trained || node.tokens.map(() => 1));
    for (let i = 0; i < ratios.length; i++) {
      const weight = weighted ? weights[i] : written[i];
      if (weight && ratios[i] === null) return UNKNOWN;
      total += sign * weight * (ratios[i] || 0);
    }
  }
  return signed(total, 3);
}

// The rows of a tree in depth-first order. `shared` counts the tokens that stand in the row `from` already.
function layOut(tree) {
  const inner = new Set(tree.nodes.map((node) => node.parent));
  const ended = new Set(tree.leaves.map((leaf) => leaf.node));
  const ends = tree.leaves.map((leaf, i) => ({ leaf: i, node: leaf.node }));
  tree.nodes.forEach((_, n) => {
    if (!inner.has(n) && !ended.has(n)) ends.push({ leaf: null, node: n });
  });
  ends.sort((a, b) => a.node - b.node);
  const rowOf = new Map();
  return ends.map(({ leaf, node }, at) => {
    const path = pathTo(tree, node);
    const sizes = path.map((n) => tree.nodes[n].tokens.length);
    const known = path.filter((n) => rowOf.has(n)).length;
    const from = known ? rowOf.get(path[known - 1]) : 0;
    for (const n of path) if (!rowOf.has(n)) rowOf.set(n, at);
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    return { leaf, path, from, shared: sum(sizes.slice(0, known)), length: sum(sizes) };
  });
}

// The lines left of a row: its own branch, and those that pass it on their way down.
function graph(rows, at) {
  const box = element("div", "graph"), longest = Math.max(1, ...rows.map((row) => row.length));
  const place = (depth) => `${(100 * depth / longest).toFixed(2)}%`;
  const line = (kind, depth) => {
    const made = element("i", kind);
    made.style.left = place(depth);
    box.append(made);
    return made;
  };
  line("across", rows[at].shared).style.width = place(rows[at].length - rows[at].shared);
  rows.forEach((row, r) => {
    if (r === at && r > 0) line("into", row.shared);
    else if (r > at && row.from === at) line("out", row.shared);
    else if (r > at && row.from < at) line("past", row.shared);
  });
  line("end", rows[at].length);
  return box;
}
