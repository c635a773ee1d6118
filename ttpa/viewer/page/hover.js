// The box beside the pointer: what is known of a token, and the errors that it is a part of.

class Hover {
  constructor(header) {
    this.header = header;
    this.box = document.getElementById("hover");
  }

  hide() {
    this.box.hidden = true;
  }

  show(token, target) {
    const rows = [["class", this.header.classes[token.class].replaceAll("_", " ")]];
    if (token.entropy !== null) rows.push(["entropy", `${number(token.entropy, 3)} nats`]);
    if (token.logp !== null) {
      rows.push(["probability", `${percent(Math.exp(token.logp))} (${number(token.logp, 3)} nats)`]);
    }
    if (token.ratio !== null) rows.push(["log-ratio", `${signed(token.ratio, 4)} nats`]);
    if (token.weight !== null) {
      rows.push(["weight", `${number(token.weight, 3)} (${token.cancels ? "cancels" : token.side})`]);
    }
    if (!token.written) rows.push(["", "not written by the model"]);
    const facts = element("dl", "");
    for (const [name, value] of rows) facts.append(element("dt", "", name), element("dd", "", value));
    const text = element("code", "", JSON.stringify(token.text));
    const head = element("p", "piece", text, element("span", "", `id ${token.id}`));
    this.box.replaceChildren(head, facts, ...token.errors.map((error) => errorNote(error)));
    this.box.hidden = false;
    this.place(target);
  }

  place(target) {
    const at = target.getClientRects()[0], box = this.box.getBoundingClientRect();
    const left = Math.min(at.left, innerWidth - box.width - 8);
    const below = at.bottom + 6;
    const top = below + box.height < innerHeight - 4 ? below : Math.max(4, at.top - box.height - 6);
    this.box.style.left = `${Math.max(4, left)}px`;
    this.box.style.top = `${top}px`;
  }
}

function percent(share) {
  return share >= 0.9995 ? "100 %" : share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

// One error in words; `expected` and `got` are there where they are known.
function errorNote(error) {
  const note = element("div", "error", element("b", "", error.code));
  if (error.pointer) note.append(" ", element("code", "", error.pointer));
  if (error.call > 0) note.append(` call ${error.call}`);
  const values = element("span", "values");
  for (const name of ["expected", "got"]) {
    if (error[name] !== undefined && error[name] !== null) {
      values.append(element("span", "name", name), element("code", "", shorten(JSON.stringify(error[name]))));
    }
  }
  if (values.childNodes.length) note.append(values);
  if (error.tokens) {
    const [first, end] = error.tokens;
    const some = end - first === 1 ? `token ${first}` : `tokens ${first} to ${end - 1}`;
    note.append(element("span", "places", end > first ? some : "at the end"));
  }
  return note;
}

function shorten(text) {
  return text.length > 160 ? `${text.slice(0, 157)} …` : text;
}
