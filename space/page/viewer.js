// The viewer draws everything from two images, the photo and its soft mask. So color, threshold and split change at once,
// without the server. `element`, `props`, `trigger` and `watch` come from gradio.
const root = element.querySelector(".uc");
const find = (selector) => root.querySelector(selector);
const canvas = find(".uc-drawn");
const ink = find(".uc-ink"); // lies on top, in the resolution of the screen
const context = canvas.getContext("2d", { willReadFrequently: true });
const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

const STAGE_MILLISECONDS = 900;
const REVEAL_MILLISECONDS = 1100;
const DARK = [18, 22, 21]; // around a revealed object
const KEPT_LIGHT = 0.26; // of the pixels around it

let result = null; // from the server
let pixels = null; // of the photo, RGBA
let mask = null; // 0 to 255, one value per pixel
let stages = null;
let clock = null; // of an animation
let turns = 0; // number of answers so far

const read = async (address) => {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
};

const dataOf = (image) => {
  const sheet = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
  sheet.drawImage(image, 0, 0);
  return sheet.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data;
};

const view = () => root.dataset.view;
const split = find(".uc-split");
const threshold = find(".uc-threshold");
const strength = find(".uc-strength");
const color = find(".uc-color");
const stage = find(".uc-stage");
const play = find(".uc-play");

// Share of the object in a pixel, by mask value. Threshold 0 keeps it soft, any other makes it 0 or 1.
const shares = () => {
  const table = new Float32Array(256);
  const limit = (Number(threshold.value) / 100) * 255;
  for (let value = 0; value < 256; value++) table[value] = limit === 0 ? value / 255 : Number(value > limit);
  return table;
};

const draw = () => {
  if (!pixels) return;
  const { width, height } = canvas;
  const drawn = context.createImageData(width, height);
  const out = drawn.data;
  const table = shares();
  const mode = view();
  const tint = [1, 3, 5].map((at) => parseInt(color.value.slice(at, at + 2), 16));
  const alpha = Number(strength.value) / 100;
  const edge = (Number(split.value) / 100) * width;
  for (let at = 0, index = 0; index < mask.length; index++, at += 4) {
    const [r, g, b] = [pixels[at], pixels[at + 1], pixels[at + 2]];
    out[at + 3] = 255;
    if (mode === "mask") {
      out[at] = out[at + 1] = out[at + 2] = 255 * table[mask[index]];
    } else if (mode === "overlay") {
      const weight = alpha * table[mask[index]];
      out[at] = r + weight * (tint[0] - r);
      out[at + 1] = g + weight * (tint[1] - g);
      out[at + 2] = b + weight * (tint[2] - b);
    } else if (mode === "reveal" && index % width >= edge) {
      const share = mask[index] / 255;
      const gray = KEPT_LIGHT * (0.299 * r + 0.587 * g + 0.114 * b);
      out[at] = share * r + (1 - share) * (gray + (1 - KEPT_LIGHT) * DARK[0]);
      out[at + 1] = share * g + (1 - share) * (gray + (1 - KEPT_LIGHT) * DARK[1]);
      out[at + 2] = share * b + (1 - share) * (gray + (1 - KEPT_LIGHT) * DARK[2]);
    } else {
      out[at] = r;
      out[at + 1] = g;
      out[at + 2] = b;
      if (mode === "cutout") out[at + 3] = 255 * table[mask[index]];
    }
  }
  context.putImageData(drawn, 0, 0);
  if (mode === "targets") drawBoxes();
  root.style.setProperty("--split", `${split.value}%`);
};

const drawBoxes = () => {
  const unit = devicePixelRatio;
  ink.width = canvas.clientWidth * unit;
  ink.height = canvas.clientHeight * unit;
  const pen = ink.getContext("2d");
  const scale = ink.width / result.width;
  pen.font = `600 ${13 * unit}px system-ui, sans-serif`;
  result.boxes.forEach((box, index) => {
    // Around the part, not on it: a target may be a single pixel.
    const gap = 3 * unit;
    const [x, y] = [box.x * scale - gap, box.y * scale - gap];
    const [width, height] = [box.width * scale + 2 * gap, box.height * scale + 2 * gap];
    for (const [line, color] of [[4, "#06110f"], [2, "#2dd4bf"]]) {
      pen.lineWidth = line * unit;
      pen.strokeStyle = color;
      pen.strokeRect(x, y, width, height);
    }
    if (index >= 9) return; // more numbers would cover the image
    const label = String(index + 1);
    const wide = pen.measureText(label).width + 8 * unit;
    const left = Math.min(Math.max(x, 0), ink.width - wide);
    const top = y > 20 * unit ? y - 19 * unit : Math.min(y + height + unit, ink.height - 18 * unit);
    pen.fillStyle = "#2dd4bf";
    pen.fillRect(left, top, wide, 18 * unit);
    pen.fillStyle = "#06110f";
    pen.fillText(label, left + 4 * unit, top + 13.5 * unit);
  });
};

const listBoxes = () => {
  const list = find(".uc-boxes");
  list.replaceChildren(
    ...result.boxes.map((box) => {
      const item = document.createElement("li");
      item.textContent = `${box.area.toLocaleString("en")} px at ${box.x}, ${box.y}`;
      return item;
    }),
  );
  list.dataset.empty = result.boxes.length ? "" : "Nothing has a probability above 50%.";
};

