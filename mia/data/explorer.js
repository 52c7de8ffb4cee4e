"use strict";
// One text, explored: what a page shows of it. `explorer(host, source, hooks)` draws it all into an
// element. Everything that is shown is asked of `source`, whose answers may take their time; those
// that are in the page come from `embedded`.
const $ = id => document.getElementById(id);
const seen = label => /^ +$/.test(label) ? "␣".repeat(label.length) : label;  // a token of spaces

// -- data that are in the page ----------------------------------------------------------------
const READERS = {u2: ["getUint16", 2], u4: ["getUint32", 4], f4: ["getFloat32", 4]};
function unpacked(array) {
  const bytes = Uint8Array.from(atob(array.data), c => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  const [read, size] = READERS[array.type];
  const at = (...index) => view[read](size * index.reduce((place, i, axis) => place * array.shape[axis] + i, 0), true);
  return {at, shape: array.shape, row: (...index) => Array.from({length: array.shape.at(-1)}, (_, i) => at(...index, i))};
}
const shownPiece = (pieces, id) => { const [label, text] = pieces[id]; return {id, label: seen(label), text: text ?? label}; };
const BYTE = /(<0x[89A-F][0-9A-F]>)/, STRICT = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true});
// the text of each token, a letter whose bytes are in several tokens in the last of these
function spelled(tokens) {
  const out = tokens.map(() => "");
  let bytes = [];
  const flush = () => {
    while (bytes.length) {
      const [[first]] = bytes, n = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2, letter = bytes.slice(0, n);
      let text = `<0x${first.toString(16).toUpperCase()}>`, used = 1;
      try { text = STRICT.decode(Uint8Array.from(letter, ([byte]) => byte)); used = n; } catch { /* no whole letter */ }
      out[letter[used - 1][1]] += text;
      bytes = bytes.slice(used);
    }
  };
  tokens.forEach(({text}, i) => text.split(BYTE).forEach((part, k) => {
    if (k % 2) bytes.push([parseInt(part.slice(3, 5), 16), i]);
    else if (part) { flush(); out[i] += part; }
  }));
  flush();
  return out;
}
const joined = tokens => spelled(tokens).join("");
const shownTokens = rows => rows.map(([id, label, text]) => ({id, label: seen(label), text}));

function embedded(data) {
  const every = part => Object.fromEntries(Object.entries(part).map(([k, v]) => [k, unpacked(v)]));
  const alternatives = every(data.alternatives), shares = data.attribution && every(data.attribution);
  const {followed, ...arrays} = data.lens, lens = every(arrays), starts = [0];
  for (const ids of followed) starts.push(starts.at(-1) + ids.length);
  const weights = data.attention && unpacked(data.attention.weights);
  const blocking = data.blocking && {drop: unpacked(data.blocking.drop), floor: unpacked(data.blocking.floor)};
  const {n_layer, n_head} = data.model;
  const weight = (layer, head, query, key) =>
    key > query ? 0 : weights.at(layer, head, query * (query + 1) / 2 + key) / 65535 * data.attention.largest;
  return {
    model: data.model, words: data.words, missing: data.missing, nPrompt: data.n_prompt,
    changes: data.changes, options: data.options, python: data.python,
    tokens: shownTokens(data.tokens),
    piece: id => shownPiece(data.pieces, id),
    // the best tokens in place of token t, and where its own stands
    async alternatives(t) {
      const top = alternatives.ids.row(t - 1).map((id, i) => ({id, logprob: alternatives.logprobs.at(t - 1, i)}));
      return {top, own: {id: data.tokens[t][0], logprob: alternatives.own.at(t - 1), rank: alternatives.ranks.at(t - 1)}};
    },
    // what a continuation was computed for: null where it was not
    async branch(t, id) {
      const own = data.branches.find(b => b[0] === t && b[1] === id);
      return own ? {tokens: own[2], logprobs: own[3]} : null;
    },
    // the best tokens of a layer after token i: null where they are not known yet
    lens: (layer, i) => lens.ids.row(layer, i).map((id, k) => ({id, prob: lens.probs.at(layer, i, k)})),
    // a token in all layers after token i: null where it was not followed
    async follow(i, id) {
      const k = followed[i].indexOf(id);
      if (k < 0) return null;
      return Array.from({length: n_layer}, (_, l) => ({logprob: lens.logprobs.at(l, starts[i] + k), rank: lens.ranks.at(l, starts[i] + k)}));
    },
    // the weights of one head's query, and of all heads from a query to a key
    async attention(layer, head, query) { return Array.from({length: query + 1}, (_, key) => weight(layer, head, query, key)); },
    async looks(query, key) {
      return Array.from({length: n_layer}, (_, l) => Array.from({length: n_head}, (_, h) => weight(l, h, query, key)));
    },
    async attribution(t) {
      if (!shares || t < 1 || Number.isNaN(shares.logit.at(t - 1))) return null;
      const heads = Array.from({length: n_layer}, (_, l) => shares.heads.row(t - 1, l));
      return {logit: shares.logit.at(t - 1), embed: shares.embed.at(t - 1), bias: shares.bias.at(t - 1), attn: shares.attn.row(t - 1), mlp: shares.mlp.row(t - 1), heads};
    },
    // by key; null before it is asked for, where that takes a while
    async blocking(t) { return {drop: blocking.drop.row(t), floor: blocking.floor.at(t)}; },
    // whether the text of the first n tokens, with one more behind them, is read as these tokens
    async same(n, id = null) {
      return id === null ? data.words.prompts[n - 1] : data.words.alternatives[n - 1][alternatives.ids.row(n - 1).indexOf(id)] ?? false;
    },
    // whether the text of token t alone is that token
    async isWord(t) { return data.words.answers.includes(data.tokens[t][0]); },
  };
}

