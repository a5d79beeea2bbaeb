// The form is the query, the address remembers it, and one request at a time answers it.

const LONGEST_SIDE = 1024; // pixels of a picture that is sent; the models see fewer
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // the service reads these
const KINDS = { text: "text", image: "picture", "image,text": "picture with text" };
const STEPS = { encode: "encode_ms", retrieve: "retrieve_ms", rerank: "rerank_ms" };
const PATIENCE_MS = 200; // quicker answers replace the old ones without a sign of waiting

const at = (id) => document.getElementById(id);
const form = at("search");
const fields = form.elements;
let picture = null; // {uri, name}: the query's
let running = null; // the AbortController of the request under way
let models = null; // settled once it is known what the service has

// The query: in the form, in the address, on the wire.

function readForm() {
  const chosen = (name) => [...form.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value);
  return {
    text: fields.text.value.trim(),
    instruction: fields.instruction.value.trim(),
    picture,
    modality: chosen("modality"),
    source: chosen("source"),
    rerank: fields.rerank.checked,
    topK: fields.top_k.value,
  };
}

function writeForm(query) {
  fields.text.value = query.text;
  fields.instruction.value = query.instruction;
  offerSources(query.source);
  for (const name of ["modality", "source"])
    for (const box of form.querySelectorAll(`[name=${name}]`)) box.checked = query[name].includes(box.value);
  fields.rerank.checked = query.rerank;
  fields.top_k.value = query.topK;
  if (!fields.top_k.value) fields.top_k.selectedIndex = 0;
  showPicture(query.picture);
}

function toAddress({ text, instruction, modality, source, rerank, topK }) {
  const pairs = [["text", text], ["instruction", instruction]].filter(([, value]) => value);
  pairs.push(...modality.map((value) => ["modality", value]), ...source.map((value) => ["source", value]));
  if (rerank) pairs.push(["rerank", "1"]);
  if (topK !== fields.top_k.options[0].value) pairs.push(["results", topK]);
  return `#${new URLSearchParams(pairs)}`;
}

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  return {
    text: given.get("text") ?? "",
    instruction: given.get("instruction") ?? "",
    picture: history.state?.picture ?? null, // not in the link, but Back brings it
    modality: given.getAll("modality"),
    source: given.getAll("source"),
    rerank: given.has("rerank"),
    topK: given.get("results") ?? fields.top_k.options[0].value,
  };
}

/** Whether the query is another than the one remembered last. */
function remember(query) {
  const address = toAddress(query);
  if (address === (location.hash || "#") && query.picture?.uri === history.state?.picture?.uri) return false;
  history.pushState({ picture: query.picture }, "", address);
  return true;
}

function toRequest({ text, instruction, picture, modality, source, rerank, topK }) {
  const given = (entries) => Object.fromEntries(Object.entries(entries).filter(([, value]) => value?.length));
  return {
    query: given({ text, instruction, image: picture?.uri }),
    filter: given({ modality, source }),
    top_k: Number(topK),
    rerank: rerank && !fields.rerank.disabled,
    return_documents: true,
  };
}

// The service.

async function ask(path, body, signal) {
  const key = sessionStorage.getItem("apiKey");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal })
    .catch((error) => {
      throw signal?.aborted ? error : new Error("The service does not answer. Is it running?");
    });
  const told = await answer.text();
  if (answer.ok) return JSON.parse(told);
  if (answer.status === 401) askForKey();
  throw new Error(messageOf(answer, told));
}

function messageOf(answer, told) {
  let message = told || answer.statusText;
  try {
    message = JSON.parse(told).error.message;
  } catch {} // Serve's own refusals are plain text
  return answer.status === 404 ? `There is nothing to search here: ${message}` : message;
}

function askForKey() {
  at("key").hidden = false;
  at("key-field").focus();
}

async function learnModels() {
  const { data } = await ask("v1/models");
  fields.rerank.disabled = data.length < 2; // the embedder comes first, then the reranker if there is one
  if (!fields.rerank.disabled) return;
  fields.rerank.checked = false;
  at("rerank-hint").textContent = "this service has no reranker";
}

// Searching.

