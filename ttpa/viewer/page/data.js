// The records: one line of JSON that the whole page needs, then one line a tree, read when the tree is looked at.

async function readRecords() {
  const holder = document.getElementById("records");
  const binary = atob(holder.textContent);
  holder.remove();
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const [header, ...lines] = (await new Response(stream).text()).split("\n");
  return new Records(JSON.parse(header), lines);
}

class Records {
  constructor(header, lines) {
    this.header = header;
    this.rows = header.rows;
    this.lines = lines;
    this.texts = [];
  }

  tree(index) {
    return JSON.parse(this.lines[index]);
  }

  piece(token) {
    return this.header.pieces[token][1];
  }

  // Everything that a search looks through: of a shared token one copy is enough, so nodes are joined to paths.
  text(index) {
    if (this.texts[index] === undefined) {
      const tree = this.tree(index), row = this.rows[index];
      const ofNode = tree.nodes.map((node) => node.tokens.map((token) => this.piece(token)).join(""));
      const paths = tree.leaves.map((leaf) => pathTo(tree, leaf.node).map((n) => ofNode[n]).join(""));
      const codes = row.leaves.flatMap(([, , names]) => names);
      const parts = [tree.id, tree.prompt, ...ofNode, ...paths, ...row.calls, ...tree.tools, ...codes];
      this.texts[index] = parts.join("\n").toLowerCase();
    }
    return this.texts[index];
  }
}

function pathTo(tree, node) {
  const path = [];
  for (let n = node; n >= 0; n = tree.nodes[n].parent) path.push(n);
  return path.reverse();
}

// An element with text and children; nothing on this page is ever read as HTML.
function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

function number(value, digits) {
  return value.toFixed(digits).replace("-", "\u2212");
}

function signed(value, digits) {
  return (value > 0 ? "+" : "") + number(value, digits);
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word === "leaf" && count !== 1 ? "leave" : word}${count === 1 ? "" : "s"}`;
}
