// Colourings: what a token's background says. Each gives a hue (a class of the style) and a strength from 0 to 1.

const CLASS_HUES = {
  tool_name: "violet", argument_key: "blue", argument_value: "green", tool_result: "amber", end_of_turn: "pink",
  scaffolding: "grey", prompt: "cyan",
};

const MODES = [
  { name: "entropy", title: "Entropy of the distribution that the token was drawn from" },
  { name: "class", title: "What the token is a part of" },
  { name: "weight", title: "Weight of the token in the selected pair" },
  { name: "log-ratio", title: "Log-probability of the policy minus that of the reference" },
  { name: "none", title: "No colours" },
];

function paint(mode, token, header) {
  if (mode === "entropy" && token.entropy !== null) {
    return ["orange", Math.sqrt(Math.min(1, token.entropy / header.scales.entropy))];
  }
  if (mode === "class") {
    const hue = CLASS_HUES[header.classes[token.class]];
    return hue ? [hue, hue === "grey" ? 0.35 : 0.6] : null;
  }
  if (mode === "weight" && token.weight && !token.cancels) {
    return [token.side === "chosen" ? "green" : "red", 0.25 + 0.75 * Math.min(1, token.weight / token.mostWeight)];
  }
  if (mode === "log-ratio" && token.ratio !== null) {
    return [token.ratio > 0 ? "blue" : "red", Math.sqrt(Math.min(1, Math.abs(token.ratio) / header.scales.ratios))];
  }
  return null;
}

function available(mode, header) {
  return mode.name !== "log-ratio" || header.policy !== null;
}

function legend(mode, header) {
  const scale = (hues, ...labels) => {
    const ramp = element("span", `ramp ${hues}`);
    return [labels[0], ramp, ...labels.slice(1)];
  };
  if (mode === "entropy") return scale("orange", "0", `${header.scales.entropy} nats`);
  if (mode === "log-ratio") {
    const most = header.scales.ratios;
    return scale("red-blue", `\u2212${most}`, `+${most} nats against ${header.reference}`);
  }
  if (mode === "weight") {
    const key = (hue, label) => element("span", "key", element("i", `swatch hue ${hue}`), label);
    return [key("green", "chosen"), key("red", "rejected"), "no colour: 0, or shared with equal weight"];
  }
  if (mode === "class") {
    return header.classes.filter((name) => CLASS_HUES[name]).map((name) => {
      return element("span", "key", element("i", `swatch hue ${CLASS_HUES[name]}`), name.replaceAll("_", " "));
    });
  }
  return [];
}
