// The form holds the query, the URL fragment records it, and one request at a time answers it.

const LONGEST_SIDE = 1024; // pixels; larger pictures are scaled down before they are sent, and the models see fewer still
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // formats that the service reads
const KINDS = { text: "text", image: "picture", "image,text": "picture with text" };
const TIMINGS = { encode: "encode_ms", retrieve: "retrieve_ms", rerank: "rerank_ms" };
const PATIENCE_MS = 200; // faster responses replace the old results without a loading state

const at = (id) => document.getElementById(id);
const form = at("search");
const fields = form.elements;
let picture = null; // {uri, name} of the query's picture
let running = null; // AbortController of the request in progress
let first = ""; // the instruction that a new page begins with: the data's own for a text that looks for a picture
let chosen = false; // whether a person chose the instruction, or a link did
let service = null; // a promise, settled once the service's models and the data's instructions are known

// The query: in the form, in the URL, on the wire.

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
  setInstruction(query.instruction);
  offerSources(query.source);
  for (const name of ["modality", "source"])
    for (const box of form.querySelectorAll(`[name=${name}]`)) box.checked = query[name].includes(box.value);
  fields.rerank.checked = query.rerank;
  fields.top_k.value = query.topK;
  if (!fields.top_k.value) fields.top_k.selectedIndex = 0;
  showPicture(query.picture);
}

function setInstruction(instruction) {
  fields.instruction.value = instruction;
  at("instructions").value = instruction;
}

function chooseInstruction(instruction) {
  setInstruction(instruction);
  chosen = true;
}

function toAddress({ text, instruction, modality, source, rerank, topK }) {
  const pairs = [["text", text], ["instruction", instruction]].filter(([, value]) => value);
  pairs.push(...modality.map((value) => ["modality", value]), ...source.map((value) => ["source", value]));
  if (rerank) pairs.push(["rerank", "1"]);
  if (topK !== fields.top_k.options[0].value) pairs.push(["results", topK]);
  return `#${new URLSearchParams(pairs)}`;
}

function fromAddress() {
  const params = new URLSearchParams(location.hash.slice(1));
  return {
    text: params.get("text") ?? "",
    instruction: params.get("instruction") ?? (location.hash.length > 1 ? "" : first),
    picture: history.state?.picture ?? null, // not in the link, but the Back button restores it
    modality: params.getAll("modality"),
    source: params.getAll("source"),
    rerank: params.has("rerank"),
    topK: params.get("results") ?? fields.top_k.options[0].value,
  };
}

/** Record the query in the URL and history; returns whether it differs from the last one recorded. */
function remember(query) {
  const address = toAddress(query);
  if (address === (location.hash || "#") && query.picture?.uri === history.state?.picture?.uri) return false;
  history.pushState({ picture: query.picture }, "", address);
  return true;
}

function toRequest({ text, instruction, picture, modality, source, rerank, topK }) {
  const present = (entries) => Object.fromEntries(Object.entries(entries).filter(([, value]) => value?.length));
  return {
    query: present({ text, instruction, image: picture?.all ?? picture?.uri }),
    filter: present({ modality, source }),
    top_k: Number(topK),
    rerank: rerank && !fields.rerank.disabled,
    return_documents: true,
  };
}

// The service.

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...authorization() };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal })
    .catch((error) => {
      throw signal?.aborted ? error : new Error("The service is not responding. Is it running?");
    });
  const content = await response.text();
  if (response.ok) return JSON.parse(content);
  if (response.status === 401) askForKey();
  throw new Error(messageOf(response, content));
}

