// The page around the renderer: one object, or many with cards and two panes that share one camera.
const ITEMS = JSON.parse(document.getElementById("items").textContent);
const element = id => document.getElementById(id), tools = element("tools");
const view = {...START}, state = {mode: "colour", dark: false, turning: false, compare: false, active: 0};
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

class Pane {
  constructor(section) {
    this.section = section;
    for (const name of ["canvas", ".still", ".input", ".choice", ".problem"])
      this[name.replace(".", "")] = section.querySelector(name);
    ITEMS.forEach((item, i) => this.choice.add(new Option(item.name, i)));
    this.choice.hidden = ITEMS.length < 2;
    this.choice.addEventListener("change", () => this.show(+this.choice.value));
    control(this.canvas);
  }

  async show(index) {
    const item = this.item = ITEMS[index];
    this.choice.value = index;
    this.canvas.setAttribute("aria-label",
      `${item.name}: 3D view; drag or arrow keys to turn, plus and minus to zoom`);
    this.ready = false;
    this.still.style.backgroundImage = item.views ? `url(${item.views.source})` : "";
    if (item.input) this.input.src = item.input;
    follow();
    try {
      this.renderer ??= new Renderer(this.canvas);
      if (item.splats) item.scene ??= unpack(await decoded(element(item.splats.id).textContent), item.splats);
    } catch (error) {
      this.problem.hidden = false;
      this.problem.textContent = item.views
        ? `Pictures only: this browser cannot draw splats (${error.message}).`
        : `This page needs WebGL 2 and DecompressionStream, which this browser does not offer (${error.message}).`;
      return;
    }
    if (this.item !== item) return;   // another was chosen while this one was decoded
    if (item.splats) this.renderer.show(item.scene);
    this.ready = Boolean(item.splats);
    redraw();
  }

  draw(ground) {
    const side = Math.min(this.canvas.clientWidth, this.canvas.clientHeight);
    if (this.renderer && (this.ready || !this.item.views)) this.renderer.draw(view, state.mode, ground);
    this.still.hidden = this.ready || !this.item.views;
    if (!this.still.hidden) {         // the nearest picture of the turn
      const {count} = this.item.views, k = Math.round(view.azimuth / 360 * count) % count;
      const shown = side * START.distance / view.distance;
      Object.assign(this.still.style, {width: `${shown}px`, height: `${shown}px`, backgroundSize: `${100 * count}% 100%`,
        backgroundPosition: `${count > 1 ? 100 * ((k + count) % count) / (count - 1) : 0}% 0`});
    }
    const share = +element("blend").querySelector("input").value;
    this.input.hidden = !(this.item.input && share > 0 && isSource(this.item));
    Object.assign(this.input.style, {width: `${side}px`, height: `${side}px`, opacity: share});
  }
}

const isSource = item => Math.abs(view.azimuth) < 0.01 && Math.abs(view.elevation - item.elevation) < 0.01
  && Math.abs(view.distance - START.distance) < 0.01;

// ---------------------------------------------------------------- what moves the camera

function turn(x, y) {                 // pixels
  view.azimuth = (view.azimuth - 0.4 * x) % 360;
  view.elevation = clamp(view.elevation + 0.4 * y, -89, 89);
  redraw();
}

function zoom(factor) {
  view.distance = clamp(view.distance * factor, 0.4 * START.distance, 6 * START.distance);
  redraw();
}

function reset() {
  Object.assign(view, START);
  redraw();
}

function toSource() {                 // where the input of the active object was seen from
  Object.assign(view, START, {azimuth: 0, elevation: panes[state.active].item.elevation});
  press("turn", state.turning = false);
  redraw();
}

function control(canvas) {
  const pointers = new Map();
  const spread = () => { const [a, b] = [...pointers.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, {x: event.clientX, y: event.clientY});
    if (element("note")) element("note").hidden = true;
  });
  canvas.addEventListener("pointermove", event => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pointers.size === 2 ? spread() : 0, x = event.clientX - last.x, y = event.clientY - last.y;
    pointers.set(event.pointerId, {x: event.clientX, y: event.clientY});
    if (pointers.size === 1) turn(x, y);
    if (pointers.size === 2) zoom(before / Math.max(1, spread()));
  });
  for (const kind of ["pointerup", "pointercancel"])
    canvas.addEventListener(kind, event => pointers.delete(event.pointerId));
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.03 : 0.001)));      // lines or pixels
  }, {passive: false});
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("keydown", event => {
    const step = {ArrowLeft: [12, 0], ArrowRight: [-12, 0], ArrowUp: [0, 12], ArrowDown: [0, -12]}[event.key];
    if (step) { event.preventDefault(); turn(...step); }
  });
  canvas.addEventListener("focus", () => { state.active = panes.findIndex(pane => pane.canvas === canvas); });
}

