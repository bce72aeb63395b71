"use strict";
const at = (id) => document.getElementById(id);
const data = JSON.parse(at("data").textContent);
const SHOWN_CLASSES = 12, SHOWN_CONFLICTS = 5;
const NO_FILE = "No file is named here: N, or leave it open.";
const kept = "visionloop review " + data.version;
const classes = new Set(data.classes);
let here = 0, unsaved = false, saved = false, keeps = true, decided = {};

function element(kind, text, style) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (style) made.className = style;
  return made;
}

try {
  decided = JSON.parse(localStorage.getItem(kept)) || {};
} catch {
  keeps = false;
}

function keep() {
  unsaved = true;
  try { localStorage.setItem(kept, JSON.stringify(decided)); } catch { keeps = false; }
  at("kept").hidden = keeps;
}

const said = (card) => (decided[card.issue] || {}).decision || "";
const words = (decision) => decision.replace(/^relabel:/, "relabel to ").replace(/^not_a_problem$/, "not a problem");

function picture(file, small) {
  const figure = element("figure", undefined, small ? "small" : "");
  if (file.thumbnail) {
    const image = element("img", undefined, file.tiny ? "tiny" : "");
    image.loading = "lazy";
    image.decoding = "async";
    image.alt = file.path;
    image.src = file.thumbnail;
    figure.append(image);
  } else {
    figure.append(element("div", "cannot be shown", "none"));
  }
  if (!small) {
    const caption = element("figcaption");
    caption.append(element("b", file.label, "name"));
    if (file.test) caption.append(element("span", "frozen test", "badge bad"));
    caption.append(element("br"), element("span", file.path, "soft"));
    figure.append(caption);
  }
  return figure;
}

function button(text, key, act) {
  const made = element("button", text + " ");
  made.type = "button";
  made.append(element("kbd", key));
  made.addEventListener("click", act);
  return made;
}

function build(card, index) {
  const article = element("article", undefined, "card");
  article.tabIndex = -1;
  const top = element("div");
  top.append(element("span", index + 1 + ". ", "soft"), element("h2", card.kind.replaceAll("_", " ")));
  top.append(element("span", card.severity, "badge" + (card.severity === "critical" ? " bad" : "")));
  if (card.leak) top.append(element("span", "leak into the frozen test", "badge bad"));
  else if (card.test) top.append(element("span", "frozen test", "badge bad"));
  top.append(element("span", "  score " + card.score + " (lower is worse)", "soft small"));
  article.append(top, element("p", card.detail));
  const pictures = element("div", undefined, "pictures");
  for (const file of card.files) pictures.append(picture(file, false));
  if (card.more) pictures.append(element("p", "and " + card.more + " more files", "soft"));
  if (card.candidate) {
    const answer = element("div");
    const title = element("p", "may be ", "soft");
    title.append(element("b", card.candidate, "name"));
    const row = element("div", undefined, "pictures");
    for (const file of data.examples[card.candidate] || []) row.append(picture(file, true));
    answer.append(title, row);
    pictures.append(answer);
  }
  article.append(pictures, element("p", "To do: " + card.action, "soft small"));
  const buttons = element("div", undefined, "buttons");
  const accept = button(card.proposal ? "Accept: " + words(card.proposal) : "Nothing is proposed", "A", () => decide(index, "accept"));
  accept.disabled = !card.proposal;
  const relabel = button(card.all.length > 1 ? "Relabel all " + card.all.length + " to …" : "Relabel to …", "R", () => ask(index)), remove = button(card.leaving.length > 1 ? "Remove " + card.leaving.length + " files" : card.files.length > 1 ? "Remove " + card.files[0].path : "Remove", "X", () => decide(index, "remove"));
  relabel.disabled = remove.disabled = !card.files.length;
  const note = element("input");
  note.placeholder = "note";
  note.setAttribute("aria-label", "note");
  note.maxLength = 500;
  note.value = (decided[card.issue] || {}).note || "";
  note.addEventListener("input", () => { decided[card.issue] = Object.assign({}, decided[card.issue], { note: note.value }); keep(); });
  buttons.append(accept, relabel, remove, button("Not a problem", "N", () => decide(index, "not_a_problem")), button("Undo", "U", () => undo(index)), note);
  article.append(buttons, element("p", "", "said name"), element("div", undefined, "conflicts bad small name"));
  article.addEventListener("pointerdown", () => go(index, false));
  return article;
}

const cards = data.cards.map(build);

function shown(index) {
  return (!at("kind").value || data.cards[index].kind === at("kind").value) && (!at("open").checked || !said(data.cards[index]));
}

function newClasses() {
  const given = data.cards.map(said).filter((decision) => decision.startsWith("relabel:")).map((decision) => decision.slice(8));
  return [...new Set(given)].filter((label) => !classes.has(label));
}