function authorization() {
  const key = sessionStorage.getItem("apiKey");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function messageOf(response, text) {
  let message = text || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {} // Serve's own errors are plain text
  return response.status === 404 ? `Search is not available: ${message}` : message;
}

function askForKey() {
  at("key").hidden = false;
  at("key-field").focus();
}

async function learnInstructions() {
  const { data } = await call("v1/instructions");
  const texts = [...new Set(data.map(({ instruction }) => instruction))];
  at("instructions").replaceChildren(new Option("no instruction", ""), ...texts.map((text) => new Option(text)));
  const forTexts = data.filter(({ query }) => query === "text");
  first = (forTexts.find(({ finds }) => finds === "image") ?? forTexts[0])?.instruction ?? "";
  setInstruction(chosen || picture ? fields.instruction.value : first);
}

async function learnModels() {
  const { data } = await call("v1/models");
  fields.rerank.disabled = data.length < 2; // the embedder comes first, then the reranker if there is one
  if (!fields.rerank.disabled) return;
  fields.rerank.checked = false;
  at("rerank-hint").textContent = "this service has no reranker";
}

// Searching.

async function submit() {
  await service; // it may set the instruction
  remember(readForm());
  search();
}

async function search() {
  running?.abort();
  const mine = (running = new AbortController());
  const query = readForm();
  document.title = `${query.text || (query.picture ? "picture" : "umarvel")} · search`;
  showError("");
  if (!query.text && !query.picture) return clear(true);
  const waiting = setTimeout(showWaiting, PATIENCE_MS, query);
  try {
    await service;
    const start = performance.now();
    const answer = await call("v1/search", toRequest(query), mine.signal);
    showAnswer(answer, performance.now() - start);
  } catch (error) {
    if (mine.signal.aborted) return;
    clear(false);
    showError(error.message);
  } finally {
    clearTimeout(waiting);
  }
}

function restore() {
  chosen = location.hash.length > 1;
  writeForm(fromAddress());
  search();
}

function begin() {
  service = Promise.allSettled([learnModels(), learnInstructions()]); // the first search reports what is wrong
  search();
}

// Showing.

function showError(message) {
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
  const measured = Object.entries(TIMINGS).filter(([, name]) => timings[name] >= 0.05);
  const parts = measured.map(([part, name]) => element("span", `${part} ${duration(timings[name])}`, part));
  const whole = element("span", `${counted(results.length)}${ofKinds(results)} in `);
  whole.append(element("b", duration(total)));
  at("status").replaceChildren(whole, " ", ...parts.flatMap((part) => [part, " "]));
  showTimes(Object.values(TIMINGS).map((name) => timings[name]), total);
  const top = Math.max(1, results[0]?.score);
  at("results").replaceChildren(...results.map((result, number) => card(result, number + 1, top)));
  for (const text of document.querySelectorAll(".text:not([hidden])"))
    text.nextElementSibling.hidden = text.scrollHeight <= text.clientHeight + 1;
}

function showTimes(times, total) {
  const parts = [...times, Math.max(0, total - times.reduce((sum, one) => sum + one, 0))];
  at("times").hidden = false;
  [...at("times").children].forEach((bar, number) => (bar.style.flexGrow = parts[number]));
}

function card(result, rank, top) {
  const { text } = result.document;
  const images = imagesOf(result.document);
  const item = at("result").content.cloneNode(true).firstElementChild;
  const part = (selector) => item.querySelector(selector);
  const kind = KINDS[result.modality] ?? result.modality;
  part(".rank").textContent = rank;
  part(".kind").textContent = ` (${kind} from ${result.source})`;
  const show = (uris) => part("img").replaceWith(...uris.map((uri) => picturing(uri, text || result.id)));
  if (images.length) show(images);
  else if (result.image_urls.length) fetchPictures(result).then(show, () => {});
  if (text) Object.assign(part(".text"), { textContent: text, hidden: false });
  item.classList.toggle("words", !images.length && !result.image_urls.length);
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

/** A document's pictures: none, one, or a list of them. */
const imagesOf = ({ image }) => [image ?? []].flat();

function picturing(uri, alt) {
  return Object.assign(element("img"), { src: uri, alt, loading: "lazy" });
}

/** Pictures that did not fit in the answer, as data URIs; a link in the page could not carry the key. */
async function fetchPictures(result) {
  const fetchOne = async (url) => {
    const response = await fetch(url, { headers: authorization() });
    if (!response.ok) throw new Error(response.statusText);
    return asUri(await response.blob());
  };
  return (result.document.image = await Promise.all(result.image_urls.map(fetchOne)));
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

/** How many of the results are texts, pictures …, if they are of several kinds. */
function ofKinds(results) {
  const numbers = Map.groupBy(results, ({ modality }) => KINDS[modality] ?? modality);
  if (numbers.size < 2) return "";
  return ` (${[...numbers].map(([kind, own]) => `${own.length} × ${kind}`).join(", ")})`;
}

function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

// Pictures.

function showPicture(shown) {
  picture = shown;
  at("preview").hidden = !shown;
  fields.file.value = "";
  if (shown) Object.assign(at("preview").firstElementChild, { src: shown.uri, alt: `The query's picture: ${shown.name}` });
}

async function takePicture(file) {
  try {
    const uri = await smaller(file);
    showPicture({ uri, name: file.name });
    if (!chosen) setInstruction("");
    submit();
  } catch {
    showError(`${file.name}: the browser cannot open this as a picture; use a PNG, JPEG, WebP or GIF file`);
  }
}

/** The file as a data URI; re-encoded if it is large, or of a type that the service may not read. */
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

function moreLike({ id, document: found }) {
  const images = imagesOf(found);
  fields.text.value = found.text ?? "";
  setInstruction(""); // it belonged to the previous query
  showPicture(images.length ? { uri: images[0], all: images, name: found.text || id } : null);
  scrollTo({ top: 0 });
  at("answer-title").focus({ preventScroll: true }); // the button is about to be removed
  submit();
}

// Mouse, touch and keyboard.

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (matchMedia("(pointer: coarse)").matches) document.activeElement.blur(); // the keyboard covers the results
  submit();
});
form.addEventListener("input", ({ target }) => target === fields.instruction && chooseInstruction(target.value));
form.addEventListener("change", ({ target }) => {
  if (target === at("instructions")) chooseInstruction(target.value);
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
  if (!event.clipboardData.files.length) return; // text is pasted at the cursor, as usual
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

/** Arrow keys: from the search field into the results, and from card to card as they are laid out. */
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

chosen = location.hash.length > 1;
writeForm(fromAddress());
begin();
