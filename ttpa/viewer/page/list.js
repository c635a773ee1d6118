// The list of trees: only the rows in sight are on the page, however many there are.

const ROW_HEIGHT = 50;

class TreeList {
  constructor(records, choose) {
    this.records = records;
    this.choose = choose;
    this.box = document.getElementById("list");
    this.rows = document.getElementById("rows");
    this.found = [];
    this.current = -1;
    this.box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.rows.addEventListener("click", (event) => {
      const row = event.target.closest(".tree");
      if (row) this.choose(Number(row.dataset.index));
    });
  }

  show(found) {
    this.found = found;
    this.rows.style.height = `${found.length * ROW_HEIGHT}px`;
    this.draw();
  }

  select(index) {
    this.current = index;
    const at = this.found.indexOf(index), top = at * ROW_HEIGHT;
    if (at >= 0 && (top < this.box.scrollTop || top + ROW_HEIGHT > this.box.scrollTop + this.box.clientHeight)) {
      this.box.scrollTop = top - this.box.clientHeight / 3;
    }
    this.draw();
  }

  // The tree so many places away among those listed; from one that is not listed, the first.
  neighbour(step) {
    const at = this.found.indexOf(this.current);
    return at < 0 ? this.found[0] : this.found[Math.min(this.found.length - 1, Math.max(0, at + step))];
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(this.found.length, first + Math.ceil(this.box.clientHeight / ROW_HEIGHT) + 8);
    const drawn = [];
    for (let at = first; at < last; at++) drawn.push(this.row(this.found[at], at));
    this.rows.replaceChildren(...drawn);
    if (this.found.includes(this.current)) this.box.setAttribute("aria-activedescendant", `tree-${this.current}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(index, at) {
    const { id, about, calls, leaves, pairs } = this.records.rows[index];
    const bars = element("span", "bars");
    for (const [, score] of leaves.slice(0, 16)) {
      const bar = element("i", score === null ? "unknown" : score >= 1 ? "right" : "wrong");
      bar.style.setProperty("--score", score === null ? 0 : Math.min(1, Math.max(0, score)));
      bars.append(bar);
    }
    bars.title = `${plural(leaves.length, "leaf")}, ${plural(pairs, "pair")}; bars are scores`;
    const row = element(
      "div", "tree",
      element("span", "id", id), bars,
      element("span", "about", about || calls.join(", ")),
      element("span", "pairs", pairs ? plural(pairs, "pair") : "no pair"),
    );
    row.id = `tree-${index}`;
    row.dataset.index = index;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(index === this.current));
    row.style.top = `${at * ROW_HEIGHT}px`;
    return row;
  }
}