// -- pieces ----------------------------------------------------------------------------------
function make(tag, attributes = {}, ...inner) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") e.className = value;
    else if (name.startsWith("on")) e.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) e.setAttribute(name, value === true ? "" : value);
  }
  e.append(...inner);
  return e;
}
// draws anew what is in an element; the focus stays at the same place
function refill(host, ...inner) {
  const places = () => [...host.querySelectorAll("button, a, input")], at = places().indexOf(document.activeElement);
  host.replaceChildren(...inner);
  if (at >= 0) places().at(Math.min(at, places().length - 1))?.focus();
}
const section = (id, title, ...inner) => make("section", {"aria-labelledby": `h-${id}`}, make("h2", {id: `h-${id}`}, title), ...inner);
const quoted = label => `“${label}”`;
const percent = p => p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : p >= 1e-5 ? `${(100 * p).toPrecision(2)} %` : "< 0.001 %";
const signed = x => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(Math.abs(x) >= 10 ? 1 : 2);
const level = (x, top) => top > 0 ? Math.min(20, Math.round(Math.abs(x) / top * 20)) : 0;
const warm = (x, top) => `s${x > 0 ? level(x, top) : 0}`;
const both = (x, top) => `${x < 0 ? "n" : "p"}${level(x, top)}`;
const largest = numbers => numbers.reduce((top, x) => Number.isNaN(x) ? top : Math.max(top, Math.abs(x)), 0);
const legend = (kind, low, high, more) => make("p", {class: "legend"}, `${low} `, make("span", {class: `ramp ${kind}`}), ` ${high}${more}`);
const noiseKey = words => [" ", make("span", {class: "ramp z"}), ` ${words}`];
const range = n => Array.from({length: n}, (_, i) => i);
const whole = (text, most) => /^\d{1,9}$/.test(text ?? "") && +text < most ? +text : null;

const tip = $("tip");
document.addEventListener("mousemove", e => {
  const words = e.target.closest?.("[data-tip]")?.dataset.tip;
  if (!words) { tip.style.display = "none"; return; }
  tip.textContent = words;
  tip.style.display = "block";
  const top = e.clientY + 16;
  tip.style.left = Math.max(4, Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (top + tip.offsetHeight < innerHeight ? top : Math.max(4, e.clientY - tip.offsetHeight - 10)) + "px";
});
document.addEventListener("mouseleave", () => { tip.style.display = "none"; });
document.addEventListener("keydown", e => { if (e.key === "Escape") tip.style.display = "none"; });

// a row of tokens, of which one is a stop of the Tab key; arrows go on from there
const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e6], End: [0, 1e6]};
const plainKey = e => e.key in STEPS && !e.ctrlKey && !e.metaKey && !e.altKey;
class Strip {
  constructor(host, source, {follows = false, choose, enter, leave}) {
    this.nPrompt = source.nPrompt;
    this.buttons = source.tokens.map((token, i) => make("button", {
      type: "button", tabindex: i ? -1 : 0, class: i >= this.nPrompt ? "written" : "",
      onclick: () => choose(i), onfocus: () => enter?.(i), onmouseenter: () => enter?.(i), onmouseleave: () => leave?.(),
    }, token.label));
    // a text that one goes through has its lines
    const lines = i => follows && source.tokens[i].text.endsWith("\n") ? [make("span", {class: "line"})] : [];
    host.append(...this.buttons.flatMap((b, i) => [b, ...lines(i)]));
    host.addEventListener("keydown", e => {
      const i = this.buttons.indexOf(e.target), step = STEPS[e.key];
      if (i < 0 || !plainKey(e) || step[0]) return;
      e.preventDefault();
      const to = Math.max(0, Math.min(this.buttons.length - 1, i + step[1]));
      this.stop(to);
      this.buttons[to].focus();
      if (follows) choose(to);
    });
  }
  stop(i) { this.buttons.forEach((b, k) => { b.tabIndex = k === i ? 0 : -1; }); }
  // say(i) -> {label, cls, chosen}: what a token is read as, its colour, whether it is chosen
  paint(say) {
    this.buttons.forEach((b, i) => {
      const {label, cls = "", chosen = false, shown = true} = say(i);
      b.className = `${i >= this.nPrompt ? "written" : ""} ${cls}`.trim();
      b.setAttribute("aria-label", label);
      b.setAttribute("aria-pressed", chosen);
      b.dataset.tip = label;
      b.hidden = !shown;
      if (chosen) this.stop(i);
    });
  }
}