// What a decision makes of files, as `data review apply` takes it: [path, the new label, or "" where it leaves].
function doing(card, decision) {
  const given = decision === "accept" && card.candidate ? "relabel:" + card.candidate : decision;
  if (given === "accept") return card.copies.map((place) => [card.all[place][0], ""]);
  if (given === "remove") return card.leaving.map((place) => [card.all[place][0], ""]);
  const label = given.startsWith("relabel:") ? given.slice(8) : "";
  return label ? card.all.filter((file) => file[1] !== label).map((file) => [file[0], label]) : [];
}

// Sentences by card, each with the other cards that it is about: what becomes of one file differs, or all of the files that
// show the same would leave.
function contradictions() {
  const wanted = new Map(), found = new Map(), above = new Map(), copying = [];
  const into = (map, key, made) => map.get(key) || map.set(key, made).get(key);
  const note = (index, text, others) => into(found, index, []).push({ text: text, others: others.filter((other) => other !== index) });
  const top = (path) => {
    while (into(above, path, path) !== path) path = above.get(path);
    return path;
  };
  data.cards.forEach((card, index) => {
    const decision = said(card);
    for (const [path, way] of doing(card, decision)) into(into(wanted, path, new Map()), way, []).push(index);
    if (decision !== "accept" || card.candidate || !card.copies.length) return;
    copying.push(index);
    for (const [path] of card.all) above.set(top(path), top(card.all[0][0]));
  });
  const becomes = (way) => way ? "relabelled to " + way : "removed";
  for (const [path, ways] of wanted) {
    for (const [way, own] of ways.size > 1 ? ways : []) {
      const others = [...ways].filter(([other]) => other !== way);
      const text = path + " is to be " + becomes(way) + " here, and " + others.map(([other, by]) => becomes(other) + " by " + named(by)).join(", ");
      for (const index of own) note(index, text, others.flatMap(([, by]) => by));
    }
  }
  // Who says of a picture itself that it leaves means all of its copies.
  const leaves = (path) => wanted.has(path) && (wanted.get(path).get("") || [null]).every((index) => index !== null && said(data.cards[index]) === "accept");
  const groups = new Map();
  for (const index of copying) {
    const group = into(groups, top(data.cards[index].all[0][0]), { cards: [], paths: new Set() });
    group.cards.push(index);
    for (const [path] of data.cards[index].all) group.paths.add(path);
  }
  for (const { cards: by, paths } of groups.values()) {
    if (![...paths].every(leaves)) continue;
    for (const index of by) note(index, "of " + [...paths].sort().join(" and ") + ", which show the same, " + named(by) + " would leave none", by);
  }
  return found;
}

function named(indices) {
  const sorted = [...new Set(indices)].sort((a, b) => a - b), shown = sorted.slice(0, SHOWN_CONFLICTS).map((index) => index + 1).join(", ");
  return (sorted.length > 1 ? "cards " : "card ") + shown + (sorted.length > SHOWN_CONFLICTS ? " and " + (sorted.length - SHOWN_CONFLICTS) + " more" : "");
}

function jump(index) {
  if (cards[index].hidden) {
    at("kind").value = "";
    at("open").checked = false;
    filter();
  }
  go(index);
}

let marked = new Map();

function mark() {
  const found = contradictions();
  for (const index of new Set([...marked.keys(), ...found.keys()])) {
    const notes = found.get(index) || [], place = cards[index].querySelector(".conflicts");
    cards[index].classList.toggle("conflict", notes.length > 0);
    place.replaceChildren(...notes.slice(0, SHOWN_CONFLICTS).map((each) => element("p", "Contradiction: " + each.text + ".")));
    if (notes.length > SHOWN_CONFLICTS) place.append(element("p", "and " + (notes.length - SHOWN_CONFLICTS) + " more"));
    const others = [...new Set(notes.flatMap((each) => each.others))].sort((a, b) => a - b).slice(0, SHOWN_CONFLICTS);
    place.append(...others.map((other) => {
      const made = element("button", "Go to card " + (other + 1));
      made.type = "button";
      made.addEventListener("pointerdown", (event) => event.stopPropagation());
      made.addEventListener("click", () => jump(other));
      return made;
    }));
  }
  marked = found;
  const all = [...found.keys()].sort((a, b) => a - b);
  at("contradictions").hidden = !all.length;
  at("contradicting").textContent = all.length ? named(all).replace(/^c/, "C") + " contradict each other: as it is, the saved file would be refused." : "";
}

function told() {
  mark();
  const done = data.cards.filter(said).length;
  at("progress").textContent = done + " of " + data.cards.length + " decided" + (unsaved ? ", not saved" : saved ? ", saved as " + data.csv_name + " among the downloads" : "");
  at("new").textContent = newClasses().map((label) => " --new-class '" + label.replaceAll("'", "'\\''") + "'").join("");
}

function show(index) {
  const card = data.cards[index], decision = said(card);
  tell(index, decision && "Decided: " + words(decision) + (decision === "accept" ? " (" + words(card.proposal) + ")" : ""), false);
}

function tell(index, text, refused) {
  const line = cards[index].querySelector(".said");
  line.textContent = text;
  line.classList.toggle("bad", refused);
}

