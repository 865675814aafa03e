"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const viewer = get("viewer"), stage = get("stage"), slider = get("slider");
  const left = get("viewer-left"), right = get("viewer-right");
  const leftMethod = get("left-method"), rightMethod = get("right-method");
  let model = "", prompt = 0, opener = null;

  const shots = (ofModel, ofPrompt) =>
    [...document.querySelectorAll(`.shot[data-model="${ofModel}"]`)].filter((shot) => Number(shot.dataset.prompt) === ofPrompt);
  const shotOf = (method) => shots(model, prompt).find((shot) => shot.dataset.method === method);

  function showHalf(image, method) {
    const shot = shotOf(method);
    const source = shot.querySelector("img");
    image.src = source.src;
    image.alt = source.alt;
    image.classList.toggle("hard", source.classList.contains("hard"));
    stage.style.setProperty("--ratio", `${source.getAttribute("width")} / ${source.getAttribute("height")}`);
    stage.style.setProperty("--wide", Number(source.getAttribute("width")) / Number(source.getAttribute("height")));
  }

  function show() {
    showHalf(left, leftMethod.value);
    showHalf(right, rightMethod.value);
    opener = shotOf(rightMethod.value);
    get("viewer-prompt").textContent = `${get(model).dataset.name}: ${opener.dataset.text}`;
    slide();
  }

  function slide() {
    stage.style.setProperty("--at", `${slider.value}%`);
  }

  function fill(select, chosen) {
    select.replaceChildren(
      ...shots(model, prompt).map((shot) => new Option(shot.dataset.title, shot.dataset.method, false, shot.dataset.method === chosen)),
    );
  }

  function open(shot) {
    model = shot.dataset.model;
    prompt = Number(shot.dataset.prompt);
    const methods = shots(model, prompt).map((other) => other.dataset.method);
    const chosen = shot.dataset.method;
    fill(leftMethod, methods[0]);
    fill(rightMethod, chosen === methods[0] && methods.length > 1 ? methods[1] : chosen);
    slider.value = 50;
    show();
    viewer.showModal();
    get("viewer-next").focus();
  }

  function step(by) {
    const count = rightMethod.options.length;
    rightMethod.selectedIndex = (rightMethod.selectedIndex + by + count) % count;
    show();
  }

  function stepPrompt(by) {
    const count = new Set([...document.querySelectorAll(`.shot[data-model="${model}"]`)].map((shot) => shot.dataset.prompt)).size;
    prompt = (prompt + by + count) % count;
    show();
  }

  document.addEventListener("click", (event) => {
    const shot = event.target.closest(".shot");
    if (shot) open(shot);
  });
  slider.addEventListener("input", slide);
  leftMethod.addEventListener("change", show);
  rightMethod.addEventListener("change", show);
  get("viewer-close").addEventListener("click", () => viewer.close());
  get("viewer-next").addEventListener("click", () => step(1));
  get("viewer-previous").addEventListener("click", () => step(-1));
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => opener && opener.focus());
  viewer.addEventListener("keydown", (event) => {
    const own = event.target === slider || event.target.tagName === "SELECT"; // these elements handle the arrow keys themselves
    const act = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => stepPrompt(1), ArrowUp: () => stepPrompt(-1) }[event.key];
    if (!act || own) return;
    event.preventDefault();
    act();
  });

  function showAlone(legend, method) {
    const plots = legend.parentElement.querySelector(".plots");
    plots.classList.toggle("alone", method !== undefined);
    plots.querySelectorAll('g[id*="-of-"]').forEach((group) => group.classList.toggle("lit", group.id.includes(`-of-${method}-`)));
  }
  document.querySelectorAll(".of-plots").forEach((legend) => {
    const pressed = () => legend.querySelector('[aria-pressed="true"]')?.dataset.method;
    legend.querySelectorAll("button").forEach((button) => {
      button.addEventListener("pointerenter", () => showAlone(legend, button.dataset.method));
      button.addEventListener("pointerleave", () => showAlone(legend, pressed()));
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        legend.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", String(on && other === button)));
        showAlone(legend, pressed());
      });
    });
  });

  const theme = get("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const setTheme = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    theme.textContent = dark ? "Light" : "Dark";
    theme.setAttribute("aria-pressed", String(dark));
  };
  theme.addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  setTheme(prefersDark);
})();