// ---------------------------------------------------------------- what else can be pressed

const press = (id, on) => element(id).setAttribute("aria-pressed", on);

const ACTIONS = {
  turn: () => { press("turn", state.turning = !state.turning); spin(); },
  source: toSource,
  compare: () => {
    press("compare", state.compare = !state.compare);
    panes[1].section.hidden = !state.compare;
    if (state.compare && !panes[1].item) panes[1].show(Math.min(1, ITEMS.length - 1));
    state.active = +state.compare;
    follow();
  },
  dark: () => {
    press("dark", state.dark = !state.dark);
    document.documentElement.classList.toggle("dark", state.dark);
    redraw();
  },
  closer: () => zoom(0.9),
  farther: () => zoom(1 / 0.9),
  reset,
};
const KEYS = {" ": "turn", s: "source", c: "compare", b: "dark", "+": "closer", "-": "farther"};

function setMode(mode) {
  element("mode").value = state.mode = mode;
  redraw();
}

function spin(last = performance.now()) {        // 30 degrees a second
  requestAnimationFrame(now => {
    if (!state.turning) return;
    view.azimuth = (view.azimuth + 0.03 * (now - last)) % 360;
    redraw();
    spin(now);
  });
}

function cards() {
  for (const [i, item] of ITEMS.entries()) {
    const card = document.createElement("button"), pictures = document.createElement("span");
    card.className = "card";
    pictures.className = "pictures";
    if (item.input) pictures.append(Object.assign(new Image(), {src: item.input, alt: ""}));
    if (item.views) {
      const strip = document.createElement("span");
      strip.className = "strip";
      strip.style.backgroundImage = `url(${item.views.source})`;
      strip.style.setProperty("--count", item.views.count);
      pictures.append(strip);
    }
    card.append(pictures, item.name);
    if (item.caption) card.append(Object.assign(document.createElement("small"), {textContent: item.caption}));
    card.addEventListener("click", () => panes[state.active].show(i));
    element("cards").append(card);
  }
  element("cards").hidden = element("compare").hidden = false;
  document.body.classList.add("many");
}

function follow() {                   // the controls show what the panes hold
  const shown = panes.filter(pane => pane.item && !pane.section.hidden).map(pane => pane.item);
  [...element("cards").children].forEach((card, i) => card.setAttribute("aria-pressed", shown.includes(ITEMS[i])));
  element("blend").hidden = !shown.some(item => item.input);
  redraw();
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const ground = state.dark ? [22 / 255, 24 / 255, 29 / 255] : [1, 1, 1];
    for (const pane of panes) if (pane.item && !pane.section.hidden) pane.draw(ground);
    element("angles").textContent = `${Math.round((view.azimuth + 360) % 360)}\u00b0, ${Math.round(view.elevation)}\u00b0 up`;
  });
}

// page.html#azimuth=30&elevation=10&distance=3.5&mode=depth&left=mug&right=mug+tiny opens like that
function followLink() {
  const link = new URLSearchParams(location.hash.slice(1)), named = name => ITEMS.findIndex(item => item.name === name);
  for (const [name, value] of link) if (name in view && Number.isFinite(+value)) view[name] = +value;
  if (MODES.includes(link.get("mode"))) setMode(link.get("mode"));
  if (named(link.get("left")) >= 0) panes[0].show(named(link.get("left")));
  if (named(link.get("right")) >= 0) {
    if (!state.compare) ACTIONS.compare();
    panes[1].show(named(link.get("right")));
  }
  redraw();
}

const panes = [...document.querySelectorAll(".pane")].map(section => new Pane(section));
if (ITEMS.length > 1) cards();
for (const [id, action] of Object.entries(ACTIONS)) element(id).addEventListener("click", action);
element("mode").addEventListener("change", event => setMode(event.target.value));
element("blend").addEventListener("input", () => { if (!isSource(panes[state.active].item)) toSource(); else redraw(); });
addEventListener("keydown", event => {
  if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.closest("button")) return;
  const action = KEYS[event.key], number = "1234".indexOf(event.key);
  if (action && !element(action).hidden) { event.preventDefault(); ACTIONS[action](); }
  if (number >= 0) setMode(MODES[number]);
});
new ResizeObserver(redraw).observe(element("stage"));
addEventListener("hashchange", followLink);
panes[0].show(0);
followLink();