// a table whose cells are reached with the arrow keys; the first row of `rows` stands on top
class Matrix {
  constructor(host, {kind, label, corner, rows, columns, foot = null, choose, enter, leave}) {
    const head = make("tr", {}, make("th", {class: "corner"}, corner), ...columns.map(c => make("th", {scope: "col", "data-tip": c.full}, c.label)));
    this.cells = rows.map(() => columns.map(() => make("td", {tabindex: -1})));
    const body = rows.map((r, i) => make("tr", {}, make("th", {scope: "row"}, r.label), ...this.cells[i]));
    this.table = make("table", {class: kind, role: "grid", "aria-label": label}, make("thead", {}, head), make("tbody", {}, ...body));
    if (foot) this.table.append(make("tfoot", {}, make("tr", {}, make("th", {class: "corner"}, foot.corner), ...foot.labels.map(f => make("td", {class: "x"}, f)))));
    host.append(make("div", {class: "scroll tall"}, this.table));
    const place = e => {
      const td = e.target.closest?.("tbody td");
      return td ? [td.parentNode.sectionRowIndex, td.cellIndex - 1] : null;
    };
    this.table.addEventListener("click", e => { const at = place(e); if (at) { this.stop(...at); choose?.(...at); } });
    this.table.addEventListener("focusin", e => { const at = place(e); if (at) enter?.(...at); });
    this.table.addEventListener("mouseover", e => { const at = place(e); if (at) enter?.(...at); });
    this.table.addEventListener("mouseleave", () => leave?.());
    this.table.addEventListener("keydown", e => {
      const at = place(e);
      if (!at) return;
      if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose?.(...at); }
      if (!plainKey(e)) return;
      e.preventDefault();
      const [down, right] = STEPS[e.key];
      const to = [Math.max(0, Math.min(rows.length - 1, at[0] + down)), Math.max(0, Math.min(columns.length - 1, at[1] + right))];
      this.stop(...to);
      this.cells[to[0]][to[1]].focus();
    });
    this.stop(0, 0);
  }
  stop(i, k) {
    if (this.last) this.last.tabIndex = -1;
    this.last = this.cells[i][k];
    this.last.tabIndex = 0;
  }
  // say(i, k) -> {text, cls, tip, label}; of some columns, or of all
  paint(say, columns = range(this.cells[0].length)) {
    this.cells.forEach((row, i) => columns.forEach(k => {
      const td = row[k], {text = "", cls = "", tip = "", label = ""} = say(i, k);
      if (td.textContent !== text) td.textContent = text;
      td.className = cls;
      td.dataset.tip = tip;
      if (label) td.setAttribute("aria-label", label);
    }));
  }
}

function copyable(words) {
  return make("div", {class: "code"}, make("pre", {tabindex: 0}, make("code", {}, words)), make("button", {type: "button", class: "copy"}, "copy"));
}
document.addEventListener("click", async e => {
  const button = e.target.closest?.(".copy");
  if (!button) return;
  const code = button.parentNode.querySelector("code");
  try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
  catch { getSelection().selectAllChildren(code); button.textContent = "selected"; }
});

// -- what is chosen ------------------------------------------------------------------------------
const CHOSEN = ["token", "layer", "head", "key", "cell", "follow", "branch", "query"];

class Explorer {
  // hooks: address() of what is chosen; changed() after each choice; failed(error); goOn(t, id) in
  // place of the branches that are in the page; tokenActions(t), cellActions(layer, i),
  // headActions(layer, head) -> elements; before() -> elements before the commands
  constructor(host, source, hooks = {}) {
    Object.assign(this, {host, source, hooks, tokens: source.tokens});
    this.N = source.tokens.length;
    this.L = source.model.n_layer;
    this.H = source.model.n_head;
    this.fresh = {token: Math.min(source.nPrompt, this.N - 1), layer: this.L - 1, head: 0, key: null, cell: null, follow: null, branch: null, query: "self"};
    this.state = {...this.fresh};
    this.turns = 0;
    this.layers = range(this.L).map(i => ({label: String(i), full: `layer ${i}`})).reverse();  // the model's end stands on top
    this.heads = range(this.H).map(i => ({label: String(i), full: `head ${i}`}));
    host.replaceChildren();
    this.parts = [textSection, elseSection, lensSection, headsSection, madeSection, sameSection].map(part => part(this));
    source.onLens?.(columns => { this.lensCame(columns); this.draw(); });
  }
  fromTop(i) { return this.L - 1 - i; }
  name(i) { return `token ${i} ${quoted(this.tokens[i].label)}`; }
  stale(turn) { return turn !== this.turns; }
  get query() { return this.state.query === "before" ? Math.max(0, this.state.token - 1) : this.state.token; }
  get cell() { return this.state.cell ?? [this.L - 1, Math.max(0, this.state.token - 1)]; }

  // from the words of an address
  restore(said) {
    const {L, H, N, fresh} = this, [layer, column] = (said.get("cell") ?? "").split(".");
    const cell = [whole(layer, L), whole(column, N)];
    Object.assign(this.state, fresh, {
      token: whole(said.get("token"), N) ?? fresh.token,
      layer: whole(said.get("layer"), L) ?? fresh.layer,
      head: whole(said.get("head"), H) ?? fresh.head,
      key: whole(said.get("key"), N),
      cell: cell.includes(null) ? null : cell,
      follow: whole(said.get("follow"), 2 ** 31),
      branch: whole(said.get("branch"), 2 ** 31),
      query: said.get("query") === "before" ? "before" : "self",
    });
  }
  words() {
    const {state} = this, words = {token: state.token, layer: state.layer, head: state.head};
    for (const name of ["key", "follow", "branch"]) if (state[name] !== null) words[name] = state[name];
    if (state.cell) words.cell = state.cell.join(".");
    if (state.query !== "self") words.query = state.query;
    return words;
  }
  set(changes) {
    const {state} = this;
    if ("token" in changes && changes.token !== state.token) Object.assign(state, {key: null, cell: null, follow: null, branch: null});
    if ("cell" in changes && !("follow" in changes)) state.follow = null;
    Object.assign(state, changes);
    this.hooks.changed?.();
    return this.draw();
  }
  async draw() {
    const turn = ++this.turns;
    await Promise.all(this.parts.map(async draw => {
      try { await draw(turn); } catch (error) {
        if (this.stale(turn)) return;
        if (!this.hooks.failed) throw error;
        this.hooks.failed(error);
      }
    }));
  }
}

