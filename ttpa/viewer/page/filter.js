// Which trees are listed. Code, kind and score are asked of one and the same leaf.

function matching(records, wanted) {
  const words = wanted.search.toLowerCase().split(/\s+/).filter(Boolean);
  const low = bound(wanted.low, -Infinity), high = bound(wanted.high, Infinity);
  const anyLeaf = !wanted.code && !wanted.kind && low === -Infinity && high === Infinity;
  const fits = ([kind, score, codes]) =>
    (!wanted.kind || kind === wanted.kind) &&
    (!wanted.code || codes.includes(wanted.code)) &&
    (low === -Infinity || (score !== null && score >= low)) &&
    (high === Infinity || (score !== null && score <= high));
  const found = [];
  records.rows.forEach((row, index) => {
    if (wanted.paired && (row.pairs > 0) !== (wanted.paired === "yes")) return;
    if (!anyLeaf && !row.leaves.some(fits)) return;
    if (words.length && !words.every((word) => records.text(index).includes(word))) return;
    found.push(index);
  });
  return found;
}

function bound(text, otherwise) {
  const value = parseFloat(text);
  return Number.isNaN(value) ? otherwise : value;
}

function fillChoices(select, every, counts) {
  select.append(new Option(every, ""));
  for (const [name, count] of Object.entries(counts).sort(([a], [b]) => (a < b ? -1 : 1))) {
    select.append(new Option(`${name} (${count.toLocaleString("en")})`, name));
  }
}