const facts = () => {
  const percent = 100 * result.share;
  const found =
    percent === 0
      ? "Nothing found above 50%"
      : `Object: ${percent < 0.1 ? "under 0.1" : percent.toFixed(1)}% of the image`;
  const took = result.seconds < 10 ? result.seconds.toFixed(2) : result.seconds.toFixed(0);
  const items = [found, `${result.width} × ${result.height} px`, `${took} s on ${result.device}`, result.model];
  find(".uc-facts").replaceChildren(
    ...items.map((text) => Object.assign(document.createElement("span"), { textContent: text })),
  );
};

const stop = () => {
  clearInterval(clock);
  clock = null;
  play.textContent = "Play";
};

const animate = (milliseconds, step) => {
  cancelAnimationFrame(animate.frame);
  const started = performance.now();
  const next = (now) => {
    const share = Math.min(1, (now - started) / milliseconds);
    step(1 - (1 - share) ** 3);
    if (share < 1) animate.frame = requestAnimationFrame(next);
  };
  animate.frame = requestAnimationFrame(next);
};

const reveal = () => {
  if (calm || view() !== "reveal") return draw();
  animate(REVEAL_MILLISECONDS, (share) => {
    split.value = 100 - 62 * share;
    draw();
  });
};

const showStage = () => {
  if (!stages) return;
  const maps = stages[Number(stage.value)];
  for (const figure of root.querySelectorAll("[data-map]")) {
    const kind = figure.dataset.map;
    const image = figure.querySelector("img");
    figure.toggleAttribute("data-none", !maps[kind]);
    if (maps[kind]) image.src = maps[kind];
    image.alt = maps[kind] ? `${kind} at stage ${stage.value}` : "";
  }
  tell(stage);
};

const playStages = () => {
  if (!stages && result) return unfold();
  if (!stages || clock) return stop();
  stage.value = 0;
  showStage();
  play.textContent = "Stop";
  clock = setInterval(() => {
    stage.value = Number(stage.value) + 1;
    showStage();
    if (Number(stage.value) >= stages.length - 1) stop();
  }, STAGE_MILLISECONDS);
};

const unfold = () => {
  props.stages = null;
  takeStages();
  trigger("unfold");
};

const takeStages = () => {
  const answer = props.stages?.answer || null;
  const failed = answer?.error;
  stages = failed ? null : answer;
  find(".uc-waiting").textContent = failed || "Unfolding…";
  find(".uc-maps").toggleAttribute("data-ready", Boolean(stages));
  stage.disabled = !stages;
  play.disabled = !stages && !failed;
  if (!stages) return;
  stage.max = stages.length - 1;
  stage.value = stages.length - 1;
  showStage();
  if (!calm && view() === "unfold") playStages();
};

const tell = (input) => {
  const output = input.parentElement.querySelector("output");
  if (!output) return;
  if (input === stage) output.textContent = stages ? `${stage.value} of ${stages.length - 1}` : "–";
  else output.textContent = input === threshold && input.value === "0" ? "soft" : `${input.value}%`;
};

const choose = (name) => {
  root.dataset.view = name;
  find(`input[name="uc-view"][value="${name}"]`).checked = true;
  stop();
  cancelAnimationFrame(animate.frame);
  if (name === "unfold" && result && !stages) unfold();
  else if (name === "unfold" && !calm) playStages();
  draw();
};

const show = async () => {
  const value = props.value && typeof props.value === "object" ? props.value : null;
  stages = null;
  props.stages = null;
  takeStages();
  stop();
  const usable = value && !value.error;
  find('input[value="unfold"]').disabled = usable ? !value.unfolds : true;
  if (!usable) {
    turns++;
    result = pixels = mask = null;
    root.dataset.state = value ? "error" : "empty";
    find(".uc-reason").textContent = value ? value.error : "";
    find(".uc-facts").replaceChildren();
    return;
  }
  const turn = ++turns;
  const [photo, gray] = await Promise.all([read(value.image), read(value.mask)]);
  if (turn !== turns) return; // a newer answer has arrived
  const first = !result;
  result = value;
  canvas.width = photo.naturalWidth;
  canvas.height = photo.naturalHeight;
  pixels = dataOf(photo);
  mask = dataOf(gray).filter((_, index) => index % 4 === 0);
  root.style.setProperty("--ratio", canvas.width / canvas.height);
  root.dataset.state = "result";
  listBoxes();
  facts();
  // Keep a view that the visitor chose. Otherwise open the first result in the view of its use.
  if (first && !root.dataset.chosen) choose(value.view);
  else if (view() === "unfold") choose(value.unfolds ? "unfold" : value.view);
  reveal();
  // On a phone the result is below the form.
  const { top, bottom } = root.getBoundingClientRect();
  if (top > 0.6 * innerHeight || bottom < 0) root.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
};

for (const input of root.querySelectorAll('input[name="uc-view"]')) {
  input.addEventListener("change", () => {
    root.dataset.chosen = "yes";
    choose(input.value);
    reveal();
  });
}
for (const input of [split, threshold, strength, color]) {
  input.addEventListener("input", () => {
    if (input === split) cancelAnimationFrame(animate.frame);
    tell(input);
    draw();
  });
}
for (const input of root.querySelectorAll('input[name="uc-ground"]')) {
  input.addEventListener("change", () => {
    root.dataset.ground = input.value === "checks" ? "checks" : "plain";
    root.style.setProperty("--ground", input.value);
  });
}
stage.addEventListener("input", () => {
  stop();
  showStage();
});
play.addEventListener("click", playStages);
new ResizeObserver(() => view() === "targets" && draw()).observe(canvas);

const asked = new URLSearchParams(location.search);
if (asked.get("url") || asked.get("network")) trigger("open", { url: asked.get("url"), network: asked.get("network") });

watch("value", show);
watch("stages", takeStages);
show();