function submit() {
  remember(readForm());
  search();
}

async function search() {
  running?.abort();
  const mine = (running = new AbortController());
  const query = readForm();
  document.title = `${query.text || (query.picture ? "picture" : "umarvel")} · search`;
  complain("");
  if (!query.text && !query.picture) return clear(true);
  const waiting = setTimeout(showWaiting, PATIENCE_MS, query);
  try {
    await models;
    const start = performance.now();
    const answer = await ask("v1/search", toRequest(query), mine.signal);
    showAnswer(answer, performance.now() - start);
  } catch (error) {
    if (mine.signal.aborted) return;
    clear(false);
    complain(error.message);
  } finally {
    clearTimeout(waiting);
  }
}

function restore() {
  writeForm(fromAddress());
  search();
}

function begin() {
  models = learnModels().catch(() => {}); // what is wrong, the first search tells
  search();
}

// Showing.

function complain(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function clear(welcome) {
  at("results").replaceChildren();
  at("status").replaceChildren();
  at("times").hidden = true;
  at("answer-title").hidden = welcome;
  at("welcome").hidden = !welcome;
}

function showWaiting({ topK }) {
  clear(false);
  at("status").textContent = "Searching…";
  const card = () => Object.assign(document.createElement("li"), { className: "card waiting", ariaHidden: "true" });
  at("results").replaceChildren(...Array.from({ length: Math.min(topK, 12) }, card));
}

function showAnswer({ results, timings }, total) {
  clear(false);
  offerSources(results.map((result) => result.source));
  const took = Object.entries(STEPS).filter(([, name]) => timings[name] >= 0.05);
  const steps = took.map(([step, name]) => element("span", `${step} ${duration(timings[name])}`, step));
  const whole = element("span", `${counted(results.length)} in `);
  whole.append(element("b", duration(total)));
  at("status").replaceChildren(whole, " ", ...steps.flatMap((step) => [step, " "]));
  showTimes(Object.values(STEPS).map((name) => timings[name]), total);
  const top = Math.max(1, results[0]?.score);
  at("results").replaceChildren(...results.map((result, number) => card(result, number + 1, top)));
  for (const text of document.querySelectorAll(".text:not([hidden])"))
    text.nextElementSibling.hidden = text.scrollHeight <= text.clientHeight + 1;
}

function showTimes(steps, total) {
  const parts = [...steps, Math.max(0, total - steps.reduce((sum, one) => sum + one, 0))];
  at("times").hidden = false;
  [...at("times").children].forEach((bar, number) => (bar.style.flexGrow = parts[number]));
}

function card(result, rank, top) {
  const { text, image } = result.document;
  const item = at("result").content.cloneNode(true).firstElementChild;
  const part = (selector) => item.querySelector(selector);
  const kind = KINDS[result.modality] ?? result.modality;
  part(".rank").textContent = rank;
  part(".kind").textContent = ` (${kind} from ${result.source})`;
  if (image) Object.assign(part("img"), { src: image, alt: text || result.id, hidden: false });
  if (text) Object.assign(part(".text"), { textContent: text, hidden: false });
  item.classList.toggle("words", !image);
  measure(part(".score"), result.score, result.score / top);
  if (result.rerank_score !== null) measure(part(".yes"), result.rerank_score, result.rerank_score);
  part(".meta").textContent = [result.source, kind, result.id].join(" · ");
  part(".like .hidden").textContent = ` (result ${rank})`;
  part(".like").addEventListener("click", () => moreLike(result));
  part(".more").addEventListener("click", ({ target }) => {
    const whole = part(".text").classList.toggle("whole");
    target.ariaExpanded = whole;
    target.textContent = whole ? "less" : "more";
  });
  return item;
}

function measure(row, value, share) {
  row.hidden = false;
  row.querySelector("dd").textContent = value.toFixed(3);
  row.querySelector("i").style.setProperty("--share", Math.min(1, Math.max(0, share)));
}

function offerSources(names) {
  const known = [...form.querySelectorAll("[name=source]")].map((box) => box.value);
  for (const name of new Set(names).difference(new Set(known))) {
    const chip = at("chip").content.cloneNode(true).firstElementChild;
    chip.firstElementChild.value = name;
    chip.append(name);
    at("sources").append(chip);
    at("sources").hidden = false;
  }
}

const element = (tag, textContent, className = "") => Object.assign(document.createElement(tag), { textContent, className });
const counted = (number) => `${number || "No"} ${number === 1 ? "result" : "results"}`;

function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

// Pictures.

function showPicture(given) {
  picture = given;
  at("preview").hidden = !given;
  fields.file.value = "";
  if (given) Object.assign(at("preview").firstElementChild, { src: given.uri, alt: `The query's picture: ${given.name}` });
}

async function takePicture(file) {
  try {
    const uri = await smaller(file);
    showPicture({ uri, name: file.name });
    submit();
  } catch {
    complain(`${file.name}: the browser cannot read this as a picture; take a PNG, JPEG, WebP or GIF file`);
  }
}

/** The file as a data URI; drawn anew where it is large, or of a type that the service may not read. */
async function smaller(file) {
  const drawn = new Image();
  drawn.src = URL.createObjectURL(file);
  try {
    await drawn.decode();
    const scale = Math.min(1, LONGEST_SIDE / Math.max(drawn.naturalWidth, drawn.naturalHeight));
    if (scale === 1 && SENT_AS_IS.includes(file.type)) return await asUri(file);
    const [width, height] = [drawn.naturalWidth, drawn.naturalHeight].map((side) => Math.round(side * scale) || 1);
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(drawn, 0, 0, width, height);
    return canvas.toDataURL("image/webp", 0.9);
  } finally {
    URL.revokeObjectURL(drawn.src);
  }
}

function asUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function takeFirstPicture(transfer) {
  const file = [...transfer.files].find(({ type }) => type.startsWith("image/")) ?? transfer.files[0];
  if (file) takePicture(file);
}

function removePicture() {
  showPicture(null);
  fields.text.focus();
  submit();
}

function moreLike({ id, document: { text, image } }) {
  fields.text.value = text ?? "";
  fields.instruction.value = ""; // it was said of another query
  showPicture(image ? { uri: image, name: text || id } : null);
  scrollTo({ top: 0 });
  at("answer-title").focus({ preventScroll: true }); // the button is about to go
  submit();
}

// Hands and keys.

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (matchMedia("(pointer: coarse)").matches) document.activeElement.blur(); // the keyboard covers the results
  submit();
});
form.addEventListener("change", ({ target }) => {
  if (target === fields.file) takeFirstPicture(target);
  else if (target !== fields.text && remember(readForm())) search();
});
at("remove").addEventListener("click", removePicture);
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("apiKey", at("key-field").value);
  at("key").hidden = true;
  fields.text.focus();
  begin();
});
addEventListener("popstate", restore);

addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return; // words go where the cursor is
  event.preventDefault();
  takeFirstPicture(event.clipboardData);
});
const carriesFiles = (event) => event.dataTransfer.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  form.classList.add("over");
});
addEventListener("dragleave", (event) => event.relatedTarget || form.classList.remove("over"));
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  form.classList.remove("over");
  takeFirstPicture(event.dataTransfer);
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && picture && event.target !== fields.instruction) removePicture();
  else if (event.key === "/" && !event.target.matches("input:not([type=checkbox], [type=file]), select")) {
    event.preventDefault();
    fields.text.focus();
    fields.text.select();
  } else if (event.key.startsWith("Arrow")) walk(event);
});

/** Arrow keys: from the search field into the results, and from card to card as they lie on the screen. */
function walk(event) {
  const cards = [...at("results").querySelectorAll(".card:not(.waiting)")];
  const here = cards.findIndex((card) => card.contains(event.target));
  const columns = getComputedStyle(at("results")).gridTemplateColumns.split(" ").length;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  let next = null;
  if (here >= 0) next = cards[here + by]?.querySelector(".like") ?? (event.key === "ArrowUp" ? fields.text : null);
  else if (event.target === fields.text && event.key === "ArrowDown") next = cards[0]?.querySelector(".like");
  if (!next) return;
  event.preventDefault();
  next.focus();
}

writeForm(fromAddress());
begin();
