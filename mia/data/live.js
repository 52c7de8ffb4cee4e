// The page of a server: a text that is written, its changes, and the explorer of what was written.
// The text is given ids, and what the model wrote after them: unchanged, and with the changes.

// -- the server ---------------------------------------------------------------------------------
const KEY = "mia-key";
let MODEL = null;

async function call(path, body, {signal, method = "POST", type = "application/json"} = {}) {
  const headers = {}, key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = type;
  const answer = await fetch(path, {method, headers, signal, body: body === undefined ? undefined : body instanceof Blob ? body : JSON.stringify(body)})
    .catch(error => { throw error instanceof TypeError ? new Error("the server does not answer; is it still running?") : error; });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw Object.assign(new Error(said?.error?.message ?? `the server answered ${answer.status}`), {status: answer.status});
}
const get = async path => (await call(path, undefined, {method: "GET"})).json();
const post = async (path, body, signal) => (await call(path, body, {signal})).json();

// the chunks of a stream
async function* chunks(path, body, signal) {
  const reader = (await call(path, {...body, stream: true}, {signal})).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// what an explorer shows, asked of the server when it is needed
const FIRST = 6, NEXT = 16;  // columns of the lens that are read at once
class Served {
  constructor({tokens, nPrompt, changes, words}) {
    Object.assign(this, {tokens: tokens.map(t => ({...t, label: seen(t.label)})), nPrompt, model: MODEL, missing: MODEL.missing});
    this.changes = changes ? changesWords() : "";
    this.options = changes ? changesOptions() : [];
    this.python = changes ? changesPython() : "";
    this.body = {prompt: tokens.map(t => t.id), n_prompt: nPrompt, ...(changes ? changesBody() : {})};
    this.pieces = Object.fromEntries(tokens.map(t => [t.id, [t.label, t.text]]));
    this.ended = new AbortController();
    this.answers = new Map();
    this.lensColumns = new Map();
    this.arrivals = new Map();
    this.givenWords = words;
    this.first = new Promise(come => { this.firstCame = come; });
  }
  close() { this.ended.abort(); }
  // the first columns of the lens come before all else
  async ask(part, more) {
    if (part !== "lens" && !this.isApart) await this.first;
    const answer = await post("/mia/explore", {...this.body, part, ...more}, this.ended.signal);
    Object.assign(this.pieces, answer.pieces);
    return answer;
  }
  // asked once
  once(part, more) {
    const name = JSON.stringify([part, more]);
    if (!this.answers.has(name)) this.answers.set(name, this.ask(part, more));
    return this.answers.get(name);
  }
  piece(id) { return shownPiece(this.pieces, id); }
  get words() { return this.once("text").then(({words}) => ({...words, ...this.givenWords})); }

  // -- the lens: the columns near the chosen one first
  onLens(came) { this.lensCame = came; }
  async readLens(near) {
    try { await this.readColumns(near); } catch (error) {
      this.failure = error;
      for (const {fail} of this.arrivals.values()) fail(error);
      throw error;
    } finally { this.firstCame(); }
  }
  async readColumns(near) {
    this.near = near;
    for (let size = FIRST; ; size = NEXT) {
      const open = range(this.tokens.length).filter(i => !this.lensColumns.has(i));
      if (!open.length) return;
      const columns = open.sort((a, b) => this.far(a) - this.far(b)).slice(0, size).sort((a, b) => a - b);
      const answer = await this.ask("lens", {columns});
      const lens = unpackedAll(answer.lens), alternatives = unpackedAll(answer.alternatives);
      answer.columns.forEach((i, c) => this.lensColumns.set(i, {lens, alternatives, c}));
      for (const i of columns) { this.arrivals.get(i)?.come(); this.arrivals.delete(i); }
      this.lensCame?.(columns);
      this.firstCame();
    }
  }
  far(i) { return i < this.near ? 2 * (this.near - i) : i - this.near; }
  column(i) {
    if (this.lensColumns.has(i)) return Promise.resolve();
    if (this.failure) return Promise.reject(this.failure);
    this.near = i;
    if (!this.arrivals.has(i)) {
      const arrival = {};
      arrival.promise = new Promise((come, fail) => Object.assign(arrival, {come, fail}));
      this.arrivals.set(i, arrival);
    }
    return this.arrivals.get(i).promise;
  }
  lens(layer, i) {
    const at = this.lensColumns.get(i);
    return at ? at.lens.ids.row(layer, at.c).map((id, k) => ({id, prob: at.lens.probs.at(layer, at.c, k)})) : null;
  }
  async alternatives(t) {
    await this.column(t - 1);
    const {alternatives: a, c} = this.lensColumns.get(t - 1);
    return {top: a.ids.row(c).map((id, i) => ({id, logprob: a.logprobs.at(c, i)})), own: {id: this.tokens[t].id, logprob: a.own.at(c), rank: a.ranks.at(c)}};
  }
  async follow(at, id) {
    const answer = await this.once("follow", {at, ids: [id]}), logprobs = unpacked(answer.logprobs), ranks = unpacked(answer.ranks);
    return range(this.model.n_layer).map(l => ({logprob: logprobs.at(l, 0), rank: ranks.at(l, 0)}));
  }
  async patterns(at) {
    const answer = await this.once("attention", {at});
    answer.view ??= unpacked(answer.weights);
    return (layer, head, key) => answer.view.at(layer, head, key) / 65535 * answer.largest;
  }
  async attention(layer, head, query) {
    const weight = await this.patterns(query);
    return range(query + 1).map(key => weight(layer, head, key));
  }
  async looks(query, key) {
    const weight = await this.patterns(query);
    return range(this.model.n_layer).map(l => range(this.model.n_head).map(h => key > query ? 0 : weight(l, h, key)));
  }
  async attribution(at) {
    const a = await this.once("attribution", {at});
    if (a.why) return null;
    const heads = unpacked(a.heads);
    return {logit: a.logit, embed: a.embed, bias: a.bias, attn: unpacked(a.attn).row(), mlp: unpacked(a.mlp).row(), heads: range(this.model.n_layer).map(l => heads.row(l))};
  }
  async blocking(at) {
    const asked = this.answers.get(JSON.stringify(["blocking", {at}]));
    if (!asked) return null;
    const {drop, floor} = await asked;
    return {drop: unpacked(drop).row(), floor};
  }
  askBlocking(at) { return this.once("blocking", {at}); }
  async same(n, id = null) {
    if (id !== null) return (await this.once("words", {at: n, ids: [id]})).alternatives[id] ?? false;
    const {prompts} = await this.words;
    return prompts ? prompts[n - 1] : n < this.tokens.length && (await this.once("words", {at: n, ids: []})).prompts;
  }
  async isWord(at) { return (await this.words).answers?.includes(this.tokens[at].id) ?? false; }
}
const unpackedAll = part => Object.fromEntries(Object.entries(part).map(([k, v]) => [k, unpacked(v)]));

// -- the state ----------------------------------------------------------------------------------
const noChanges = () => ({steer: {}, layers: "", heads: [], hidden: [], moved: []});
const state = {
  mode: "plain", messages: [],
  begun: 0, kept: "",  // where the answer of a chat begins, and what of it is given
  given: [], written: [[], null], said: ["", ""], view: 0, changes: noChanges(),
  sampled: {},  // how its tokens were chosen; null where no one command writes it
};
let soon = 0, hand = null, vectors = [], running = [null, null], explorer = null, source = null, branches = [], here = null;
const SETTINGS = {max_tokens: 32, temperature: 0, top_p: 1, seed: 0};
const setting = name => { const value = parseFloat($(name).value); return Number.isFinite(value) ? value : SETTINGS[name]; };
const rowsOf = tokens => tokens.map(t => Array.isArray(t) ? {id: t[0], label: t[1], text: t[2]} : {id: t.id, label: t.label ?? t.text, text: t.text});
const ids = tokens => tokens.map(t => t.id);
const textOf = view => [...state.given, ...(state.written[view] ?? [])];
const isChanged = () => { const c = state.changes; return Object.keys(c.steer).length + c.heads.length + c.hidden.length + c.moved.length > 0; };

function sampling() {
  const own = {};
  if (setting("temperature") > 0) {
    own.temperature = setting("temperature");
    if (setting("top_p") < 1) own.top_p = setting("top_p");
    own.seed = setting("seed");
  }
  return own;
}

// -- changes: as the server reads them, in words, as options, in Python ------------------------------
const steered = () => Object.entries(state.changes.steer);
function changesBody() {
  const {layers, heads, hidden, moved} = state.changes, body = {};
  if (steered().length) body.steer = steered().map(([vector, coefficient]) => ({vector, coefficient, ...(layers ? {layers} : {})}));
  if (heads.length) body.ablate = heads.join(",");
  if (hidden.length) body.block = hidden.map(i => `${i + 1}..->${i}`);
  if (moved.length) body.patch = moved.map(({layer, prompt, from, to}) => ({site: `l_out-${layer}`, prompt, from, to}));
  return body;
}
const nameOf = i => { const token = state.given[i]; return token ? `token ${i} ${quoted(seen(token.label))}` : `token ${i}`; };
const movedName = ({layer, from, label, to}) => `residual after layer ${layer} of token ${from} ${quoted(seen(label))} put at ${nameOf(to)}`;
function changesWords() {
  const {layers, heads, hidden, moved} = state.changes;
  const words = steered().map(([name, c]) => `${name} × ${c}${layers ? ` at layers ${layers}` : ""}`);
  if (heads.length) words.push(`head${heads.length > 1 ? "s" : ""} ${heads.join(", ")} silenced`);
  return [...words, ...hidden.map(i => `${nameOf(i)} hidden from later tokens`), ...moved.map(movedName)].join("; ");
}
const fileOf = name => vectors.find(v => v.name === name)?.file ?? `${name}.safetensors`;
function steerWords() {
  return steered().map(([name, c], i) => {
    const times = Math.abs(c) === 1 ? "" : `${Math.abs(c)}*`;
    return (c < 0 ? (i ? " - " : "-") : i ? " + " : "") + times + fileOf(name);
  }).join("");
}
// each with the tokens that a prompt has at least for it to make sense
function changesOptions() {
  const {layers, heads, hidden, moved} = state.changes, options = [];
  if (steered().length) options.push([0, [`--steer=${steerWords()}`, ...(layers ? ["--steer-layers", layers] : [])]]);
  if (heads.length) options.push([0, ["--ablate", heads.join(",")]]);
  for (const i of hidden) options.push([i + 2, ["--block", `${i + 1}..->${i}`]]);
  moved.forEach(({layer, from, to}, n) => options.push([to + 1, ["--patch", `l_out-${layer}`, `residual-${n + 1}.safetensors`, String(from), String(to)]]));
  return options;
}
function changesPython() {
  const {layers, heads, hidden, moved} = state.changes, words = [];
  if (moved.length) words.push(`patch=[${moved.map(({layer, from, to}, n) => `("l_out-${layer}", "residual-${n + 1}.safetensors", "${from}", "${to}")`).join(", ")}]`);
  if (heads.length) words.push(`ablate=${python(heads.join(","))}`);
  if (hidden.length) words.push(`block=[${hidden.map(i => `"${i + 1}..->${i}"`).join(", ")}]`);
  if (steered().length) words.push(`steer=${python(steerWords())}${layers ? `, steer_layers=${python(layers)}` : ""}`);
  return `Changes(${words.join(", ")})`;
}
// the files that moved residuals are taken from
async function movedCommands() {
  const nodes = [];
  for (const [n, {layer, prompt, from}] of state.changes.moved.entries()) {
    const {tokens} = await post("/mia/explore", {prompt, part: "text"}), rows = rowsOf(tokens);
    const its = Object.assign(new Served({tokens: rows, nPrompt: rows.length, changes: false}), {isApart: true});
    const line = await command({source: its, tokens: rows}, "save", rows.length, [`l_out-${layer}`, `residual-${n + 1}.safetensors`]);
    nodes.push(make("p", {class: "title"}, `The residual of token ${from}, as a file`));
    nodes.push(line ? copyable(line) : copyable(`m.look([${prompt.join(", ")}], "l_out-${layer}").save("residual-${n + 1}.safetensors")`));
  }
  return nodes;
}

// -- the address ----------------------------------------------------------------------------------
const packIds = list => list.map(i => i.toString(36)).join(".");
const unpackIds = text => text ? text.split(".").map(w => parseInt(w, 36)) : [];
function address() {
  const words = {model: MODEL.name, given: packIds(ids(state.given)), text: packIds(ids(state.written[0]))};
  if (state.written[1]) words.changed = packIds(ids(state.written[1]));
  if (isChanged()) words.changes = JSON.stringify(state.changes);
  if (state.mode === "chat") Object.assign(words, {chat: JSON.stringify(state.messages), begun: state.begun, kept: state.kept, said: JSON.stringify(state.said)});
  const used = {max_tokens: setting("max_tokens"), ...(state.sampled ?? sampling())};
  for (const [name, usual] of Object.entries(SETTINGS)) if (name in used && used[name] !== usual) words[name] = used[name];
  if (!state.sampled) words.legs = 2;
  if (state.view) words.view = state.view;
  return "#" + new URLSearchParams({...words, ...(explorer?.words() ?? {})});
}
function remember(push = false) {
  const hash = state.given.length ? address() : location.pathname;
  history[push ? "pushState" : "replaceState"]({branch: here?.id}, "", hash);
  $("page-link").href = hash;
  if (here) here.hash = hash;
}
const listOf = (value, check) => Array.isArray(value) ? value.filter(check) : [];
const isIndex = i => Number.isInteger(i) && i >= 0;
function checkedChanges(text) {
  let said;
  try { said = JSON.parse(text ?? "{}"); } catch { said = {}; }
  const steer = Object.entries(said?.steer ?? {}).filter(([, c]) => typeof c === "number" && c !== 0);
  return {
    steer: Object.fromEntries(steer), layers: typeof said?.layers === "string" ? said.layers : "",
    heads: listOf(said?.heads, h => typeof h === "string"), hidden: listOf(said?.hidden, isIndex),
    moved: listOf(said?.moved, m => isIndex(m?.layer) && isIndex(m.from) && isIndex(m.to) && Array.isArray(m.prompt) && typeof m.label === "string"),
  };
}
const parsed = (text, none) => { try { return JSON.parse(text) ?? none; } catch { return none; } };

// a branch of the list: the one that the page is at
let place = 0;
function branchOff(label, parent) {
  here = {label, parent, hash: "", id: `${performance.timeOrigin}.${branches.length}`};
  branches.push(here);
}
async function fromHash() {
  if (!MODEL) return;
  const words = new URLSearchParams(location.hash.slice(1)), turn = ++place, own = branches.find(b => b.id === history.state?.branch);
  stop([0, 1], true);
  if (!words.get("given")) { clear(); return; }
  if (words.get("model") !== MODEL.name) { clear(); fail(new Error(`this link is of ${words.get("model")}; the server has ${MODEL.name}`)); return; }
  const messages = parsed(words.get("chat"), null), said = parsed(words.get("said"), []);
  const given = unpackIds(words.get("given")), parts = [unpackIds(words.get("text")), words.has("changed") ? unpackIds(words.get("changed")) : null];
  try {
    const texts = await Promise.all(parts.map(async part => part && rowsOf((await post("/mia/explore", {prompt: [...given, ...part], part: "text"})).tokens)));
    if (turn !== place) return;  // something else was asked for since then
    for (const name of Object.keys(SETTINGS)) $(name).value = words.get(name) ?? SETTINGS[name];
    Object.assign(state, {
      mode: Array.isArray(messages) ? "chat" : "plain", messages: listOf(messages, m => typeof m?.role === "string" && typeof m.content === "string"),
      begun: whole(words.get("begun"), 2 ** 31) ?? 0, kept: words.get("kept") ?? "", said: [0, 1].map(i => typeof said[i] === "string" ? said[i] : ""),
      changes: checkedChanges(words.get("changes")), sampled: words.has("legs") ? null : sampling(),
    });
    $("form").elements.mode.value = state.mode;
    $("error").textContent = "";
    say("");
    state.given = texts[0].slice(0, given.length);
    state.written = texts.map(text => text && text.slice(given.length));
    state.view = words.get("view") === "1" && state.written[1] ? 1 : 0;
    if (own) here = own;
    else branchOff(`From a link: ${state.messages.at(-1)?.content ?? joined(state.given).slice(0, 100)}`, null);
    drawLeft();
    look(words);
    // left before its first token was there
    const open = allViews().filter(view => !state.written[view]?.length);
    if (open.length) await write(open);
  } catch (error) { fail(error); }
}

// -- writing ----------------------------------------------------------------------------------------
const say = words => { $("status").textContent = words; };
function fail(error) {
  if (error.name === "AbortError") return;
  let words = error.message;
  if (error.status === 401) {
    words = sessionStorage.getItem(KEY) ? "This is not the server’s key." : "The server asks for its key.";
    $("unlock").hidden = false;
    $("key").focus();
  }
  $("error").textContent = words;
  say("");
}
// quietly: something else follows at once
function stop(views = [0, 1], quietly = false) {
  clearTimeout(soon);
  for (const view of views) {
    if (!running[view]) continue;
    running[view].quiet = quietly;
    running[view].abort();
    running[view] = null;
  }
  $("stop").hidden = !running.some(Boolean);
}

// writes what follows: of some views, behind what they have, or from where the given text ends
async function write(views, {further = false} = {}) {
  stop(views, true);
  $("error").textContent = "";
  // a seed begins anew with what is written further, and a command ends where the model does
  if (!further) state.sampled = sampling();
  else if (setting("temperature") > 0 || state.sampled?.temperature || ended.some(Boolean)) state.sampled = null;
  for (const view of views) {
    ended[view] = false;
    if (!further) { state.written[view] = []; state.said[view] = state.kept; }
    running[view] = new AbortController();
  }
  $("stop").hidden = false;
  if (views.includes(state.view)) closeExplorer();
  say("writing …");
  drawLeft();
  await Promise.all(views.map(view => writeOne(view, running[view])));
  if (!running.some(Boolean)) $("stop").hidden = true;
}
async function writeOne(view, run) {
  const body = {
    prompt: ids(textOf(view)), max_tokens: setting("max_tokens"), temperature: setting("temperature"), top_p: setting("top_p"), seed: setting("seed"),
    return_token_ids: true, return_labels: true, ...(view ? changesBody() : {}),
  };
  let reason = null;
  try {
    for await (const {choices: [choice]} of chunks("/v1/completions", body, run.signal)) {
      if (run.signal.aborted) break;
      state.written[view].push(...rowsOf(choice.labels ?? []));
      state.said[view] += choice.text;
      reason = choice.finish_reason ?? reason;
      ended[view] = reason === "stop";
      drawPanesSoon();
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
  if (run.quiet) return;
  running[view] = null;
  performance.mark(`answer ${view}`);
  if (view === state.view) look();
  drawLeft();
  remember();
  const n = state.written[view].length;
  if (!$("error").textContent) say(`${view ? "Changed: " : ""}${n} token${n === 1 ? "" : "s"}${reason === "stop" ? ", ended by the model" : reason === null ? ", stopped" : ""}.`);
}
const ended = [false, false];
const allViews = () => isChanged() ? [0, 1] : [0];

async function send() {
  const text = $("prompt").value, chat = $("form").elements.mode.value === "chat";
  if (!text) { $("prompt").focus(); return; }
  let messages = [];
  if (chat) {
    if (state.mode === "chat" && state.given.length) messages = [...state.messages, {role: "assistant", content: state.said[state.view]}];
    else if ($("system").value) messages = [{role: "system", content: $("system").value}];
    messages.push({role: "user", content: text});
  }
  try {
    $("error").textContent = "";
    stop([0, 1], true);
    const turn = ++place;
    const {tokens} = await post("/mia/explore", {...(chat ? {messages} : {prompt: text, bos: $("bos").checked}), part: "text"});
    if (turn !== place) return;
    if (chat) $("prompt").value = "";
    begin(`${chat ? "Chat" : "Prompt"}: ${text}`, {mode: chat ? "chat" : "plain", messages, given: rowsOf(tokens), begun: chat ? tokens.length : 0, kept: ""}, null);
  } catch (error) { fail(error); }
}

// a new given text: from it on all is written again
function begin(label, changes, parent) {
  Object.assign(state, changes, {written: [[], isChanged() ? [] : null], said: ["", ""]});
  const n = state.given.length;
  state.changes.hidden = state.changes.hidden.filter(i => i + 2 <= n);
  state.changes.moved = state.changes.moved.filter(({to}) => to < n);
  if (!isChanged()) { state.view = 0; state.written[1] = null; }
  branchOff(label, parent);
  closeExplorer();
  explorer = null;
  remember(true);
  return write(allViews());
}

// the given text from now on: the first tokens of what is looked at, and perhaps another one behind
async function cut(label, n, more = []) {
  const text = textOf(state.view), given = [...text.slice(0, n), ...more], turn = ++place;
  const inAnswer = state.mode === "chat" && n >= state.begun, kept = inAnswer ? await keptOf(given) : "";
  if (turn !== place) return;
  if (!inAnswer) $("form").elements.mode.value = "plain";
  await begin(label, {given, kept, ...(inAnswer ? {} : {mode: "plain", messages: [], begun: 0, kept: ""})}, here);
}
// what of an answer is given
async function keptOf(given) {
  if (state.mode !== "chat" || given.length <= state.begun) return "";
  return (await post("/detokenize", {tokens: ids(given.slice(state.begun))})).prompt;
}
async function branchAt(t, id) {
  const other = source.piece(id), row = {id, label: source.pieces[id][0], text: other.text};
  try { await cut(`${quoted(other.label)} in place of ${explorer.name(t)}`, t, [row]); } catch (error) { fail(error); }
  $("h-write").scrollIntoView?.({block: "nearest"});
}

// changes are tried at once, beside the unchanged text, with tokens chosen in the same way
function changed(views = [1]) {
  drawChanges();
  if (!state.given.length) return;
  stop([1], true);
  const isOpen = !running[0] && !state.written[0].length;
  if (isOpen || JSON.stringify(sampling()) !== JSON.stringify(state.sampled)) views = [0, 1];
  if (!isChanged()) {
    if (!running[0]) say("");
    state.written[1] = null;
    if (state.view) { state.view = 0; look(explorer?.words()); }
    drawLeft();
    remember();
    return;
  }
  soon = setTimeout(() => { remember(true); write(views); }, 150);
}

// a change that needs the first n tokens to be given: tokens that the model wrote become so.
// Then it is made, and what follows is written again.
async function give(n, change) {
  let views = [1];
  try {
    if (n > state.given.length) {
      const text = textOf(state.view), given = text.slice(0, n), turn = ++place, kept = await keptOf(given);
      if (turn !== place) return;
      // a seed begins where the given text ends
      if (state.view || setting("temperature") > 0) views = [0, 1];
      Object.assign(state, {given, kept, written: [views.includes(0) ? [] : text.slice(n), []]});
    }
    change();
    changed(views);
    explorer.draw();
  } catch (error) { fail(error); }
}

// -- the explorer of what is looked at --------------------------------------------------------------
function closeExplorer() { source?.close(); source = null; $("explorer").setAttribute("aria-busy", "true"); }
function look(words = null) {
  const focused = $("explorer").contains(document.activeElement) ? document.activeElement : null;
  const tokens = textOf(state.view), chosen = words instanceof URLSearchParams ? words : new URLSearchParams(words ?? {});
  source?.close();
  if (!tokens.length) return;
  const n = state.written[state.view].length;
  source = new Served({tokens, nPrompt: state.given.length, changes: state.view === 1, words: {n_predict: Math.max(n, 1), k: 5, branches: 3, sampling: state.sampled ?? {}, apart: !state.sampled}});
  explorer = new Explorer($("explorer"), source, {
    address, failed: fail, changed: () => remember(), goOn: branchAt, tokenActions, cellActions, headActions, before: () => state.view ? movedCommands() : [],
  });
  $("explorer").removeAttribute("aria-busy");
  explorer.restore(chosen);
  if (MODEL.missing.lens) source.firstCame();
  else source.readLens(explorer.state.cell ? explorer.state.cell[1] : Math.max(0, explorer.state.token - 1)).catch(fail);
  const view = state.view, mark = performance.getEntriesByName(`answer ${view}`).at(-1), came = source.lensCame;
  source.onLens(columns => {
    came(columns);
    source.onLens(came);
    if (mark) requestAnimationFrame(() => performance.measure("first lens grid", {start: mark.startTime}));
  });
  explorer.draw();
  // what had the focus is drawn anew: it goes to the same part
  const part = focused?.closest("section")?.getAttribute("aria-labelledby");
  if (part) ($(focused.id) ?? $(part)?.parentNode.querySelector('[tabindex="0"]'))?.focus({preventScroll: true});
  remember();
}
function tokenActions(t) {
  const actions = [], n = textOf(state.view).length;
  const add = (words, act, pressed = null) => actions.push(make("button", {type: "button", onclick: act, "aria-pressed": pressed}, words));
  if (t < n - 1 && t > 0) add("write again after this token", () => cut(`again after ${explorer.name(t)}`, t + 1).catch(fail));
  if (!MODEL.missing.blocking && t + 2 <= n) {
    const is = state.changes.hidden.includes(t);
    add(is ? "no longer hide it" : "hide it from later tokens", () => give(is ? 0 : t + 2, () => {
      state.changes.hidden = is ? state.changes.hidden.filter(i => i !== t) : [...state.changes.hidden, t].sort((a, b) => a - b);
    }), String(is));
  }
  return actions;
}
function cellActions(layer, i) {
  const actions = [], add = (words, act) => actions.push(make("button", {type: "button", onclick: act}, words));
  if (!state.view) add(`pick up the residual of layer ${layer} at ${explorer.name(i)}`, () => {
    hand = {layer, prompt: ids(textOf(0).slice(0, i + 1)), from: i, label: textOf(0)[i].label};
    drawChanges();
    explorer.draw();
    say(`In hand: the residual after layer ${layer} of ${explorer.name(i)}. Choose a cell of another token to put it there.`);
  });
  if (hand) add(`put it here: layer ${hand.layer} at ${explorer.name(i)}`, () => give(i + 1, () => {
    if (hand) state.changes.moved = [...state.changes.moved.filter(m => m.to !== i || m.layer !== hand.layer), {...hand, to: i}];
    hand = null;
  }));
  return actions;
}
function headActions(layer, head) {
  const name = `${layer}.${head}`, is = state.changes.heads.includes(name);
  return [make("button", {type: "button", "aria-pressed": String(is), id: "silence", onclick: () => { silence(name, !is); explorer.draw(); $("silence")?.focus(); }}, is ? `hear head ${name} again` : `silence head ${name}`)];
}
function silence(name, is) {
  const others = state.changes.heads.filter(h => h !== name);
  state.changes.heads = is ? [...others, name] : others;
  changed();
}

// -- the left side -----------------------------------------------------------------------------------
let waiting = false;
function drawPanesSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawPanes(); });
}
function drawPanes() {
  if (!state.given.length) { $("panes").replaceChildren(); return; }
  const texts = [{label: state.written[1] ? "Unchanged" : "The model", changes: "", tokens: state.written[0]}];
  if (state.written[1]) texts.push({label: "Changed", changes: changesWords(), tokens: state.written[1]});
  const focused = document.activeElement?.name === "pane";
  $("panes").replaceChildren(panes(texts, state.view, view => {
    state.view = view;
    drawPanes();
    if (running[view]) closeExplorer(); else look(explorer?.words());
  }, (view, k) => {
    if (running[view]) return;
    if (view !== state.view) { state.view = view; drawPanes(); look({token: state.given.length + k}); }
    else explorer?.set({token: state.given.length + k});
  }));
  if (focused) $("panes").querySelector("input:checked")?.focus();
}
function drawLeft() {
  const turns = state.mode === "chat" ? state.messages : [];
  const names = {user: "You", assistant: "The model", system: "System"};
  $("turns").replaceChildren(...turns.map(({role, content}) => make("div", {class: `turn ${role}`}, make("b", {}, names[role] ?? role), content)));
  const kept = state.mode === "chat" ? state.given.slice(state.begun) : [];
  if (kept.length) $("turns").append(make("div", {class: "turn"}, make("b", {}, "It begins"), joined(kept)));
  if (state.mode === "plain" && state.given.length && textOf(0).length) $("turns").append(make("div", {class: "turn user"}, make("b", {}, "The prompt"), joined(state.given)));
  const any = state.given.length > 0, chat = $("form").elements.mode.value === "chat";
  for (const id of ["further", "new", "keep"]) $(id).hidden = !any;
  $("bos-row").hidden = chat;
  $("send").textContent = chat ? "Send" : "Write";
  $("prompt-label").textContent = chat ? (any && state.mode === "chat" ? "Your next message (Enter sends)" : "Your message (Enter sends)") : "Prompt (Ctrl+Enter writes)";
  drawPanes();
  drawChanges();
  drawBranches();
}
function drawBranches() {
  $("branches-section").hidden = branches.length < 2;
  const depth = b => b.parent ? 1 + depth(b.parent) : 0;
  refill($("branches"), ...branches.map(b => make("li", {style: `padding-left:${Math.min(depth(b), 6)}rem`},
    make("button", {type: "button", "aria-pressed": String(b === here), onclick: () => { history.pushState({branch: b.id}, "", b.hash); fromHash(); }}, b.label))));
}
function chip(words, remove) { return make("li", {}, make("button", {type: "button", "aria-label": `take back: ${words}`, onclick: () => { remove(); changed(); explorer?.draw(); }}, words)); }