// -- continuations beside each other -------------------------------------------------------------
// texts: {label, changes, tokens of the continuation}; the first is what the others are compared with
function panes(texts, chosen, choose, act = () => {}) {
  return make("div", {class: "panes"}, ...texts.map((text, i) => {
    const pick = make("label", {}, make("input", {type: "radio", name: "pane", value: i, checked: i === chosen, onchange: () => choose(i)}), ` ${text.label}`);
    const legend = text.changes ? [make("p", {class: "legend"}, text.changes)] : [];
    const letters = spelled(text.tokens);
    const words = text.tokens.map((token, k) => make("span", {class: i && texts[0].tokens[k]?.id !== token.id ? "other" : "", onclick: () => act(i, k)}, letters[k]));
    return make("div", {class: `pane${i === chosen ? " looked" : ""}`}, make("p", {class: "title"}, texts.length > 1 ? pick : text.label), ...legend, make("p", {class: "piece continuation"}, ...words));
  }));
}

// -- the commands ------------------------------------------------------------------------------
const shell = word => /^[\w%+=:,.\/-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
const typed = text => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const python = text => JSON.stringify(text);
const OPTIONS = {temperature: "--temperature", top_k: "--sample-top-k", top_p: "--top-p", min_p: "--min-p", repeat_penalty: "--repeat-penalty", frequency_penalty: "--frequency-penalty", seed: "--seed"};
const IMPORTS = {
  "explore(": "from mia.methods.explore import explore", "attention(": "from mia.methods.attention import attention",
  "attribute_logit(": "from mia.methods.attribution import attribute_logit",
  "sweep(": "from mia.methods.sweep import sweep\nfrom mia.sweeps.experiments import Blocking",
  "Changes(": "from mia.methods.changes import Changes\nfrom mia.methods.explore_parts import edits_on",
};

// a command about the first n tokens, with one more behind them; null where their text is read as
// other tokens. Changes that touch later tokens only are left out.
async function command(explorer, name, n, words = [], more = null) {
  const W = await explorer.source.words;
  if (!await explorer.source.same(n, more)) return null;
  const tokens = [...explorer.tokens.slice(W.bos ? 1 : 0, n), ...(more === null ? [] : [explorer.source.piece(more)])];
  const prompt = typed(joined(tokens).slice(W.cut));
  const option = prompt.startsWith("-") ? [`--prompt=${prompt}`] : ["-p", prompt];
  const model = ["-m", W.model, ...(W.as_type ? ["--as", W.as_type] : [])];
  const changes = (explorer.source.options ?? []).filter(([least]) => n >= least).flatMap(([, own]) => own);
  return ["mia", name, ...model, ...option, W.bos ? "--bos" : "--no-bos", ...words.map(String), ...changes].map(shell).join(" ");
}

async function commands(explorer) {
  const {source, state} = explorer, W = await source.words, t = state.token, q = explorer.query, [layer, i] = explorer.cell, list = [];
  const sampled = Object.entries(W.sampling).flatMap(([name, value]) => name in OPTIONS ? [OPTIONS[name], value] : []);
  const said = Object.entries(W.sampling).map(([name, value]) => `${name}=${value}`).join(", ");
  const sampling = said ? `, sampling=Sampling(${said})` : "", edits = source.python ? ", edits=edits" : "", changes = source.python ? ", changes=changes" : "";
  if (source.changes && !source.python) return list;  // no command makes these changes
  // what is generated has the changes of its prompt
  const editsOf = prompt => source.python ? `, edits=changes.edits(m, ${prompt})` : "";
  const add = (title, line, code) => list.push({title, line, code});
  // written in several goes: no one command does that
  if (!W.apart && !source.missing.lens) add("This page", await command(explorer, "explore", source.nPrompt, ["-n", W.n_predict, "-k", W.k, "--branches", W.branches, ...sampled, "-o", "page.html"]),
    `explore(m, ids[:${source.nPrompt}], n_predict=${W.n_predict}, k=${W.k}, branches=${W.branches}${sampling}${changes}).save("page.html")`);
  if (!source.missing.lens) add(`What layer ${layer} says after ${explorer.name(i)}`,
    await command(explorer, "logit-lens", i + 1, ["l_out", "--layers", layer, "--token-idx", i]),
    `print(m.lens(m.look(ids, "l_out-${layer}", tokens=${i}${edits}), k=5))`);
  if (t > 0 && state.branch !== null) {
    const {top} = await source.alternatives(t), left = Math.max(1, source.nPrompt + W.n_predict - t - 1);
    // changes of later tokens have no place in it
    if (top.some(a => a.id === state.branch) && (source.options ?? []).every(([least]) => least <= t + 1))
      add(`Go on from ${quoted(source.piece(state.branch).label)} in place of ${explorer.name(t)}`,
        await command(explorer, "run", t, ["-n", left, ...sampled], state.branch),
        `print(m.generate([*ids[:${t}], ${state.branch}], ${left}${sampling}${editsOf(`[*ids[:${t}], ${state.branch}]`)}))`);
  }
  if (!source.missing.attention)
    add(`Where head ${state.layer}.${state.head} looks from ${explorer.name(q)}`,
      await command(explorer, "attention", q + 1, ["--heads", `${state.layer}.${state.head}`, "--token-idx", q]),
      `print(attention(m, ids, heads="${state.layer}.${state.head}", token=${q}${edits}))`);
  const answer = await source.isWord(t), given = ["--answer", typed(explorer.tokens[t].text)];
  if (t > 0 && !source.missing.attribution && await source.attribution(t))
    add(`What each part adds to the logit of ${explorer.name(t)}`,
      answer ? await command(explorer, "attribute", t, given) : null, `print(attribute_logit(m, ids, ${explorer.tokens[t].id}, token=${t - 1}${edits}))`);
  if (t > 1 && !source.missing.blocking && answer && !edits)
    add(`What hiding each token does to ${explorer.name(t)}`,
      await command(explorer, "sweep", t, ["--block-keys", "--over", "token", ...given, "--metric", "logprob"]),
      `print(sweep(m, ids[:${t}], Blocking(), over="token", answer=${python(explorer.tokens[t].text)}, metric="logprob"))`);
  return list;
}

function program(explorer, W, list) {
  const {source} = explorer;
  const lines = [`m = Model(${python(W.model)}${W.as_type ? `, as_type=${python(W.as_type)}` : ""})`, `ids = [${explorer.tokens.map(t => t.id).join(", ")}]`];
  const n = source.nPrompt;
  if (source.python) lines.push(`changes = ${source.python}`, `edits = edits_on(changes.edits(m, ids[:${n}]), ${n}, len(ids))`);
  lines.push(...list.map(({title, code}) => `# ${title.replaceAll("\n", " ")}\n${code}`));
  const code = lines.join("\n");
  const imports = ["from mia import Model", ...(code.includes("Sampling(") ? ["from mia.request import Sampling"] : [])];
  imports.push(...Object.entries(IMPORTS).filter(([call]) => code.includes(call)).map(([, line]) => line));
  return [...imports, "", code].join("\n");
}

function sameSection(explorer) {
  const host = make("div", {id: "same"});
  explorer.host.append(section("same", "The same by hand", host));
  const link = () => make("p", {}, make("a", {href: explorer.hooks.address(), id: "link"}, "Link to what is chosen"));
  explorer.commands = () => commands(explorer);
  explorer.command = (...words) => command(explorer, ...words);
  return async turn => {
    if (explorer.source.changes && !explorer.source.python) {
      host.replaceChildren(link(), make("p", {class: "note"}, "No command says the changes of this text."));
      return;
    }
    const words = await explorer.source.words, list = await commands(explorer), before = await explorer.hooks.before?.() ?? [];
    if (explorer.stale(turn)) return;
    const parts = [link(), ...before];
    for (const {title, line} of list) {
      parts.push(make("p", {class: "title"}, title));
      parts.push(line ? copyable(line) : make("p", {class: "note"}, "The text of these tokens is read as other tokens, so that no prompt says them; the Python below takes their ids."));
    }
    host.replaceChildren(...parts, make("p", {class: "title"}, "Python"), copyable(program(explorer, words, list)));
  };
}

// -- the text --------------------------------------------------------------------------------
function textSection(explorer) {
  const {source, tokens} = explorer, row = make("div", {id: "text", class: "tokens", role: "toolbar", "aria-label": "Tokens: choose one"});
  const said = make("p", {id: "token", class: "said", role: "status", "aria-live": "polite"}), actions = make("div", {class: "actions"});
  explorer.host.append(section("text", source.changes ? "The changed text" : "The text", ...(source.changes ? [make("p", {class: "legend"}, source.changes)] : []), row, said, actions));
  explorer.strip = new Strip(row, source, {follows: true, choose: token => explorer.set({token})});
  return async turn => {
    const t = explorer.state.token;
    explorer.strip.paint(i => ({label: `${explorer.name(i)}${i < source.nPrompt ? "" : ", generated"}`, chosen: i === t}));
    refill(actions, ...(explorer.hooks.tokenActions?.(t) ?? []));
    const where = t < source.nPrompt ? "of the prompt" : "generated";
    let words = `Token ${t} of ${explorer.N}: ${quoted(tokens[t].label)}, ${where}, id ${tokens[t].id}.`;
    if (t > 0 && !source.missing.lens) {
      const {own} = await source.alternatives(t);
      if (explorer.stale(turn)) return;
      words += ` Its probability was ${percent(Math.exp(own.logprob))}, rank ${own.rank}.`;
    } else if (!t) words += " Nothing comes before it, so nothing predicts it.";
    said.textContent = words;
  };
}

// -- alternatives and branches ---------------------------------------------------------------
function elseSection(explorer) {
  const {source, tokens} = explorer, host = make("div", {id: "else", class: "side"});
  explorer.host.append(section("else", "What else it could have been", host));
  if (source.missing.lens) { host.append(make("p", {}, `Not in this page: ${source.missing.lens}.`)); return async () => {}; }
  return async turn => {
    const t = explorer.state.token;
    if (t === 0) { host.replaceChildren(make("p", {}, "Nothing predicts the first token.")); return; }
    const {top, own} = await source.alternatives(t);
    const listed = top.map((a, i) => ({...a, rank: i + 1}));
    if (!top.some(a => a.id === own.id)) listed.push(own);
    const branch = explorer.state.branch === null || explorer.hooks.goOn ? null : await source.branch(t, explorer.state.branch);
    const panel = explorer.hooks.goOn ? make("div") : await branchPanel(t, branch, top);
    if (explorer.stale(turn)) return;
    const goOn = id => explorer.hooks.goOn ? explorer.hooks.goOn(t, id) : explorer.set({branch: id});
    const rows = listed.map(a => {
      const {label} = source.piece(a.id), p = Math.exp(a.logprob);
      const button = make("button", {type: "button", "aria-pressed": explorer.hooks.goOn ? null : String(a.id === explorer.state.branch), "aria-label": `go on from ${quoted(label)}`, onclick: () => goOn(a.id), "data-id": a.id}, "go on from here");
      return make("tr", {},
        make("td", {class: "number"}, String(a.rank)), make("td", {class: "piece"}, label),
        make("td", {class: "number"}, percent(p)), make("td", {class: "bar-cell"}, make("span", {class: "meter", style: `width:${Math.max(1, 110 * p).toFixed(0)}px`})),
        make("td", {}, a.id === own.id ? "the text’s" : button));
    });
    const head = make("tr", {}, ...["rank", "token", "probability"].map(h => make("th", {scope: "col"}, h)), make("th", {class: "bar-cell"}), make("th"));
    const focused = document.activeElement?.dataset?.id;
    const table = make("div", {class: "scroll"}, make("table", {class: "plain"}, make("caption", {}, `Instead of ${explorer.name(t)}`), make("thead", {}, head), make("tbody", {}, ...rows)));
    host.replaceChildren(table, panel);
    if (focused) host.querySelector(`[data-id="${focused}"]`)?.focus();
  };

  async function branchPanel(t, branch, top) {
    const panel = make("div", {role: "status", "aria-live": "polite"}), id = explorer.state.branch;
    if (id === null) {
      panel.append(make("p", {class: "note"}, "Go on from another token to see what would have followed."));
      return panel;
    }
    if (!top.some(a => a.id === id)) return panel;
    const {label} = source.piece(id);
    const line = (title, first, rest) => make("div", {class: "branch"}, make("p", {class: "title"}, title), make("p", {class: "piece"}, "… ", make("mark", {}, first), rest));
    panel.append(line("The text", tokens[t].label, tokens.slice(t + 1).map(o => o.label).join("")));
    if (branch) {
      panel.append(line(`With ${quoted(label)}`, label, branch.tokens.map(o => source.piece(o).label).join("")));
      return panel;
    }
    panel.append(make("p", {}, `What follows ${quoted(label)} is not in this page. The command that continues it is under “The same by hand”.`));
    const list = await commands(explorer), run = list.find(c => c.line?.startsWith("mia run"));
    if (run) panel.append(copyable(run.line));
    return panel;
  }
}

// -- the lens ----------------------------------------------------------------------------------
function lensSection(explorer) {
  const {source, tokens, L} = explorer, grid = make("div", {}), follow = make("div", {id: "follow"}), actions = make("div", {class: "actions"});
  if (source.missing.lens) {
    explorer.host.append(section("lens", "What each layer would say", make("p", {}, `Not in this page: ${source.missing.lens}.`)));
    return async () => {};
  }
  const cellSaid = make("p", {id: "cell", class: "said", role: "status", "aria-live": "polite"});
  explorer.host.append(section("lens", "What each layer would say", make("div", {id: "lens"},
    legend("s", "0", "1", " probability of the token that a layer would say next. Above a column stands the token that it has read last, below it the one that follows in the text."),
    grid, cellSaid, actions, make("div", {class: "side"}, follow))));
  const said = (layer, i) => source.lens(layer, i)?.map(({id, prob}) => `${percent(prob)}  ${quoted(source.piece(id).label)}`) ?? ["being read …"];
  const table = new Matrix(grid, {
    kind: "lens", label: "What each layer would say after each token", corner: "token →\nlayer ↓", rows: explorer.layers,
    columns: tokens.map((t, i) => ({label: t.label, full: explorer.name(i)})),
    foot: {corner: "next", labels: [...tokens.slice(1).map(t => t.label), ""]},
    choose: (i, k) => explorer.set({cell: [explorer.fromTop(i), k]}),
    enter: (i, k) => { cellSaid.textContent = `Layer ${explorer.fromTop(i)} after ${explorer.name(k)}: ${said(explorer.fromTop(i), k).join(", ")}`; },
    leave: () => sayCell(),
  });
  function sayCell() {
    const [layer, i] = explorer.cell;
    cellSaid.textContent = `Layer ${layer} after ${explorer.name(i)}: ${said(layer, i).join(", ")}`;
  }
  explorer.lensCame = columns => table.paint((i, k) => {
    const best = source.lens(explorer.fromTop(i), k)?.[0];
    if (!best) return {cls: "x"};
    return {text: source.piece(best.id).label, cls: warm(best.prob, 1), tip: `layer ${explorer.fromTop(i)}, after ${explorer.name(k)}\n${said(explorer.fromTop(i), k).join("\n")}`};
  }, columns);
  explorer.lensCame();
  return async turn => {
    const [layer, i] = explorer.cell, column = Math.max(0, explorer.state.token - 1);
    for (const td of table.table.querySelectorAll(".column, .cell-chosen")) td.classList.remove("column", "cell-chosen");
    if (explorer.state.token > 0) for (const row of table.cells) row[column].classList.add("column");
    const cell = table.cells[explorer.fromTop(layer)][i];
    cell.classList.add("cell-chosen");
    table.stop(explorer.fromTop(layer), i);
    if (!table.table.contains(document.activeElement)) {
      const box = table.table.parentNode;
      box.scrollLeft = cell.offsetLeft - box.clientWidth / 2;
    }
    sayCell();
    refill(actions, ...(explorer.hooks.cellActions?.(layer, i) ?? []));
    const listed = source.lens(layer, i), next = tokens[i + 1];
    if (!listed) { follow.replaceChildren(); return; }
    const id = explorer.state.follow ?? (next && explorer.state.cell === null ? next.id : listed[0].id);
    const followed = await source.follow(i, id);
    if (explorer.stale(turn)) return;
    const ids = [...new Set([...listed.map(a => a.id), ...(next ? [next.id] : []), ...(explorer.state.follow !== null && followed ? [id] : [])])];
    const focused = follow.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const choices = ids.map(a => make("button", {type: "button", "data-id": a, "aria-pressed": String(a === id), onclick: () => explorer.set({cell: [layer, i], follow: a})}, source.piece(a).label));
    follow.replaceChildren(make("p", {class: "title"}, `Follow a token through the layers, after ${explorer.name(i)}`), make("div", {class: "tokens", role: "group", "aria-label": "Token to follow"}, ...choices));
    if (focused) follow.querySelector(`[data-id="${focused}"]`)?.focus();
    if (!followed) { follow.append(make("p", {class: "note"}, "This token is in no layer’s list here, so it was not followed.")); return; }
    const rows = followed.map(({logprob, rank}, l) => {
      const p = Math.exp(logprob);
      return make("tr", {}, make("th", {scope: "row", class: "number"}, String(l)), make("td", {class: "number"}, percent(p)), make("td", {class: "number"}, String(rank)),
        make("td", {}, make("span", {class: "meter", style: `width:${Math.max(1, 160 * p).toFixed(0)}px`})));
    }).reverse();
    const head = make("tr", {}, ...["layer", "probability", "rank", ""].map(h => make("th", {scope: "col"}, h)));
    follow.append(make("details", {open: true}, make("summary", {}, `${quoted(source.piece(id).label)} by layer`),
      make("div", {class: "scroll tall"}, make("table", {class: "plain"}, make("thead", {}, head), make("tbody", {}, ...rows)))));
  };
}

// -- attention ---------------------------------------------------------------------------------
function headsSection(explorer) {
  const {source} = explorer, host = make("div", {id: "heads"});
  explorer.host.append(section("heads", "Where the heads look", host));
  if (source.missing.attention) { host.append(make("p", {}, `Not in this page: ${source.missing.attention}.`)); return async () => {}; }
  let hovers = 0;
  const radio = (value, words) => make("label", {}, make("input", {type: "radio", name: "query", value, onchange: () => explorer.set({query: value, key: null})}), ` ${words}`);
  const said = make("p", {id: "looks", class: "said", role: "status", "aria-live": "polite"}), actions = make("div", {class: "actions"});
  const keys = make("div", {class: "tokens shaded", role: "toolbar", "aria-label": "Tokens that the head looks at"}), ramp = make("div", {});
  const title = make("p", {class: "title", id: "overview-title"}), overview = make("div", {}), headSaid = make("p", {class: "said", role: "status"});
  host.append(make("fieldset", {}, make("legend", {}, "From"), radio("self", "the chosen token"), radio("before", "the one before it, which predicts it")),
    said, actions, keys, ramp, title, overview, headSaid);
  const strip = explorer.lookStrip = new Strip(keys, source, {choose: key => explorer.set({key}), enter: i => drawOverview(i), leave: () => drawOverview(null)});
  const table = explorer.lookTable = new Matrix(overview, {
    kind: "heads", label: "How strongly each head looks at the token", corner: "head →\nlayer ↓", rows: explorer.layers, columns: explorer.heads,
    choose: (i, k) => explorer.set({layer: explorer.fromTop(i), head: k}),
    enter: (i, k) => { headSaid.textContent = table.cells[i][k].dataset.tip; },
  });

  // the token that heads look at most, but for the first, which many rest on
  async function defaultKey(query) {
    const every = await Promise.all(range(query + 1).map(key => source.looks(query, key)));
    const rest = every.map(looks => looks.flat().reduce((a, b) => a + b, 0)).slice(1);
    return rest.length ? 1 + rest.indexOf(Math.max(...rest)) : 0;
  }
  async function drawOverview(hovered) {
    const hover = ++hovers, query = explorer.query;
    let key = hovered ?? explorer.state.key;
    if (key === null || key > query) key = await defaultKey(query);
    const looks = await source.looks(query, key);
    if (hover !== hovers) return;
    const top = largest(looks.flat());
    title.textContent = `How strongly each head looks from ${explorer.name(query)} at ${explorer.name(key)} (most: ${top.toFixed(3)})`;
    table.paint((i, k) => {
      const l = explorer.fromTop(i), words = `layer ${l}, head ${k}: ${looks[l][k].toFixed(4)} at ${explorer.name(key)}`;
      return {cls: `${warm(looks[l][k], top)}${l === explorer.state.layer && k === explorer.state.head ? " here" : ""}`, tip: words, label: words};
    });
  }
  return async turn => {
    const {layer, head} = explorer.state, query = explorer.query;
    for (const input of host.querySelectorAll("input")) input.checked = input.value === explorer.state.query;
    refill(actions, ...(explorer.hooks.headActions?.(layer, head) ?? []));
    const weights = await source.attention(layer, head, query);
    if (explorer.stale(turn)) return;
    const top = largest(weights), best = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
    said.textContent = `Layer ${layer}, head ${head}, from ${explorer.name(query)}: ${best.map(i => `${weights[i].toFixed(3)} at ${explorer.name(i)}`).join(", ")}.`;
    ramp.replaceChildren(legend("s", "0", top.toFixed(3), " weight"));
    strip.paint(i => i > query ? {label: "", shown: false} : {label: `${weights[i].toFixed(4)} at ${explorer.name(i)}`, cls: warm(weights[i], top), chosen: i === explorer.state.key});
    table.stop(explorer.fromTop(layer), head);
    await drawOverview(null);
  };
}

// -- what made it -------------------------------------------------------------------------------
function madeSection(explorer) {
  const {source} = explorer, partsHost = make("div", {}), blockHost = make("div", {});
  explorer.host.append(section("made", "What made it", make("div", {id: "made"}, make("h3", {}, "Parts of the model"), partsHost, make("h3", {}, "Tokens before it"), blockHost)));
  const parts = source.missing.attribution ? null : partsOf(explorer, partsHost), blocks = source.missing.blocking ? null : blocksOf(explorer, blockHost);
  if (!parts) partsHost.append(make("p", {}, `Not in this page: ${source.missing.attribution}.`));
  if (!blocks) blockHost.append(make("p", {}, `Not in this page: ${source.missing.blocking}.`));
  return async turn => { await Promise.all([parts?.(turn), blocks?.(turn)]); };
}

function partsOf(explorer, host) {
  const {source} = explorer, said = make("p", {id: "part-said", class: "said", role: "status"});
  const total = make("p", {id: "sum", class: "said", role: "status", "aria-live": "polite"}), ramp = make("div", {});
  const left = make("div", {}, make("p", {class: "title"}, "Each layer")), right = make("div", {}, make("p", {class: "title"}, "Each head"));
  const side = make("div", {class: "side"}, left, right);
  host.append(total, ramp, side, said);
  const enter = table => (i, k) => { said.textContent = table().cells[i][k].dataset.tip; };
  const layers = new Matrix(left, {
    kind: "map", label: "What each layer adds to the logit", corner: "layer ↓", rows: explorer.layers,
    columns: ["attention", "MLP"].map(label => ({label, full: label})), enter: enter(() => layers),
  });
  const heads = new Matrix(right, {
    kind: "heads", label: "What each head adds to the logit", corner: "head →\nlayer ↓", rows: explorer.layers, columns: explorer.heads,
    choose: (i, k) => explorer.set({layer: explorer.fromTop(i), head: k}), enter: enter(() => heads),
  });
  return async turn => {
    const t = explorer.state.token, shares = t > 0 ? await source.attribution(t) : null;
    if (explorer.stale(turn)) return;
    side.hidden = !shares;
    said.textContent = "";
    ramp.replaceChildren();
    if (!shares) {
      total.textContent = !t ? "Nothing predicts the first token." : source.changes ? "The changes write into the residual too, so the parts of the model do not add up to this token’s logit: none are shown." : "The parts do not add up to this token’s logit, so none are shown.";
      return;
    }
    const sum = numbers => numbers.reduce((a, b) => a + b, 0);
    total.textContent = `The logit of ${explorer.name(t)}, ${shares.logit.toFixed(2)}: embedding ${signed(shares.embed)}, attention ${signed(sum(shares.attn))}, MLPs ${signed(sum(shares.mlp))}, biases ${signed(shares.bias)}.`;
    const columns = [shares.attn, shares.mlp], top = largest([...shares.attn, ...shares.mlp]), topHead = largest(shares.heads.flat());
    ramp.append(legend("d", signed(-top), signed(top), `, for heads ${signed(-topHead)} to ${signed(topHead)}: what a part adds to the logit`));
    layers.paint((i, k) => {
      const share = columns[k][explorer.fromTop(i)];
      return {text: signed(share), cls: both(share, top), tip: `layer ${explorer.fromTop(i)}, ${k ? "MLP" : "attention"}: ${signed(share)}`};
    });
    heads.paint((i, k) => {
      const l = explorer.fromTop(i), share = shares.heads[l][k], words = `layer ${l}, head ${k}: ${signed(share)}`;
      return {cls: `${both(share, topHead)}${l === explorer.state.layer && k === explorer.state.head ? " here" : ""}`, tip: words, label: words};
    });
  };
}

function blocksOf(explorer, host) {
  const {source} = explorer, total = make("p", {id: "blocked", class: "said", role: "status", "aria-live": "polite"}), ramp = make("div", {id: "blocked-legend"});
  const keys = make("div", {class: "tokens shaded", role: "toolbar", "aria-label": "Tokens that may be hidden"});
  const said = make("p", {id: "blocked-said", class: "said", role: "status"});
  const ask = make("button", {type: "button", hidden: true, onclick: async () => { ask.disabled = true; await source.askBlocking(explorer.state.token); explorer.draw(); }}, "hide each token in turn");
  host.append(total, ask, keys, ramp, said);
  const say = i => { said.textContent = strip.buttons[i].dataset.tip; };
  const strip = explorer.blockStrip = new Strip(keys, source, {choose: say, enter: say});
  return async turn => {
    const t = explorer.state.token, result = t > 1 ? await source.blocking(t) : null;
    if (explorer.stale(turn)) return;
    said.textContent = "";
    ask.hidden = t < 2 || result !== null;
    ask.disabled = false;
    if (!result) {
      total.textContent = t > 1 ? "How much less probable the token becomes if those after another one may not attend to it: one run for each." : "No token but the one that predicts it comes before it.";
      ramp.replaceChildren();
      strip.paint(() => ({label: "", shown: false}));
      return;
    }
    const {drop, floor} = result, top = largest(drop), shown = [...drop.keys()].filter(k => !Number.isNaN(drop[k]));
    const best = shown.filter(k => Math.abs(drop[k]) > floor).sort((a, b) => Math.abs(drop[b]) - Math.abs(drop[a])).slice(0, 3);
    const list = best.map(k => `${signed(drop[k])} without ${explorer.name(k)}`).join(", ");
    total.textContent = `How much less probable ${explorer.name(t)} becomes, in nats, if those after a token may not attend to it: ${list || "nothing above the noise"}.`;
    strip.paint(i => {
      if (!shown.includes(i)) return {label: "", shown: false};
      const quiet = Math.abs(drop[i]) <= floor;
      return {label: `${signed(drop[i])} nats without ${explorer.name(i)}${quiet ? ", within the noise" : ""}`, cls: quiet ? "z" : both(drop[i], top)};
    });
    ramp.replaceChildren(legend("d", signed(-top), signed(top), " nats"));
    ramp.firstChild.append(...noiseKey(`within the noise of the model’s arithmetic, ±${floor.toPrecision(2)}`));
  };
}