function refuse(index, text) {
  if (!said(data.cards[index])) tell(index, text, true);
  told();
  at("progress").textContent += ". " + text;  // the card's own line may be below the window
}

function go(index, move = true) {
  cards[here].classList.remove("here");
  here = index;
  cards[here].classList.add("here");
  if (!move) return;
  cards[here].focus({ preventScroll: true });
  cards[here].scrollIntoView({ block: "nearest" });
}

function step(by) {
  for (let index = here + by; index >= 0 && index < cards.length; index += by) {
    if (!cards[index].hidden) { go(index); return; }
  }
}

function decide(index, decision) {
  const card = data.cards[index];
  decided[card.issue] = Object.assign({}, decided[card.issue], { decision: decision });
  keep();
  show(index);
  told();
  go(index);
  step(1);
}

function undo(index) {
  const entry = decided[data.cards[index].issue];
  if (entry) delete entry.decision;
  keep();
  show(index);
  told();
  go(index);
}

function matching() {
  const typed = at("label").value.trim().toLowerCase(), own = data.cards[here].labels;
  const given = at("label").value.trim(), found = data.classes.filter((name) => !(own.length === 1 && own[0] === name) && name.toLowerCase().includes(typed));
  const rank = (name) => name.toLowerCase() === typed ? 0 : name.toLowerCase().startsWith(typed) ? 1 : 2;
  const best = found.sort((a, b) => rank(a) - rank(b)).slice(0, SHOWN_CLASSES);
  // A class of another name is the last choice, so that a slip of the finger makes none.
  return given && !data.classes.some((name) => name.toLowerCase() === typed) ? [...best, given] : best;
}

function choices() {
  at("choices").replaceChildren(...matching().map((name) => {
    const made = element("button", classes.has(name) ? name : "new class: " + name, "name");
    made.type = "button";
    made.addEventListener("click", () => relabel(name));
    return made;
  }));
}

function ask(index) {
  go(index);
  at("label").value = data.cards[index].candidate || "";
  choices();
  at("dialog").showModal();
  at("label").select();
}

function relabel(name) {
  at("dialog").close();
  decide(here, "relabel:" + name);
}

function cell(value) {
  return /[",\r\n]/.test(value) ? '"' + value.replaceAll('"', '""') + '"' : value;
}

function csv() {
  const lines = [data.columns];
  for (const card of data.cards) {
    const entry = decided[card.issue] || {};
    lines.push([...card.row, entry.decision || "", entry.note || ""]);
  }
  return "\ufeff" + lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
}

function save() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = data.csv_name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
  saved = true;
  told();
}

function filter() {
  cards.forEach((card, index) => { card.hidden = !shown(index); });
  const first = cards.findIndex((card) => !card.hidden);
  at("nothing").hidden = first >= 0;
  if (first >= 0 && cards[here].hidden) go(first);
}

const KEYS = {
  a: () => data.cards[here].proposal ? decide(here, "accept") : refuse(here, "Nothing is proposed here: R, X or N."),
  r: () => data.cards[here].files.length ? ask(here) : refuse(here, NO_FILE),
  x: () => data.cards[here].files.length ? decide(here, "remove") : refuse(here, NO_FILE),
  n: () => decide(here, "not_a_problem"),
  u: () => undo(here),
  e: () => cards[here].querySelector("input").focus(),
  j: () => step(1), arrowright: () => step(1),
  k: () => step(-1), arrowleft: () => step(-1),
  s: save,
};

const WALKING = ["j", "k", "arrowright", "arrowleft"];

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("dialog").open) return;
  if (event.target.closest("input:not([type=checkbox]), select")) {
    if (event.key === "Escape" || event.key === "Enter") { event.preventDefault(); go(here); }
    return;
  }
  const key = event.key.toLowerCase(), act = KEYS[key];
  if (!act || !cards.length) return;
  event.preventDefault();
  // A key that is held down walks through the cards, and decides nothing of those that it comes to.
  if (event.repeat && !WALKING.includes(key)) return;
  act();
});
at("label").addEventListener("input", choices);
at("label").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  const found = matching();
  if (found.length) relabel(found[0]);
});
at("save").addEventListener("click", save);
at("open").addEventListener("change", filter);
at("first").addEventListener("click", () => jump(Math.min(...marked.keys())));
at("kind").addEventListener("change", filter);
addEventListener("beforeunload", (event) => { if (unsaved && !keeps) event.preventDefault(); });

const kinds = new Map();
for (const card of data.cards) kinds.set(card.kind, (kinds.get(card.kind) || 0) + 1);
at("kind").append(new Option("all kinds", ""), ...[...kinds].map(([kind, count]) => new Option(kind.replaceAll("_", " ") + " (" + count + ")", kind)));
at("cards").append(...cards);
cards.forEach((_, index) => show(index));
at("kept").hidden = keeps;
at("frozen").hidden = !data.cards.some((card) => card.test);
told();
if (cards.length) go(Math.max(0, data.cards.findIndex((card) => !said(card))), true);