function vectorRow({name, site, layers, norms}) {
  const value = state.changes.steer[name] ?? 0, id = `steer-${name}`;
  const set = text => {
    const c = parseFloat(text);
    if (!Number.isFinite(c)) return;
    if (c) state.changes.steer[name] = c; else delete state.changes.steer[name];
    range.value = c;
    if (number !== document.activeElement) number.value = c;
    changed();
  };
  const range = make("input", {type: "range", id, "data-vector": name, min: -4, max: 4, step: 0.1, oninput: e => set(e.target.value)});
  const number = make("input", {type: "number", step: 0.1, "aria-label": `coefficient of ${name}`, oninput: e => set(e.target.value)});
  range.value = number.value = value;
  const length = Object.values(norms ?? {});
  const about = `${site}, layers ${layers.join(", ")}${length.length ? `; norm ${Math.max(...length).toPrecision(3)}` : ""}`;
  return make("div", {class: "vector"}, make("label", {for: id, "data-tip": about}, name), range, number);
}
let drawnVectors = "";
function drawChanges() {
  const host = $("changes"), {changes} = state;
  if (!host.firstChild) host.append(make("div", {id: "vectors"}), make("div", {id: "others"}));
  // rows of vectors stay while they are moved: what has the focus keeps it
  const now = JSON.stringify(vectors.map(v => v.name));
  if (now !== drawnVectors) { drawnVectors = now; drawVectors(); }
  for (const input of host.querySelectorAll("[data-vector]")) {
    const value = changes.steer[input.dataset.vector] ?? 0;
    for (const own of [input, input.nextSibling]) if (own !== document.activeElement && +own.value !== value) own.value = value;
  }
  if ($("at-layers") && $("at-layers") !== document.activeElement) $("at-layers").value = changes.layers;
  if ($("silenced") !== document.activeElement && $("silenced")) $("silenced").value = changes.heads.join(", ");
  const chips = [
    ...steered().filter(([name]) => !vectors.some(v => v.name === name)).map(([name, c]) => chip(`${name} × ${c}`, () => { delete changes.steer[name]; })),
    ...changes.heads.map(h => chip(`head ${h} silenced`, () => { changes.heads = changes.heads.filter(o => o !== h); })),
    ...changes.hidden.map(i => chip(`${nameOf(i)} hidden`, () => { changes.hidden = changes.hidden.filter(o => o !== i); })),
    ...changes.moved.map(m => chip(movedName(m), () => { changes.moved = changes.moved.filter(o => o !== m); })),
  ];
  const parts = [];
  if (hand) parts.push(make("div", {class: "hand", id: "hand"}, `In hand: the residual after layer ${hand.layer} of token ${hand.from} ${quoted(seen(hand.label))}. Choose a cell of another token, then “put it here”. `,
    make("button", {type: "button", onclick: () => { hand = null; drawChanges(); explorer?.draw(); }}, "let it go")));
  if (chips.length) parts.push(make("ul", {class: "chips"}, ...chips));
  if (isChanged()) parts.push(make("button", {type: "button", id: "clear", onclick: () => { state.changes = noChanges(); changed(); explorer?.draw(); }}, "take all back"));
  else if (!hand) parts.push(make("p", {class: "note"}, "Nothing is changed. Move a vector’s slider, silence a head, hide a token, or pick up a residual in a cell of the lens: what the model writes then stands beside what it wrote."));
  refill($("others"), ...parts);
}
function drawVectors() {
  const upload = make("input", {type: "file", accept: ".safetensors", "aria-label": "a vector file", onchange: async e => {
    const [file] = e.target.files, name = file?.name.replace(/\.safetensors$/, "").replace(/\W/g, "_");
    try { if (file) { await call(`/mia/vectors/${encodeURIComponent(name)}`, file, {type: "application/octet-stream"}); await loadVectors(); } } catch (error) { fail(error); }
  }});
  const sum = make("input", {type: "text", placeholder: "joy - 0.5*anger", "aria-label": "arithmetic with vectors"}), name = make("input", {type: "text", placeholder: "name", size: 8, "aria-label": "name of the new vector"});
  const add = make("button", {type: "button", onclick: async () => {
    try { await post("/mia/vectors", {name: name.value, expression: sum.value}); await loadVectors(); } catch (error) { fail(error); }
  }}, "add");
  const heads = make("input", {type: "text", id: "silenced", placeholder: "3.5, 4.*", size: 14, onchange: e => {
    state.changes.heads = e.target.value.split(/[,\s]+/).filter(Boolean);
    changed();
    explorer?.draw();
  }});
  const layers = make("input", {type: "text", id: "at-layers", placeholder: "all they have", size: 10, onchange: e => { state.changes.layers = e.target.value.trim(); if (steered().length) changed(); }});
  const empty = make("p", {class: "note"}, "No vectors yet: start the server with --vectors FOLDER, or upload one.");
  $("vectors").replaceChildren(...(vectors.length ? [...vectors.map(vectorRow), make("div", {class: "row"}, make("label", {for: "at-layers"}, "steer at layers"), layers)] : [empty]),
    make("details", {}, make("summary", {}, "Another vector"), make("div", {class: "row"}, make("label", {}, "upload ", upload)), make("div", {class: "row"}, name, "=", sum, add)),
    make("div", {class: "row"}, make("label", {for: "silenced"}, "silence heads"), heads));
}
async function loadVectors() {
  vectors = (await get("/mia/vectors")).vectors.filter(v => v.width === MODEL.n_embd || v.width === undefined);
  drawChanges();
}
const EMPTY = [...$("explorer").childNodes];  // what to do here
function clear() {
  ++place;
  stop([0, 1], true);
  source?.close();
  Object.assign(state, {messages: [], given: [], written: [[], null], said: ["", ""], view: 0, begun: 0, kept: ""});
  explorer = source = here = null;
  $("explorer").replaceChildren(...EMPTY);
  $("explorer").removeAttribute("aria-busy");
  $("error").textContent = "";
  say("");
  drawLeft();
}

async function save() {
  say("making the file …");
  $("export").disabled = true;
  try {
    const body = {prompt: ids(state.given), written: ids(state.written[0]), changed: state.written[1] && ids(state.written[1]), k: 5, ...state.sampled, ...(state.written[1] ? changesBody() : {})};
    const file = await (await call("/mia/page", body)).blob(), url = URL.createObjectURL(file);
    const link = make("a", {href: url, download: `${MODEL.name.replace(/[^\w.-]/g, "_")}-explore.html`});
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    say(`One file of ${(file.size / 1e6).toFixed(1)} MB, which opens without the server.`);
  } catch (error) { fail(error); }
  $("export").disabled = false;
}

// -- all of it ---------------------------------------------------------------------------------------
$("form").addEventListener("submit", e => { e.preventDefault(); send(); });
$("form").addEventListener("change", e => { if (e.target.name === "mode") { drawLeft(); $("prompt").focus(); } });
$("prompt").addEventListener("keydown", e => {
  if (e.key !== "Enter" || e.isComposing) return;
  const chat = $("form").elements.mode.value === "chat";
  if (e.ctrlKey || e.metaKey || (chat && !e.shiftKey)) { e.preventDefault(); send(); }
});
document.addEventListener("keydown", e => { if (e.key === "Escape" && running.some(Boolean)) stop(); });
$("stop").addEventListener("click", () => stop());
$("further").addEventListener("click", () => write(allViews(), {further: true}));
$("new").addEventListener("click", () => { clear(); history.pushState(null, "", location.pathname); $("prompt").focus(); });
$("export").addEventListener("click", save);
$("unlock").addEventListener("submit", e => {
  e.preventDefault();
  // no header has other letters, and so no key
  sessionStorage.setItem(KEY, $("key").value.replace(/[^ -~]/g, "?"));
  $("key").value = "";
  start();
});
addEventListener("hashchange", fromHash);

async function start() {
  try {
    MODEL = await get("/mia/model");
    $("unlock").hidden = true;
    $("error").textContent = "";
    document.title = $("title").textContent = `${MODEL.name} · mia`;
    $("about").textContent = `${MODEL.architecture}, ${MODEL.n_layer} layers, ${MODEL.n_head} heads. Choose a token with a click, or with Tab and the arrow keys; all else follows it.`;
    const modes = $("form").elements.mode;
    modes.value = MODEL.has_chat ? "chat" : "plain";
    $("export").hidden = "lens" in MODEL.missing;  // a file has that, or nothing
    $("modes").hidden = !MODEL.has_chat;
    $("bos").checked = MODEL.has_bos;
    await loadVectors();
    if (location.hash.length > 1) await fromHash();
    else if (!state.given.length) drawLeft();
  } catch (error) { fail(error); }
}
start();
