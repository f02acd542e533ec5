// Comparisons, in the studio and as pages of their own: a slider between the reference and one other, the difference of
// the two, clips that play in step. Everything listens on the document, because the studio redraws its parts.
(() => {
  const states = new WeakMap();

  const load = async (text) =>
    Promise.all(text.split(" ").map(async (source) => {
      const image = new Image();
      image.src = source;
      await image.decode();
      return image;
    }));

  // Pixels of a frame; clips show their last one where others are longer.
  const frameOf = (frames, index) => frames[Math.min(index, frames.length - 1)];
  const draw = (canvas, image) => {
    if (canvas.width !== image.naturalWidth) canvas.width = image.naturalWidth;
    if (canvas.height !== image.naturalHeight) canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context;
  };

  const difference = (canvas, first, second, gain) => {
    const one = draw(document.createElement("canvas"), first).getImageData(0, 0, first.naturalWidth, first.naturalHeight);
    const context = draw(canvas, second);
    const found = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < found.data.length; i++)
      found.data[i] = i % 4 === 3 ? 255 : Math.min(Math.abs(found.data[i] - one.data[i]) * gain, 255);
    context.putImageData(found, 0, 0);
  };

  const show = (section) => {
    const state = states.get(section);
    if (!state) return;
    const [left, right] = section.querySelectorAll(".cmp-view canvas"), view = section.querySelector(".cmp-view");
    const first = frameOf(state.frames[0], state.frame), second = frameOf(state.frames[state.other], state.frame);
    const isDifference = section.dataset.mode === "difference";
    draw(left, first);
    if (isDifference) difference(right, first, second, Number(section.querySelector(".cmp-gain input").value));
    else draw(right, second);
    const split = Number(view.querySelector("input").value);
    view.style.setProperty("--split", split);
    right.style.clipPath = isDifference ? "none" : `inset(0 0 0 ${split}%)`;
    view.querySelector(".cmp-right").textContent = state.labels[state.other];
    const gain = section.querySelector(".cmp-gain output");
    gain.textContent = `\u00d7${section.querySelector(".cmp-gain input").value}`;
    for (const [place, canvas] of state.cards) draw(canvas, frameOf(state.frames[place], state.frame));
    const time = section.querySelector(".cmp-frame input");
    if (time) time.value = state.frame;
    for (const button of section.querySelectorAll("[data-place]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.place) === state.other));
    for (const button of section.querySelectorAll("[data-mode-of]"))
      button.setAttribute("aria-pressed", String(button.dataset.modeOf === section.dataset.mode));
  };

  const begin = async (section) => {
    states.set(section, null);
    const images = [...section.querySelectorAll("img[data-place-of]")];
    const state = { frames: {}, labels: {}, cards: [], frame: 0, other: 0, count: Number(section.dataset.frames) };
    for (const image of images) {
      const place = Number(image.dataset.placeOf);
      state.frames[place] = await load(image.dataset.frames || image.src);
      state.labels[place] = image.alt;
      if (place && !state.other) state.other = place;
      if (state.frames[place].length > 1) {  // all clips are drawn by one clock
        const canvas = Object.assign(document.createElement("canvas"), { role: "img", ariaLabel: image.alt });
        image.replaceWith(canvas);
        state.cards.push([place, canvas]);
      }
    }
    states.set(section, state);
    section.dataset.ready = "";
    show(section);
    if (state.count > 1) play(section, !matchMedia("(prefers-reduced-motion: reduce)").matches);
  };

  const play = (section, wanted) => {
    const state = states.get(section), button = section.querySelector(".cmp-play");
    clearInterval(state.timer);
    state.timer = null;
    button.textContent = wanted ? button.dataset.pause : button.dataset.play;
    if (!wanted) return;
    state.timer = setInterval(() => {
      if (!section.isConnected) return clearInterval(state.timer);
      state.frame = (state.frame + 1) % state.count;
      show(section);
    }, 1000 / Number(section.dataset.fps));
  };

  document.addEventListener("click", (event) => {
    const section = event.target.closest?.(".cmp"), state = section && states.get(section);
    if (!state) return;
    const card = event.target.closest("[data-place]"), mode = event.target.closest("[data-mode-of]");
    if (card) state.other = Number(card.dataset.place);
    if (mode) section.dataset.mode = mode.dataset.modeOf;
    if (event.target.closest(".cmp-play")) play(section, !state.timer);
    show(section);
  });
  document.addEventListener("input", (event) => {
    const section = event.target.closest?.(".cmp"), state = section && states.get(section);
    if (!state) return;
    if (event.target.closest(".cmp-frame")) {
      play(section, false);
      state.frame = Number(event.target.value);
    }
    show(section);
  });

  const look = () => {
    for (const section of document.querySelectorAll(".cmp")) if (!states.has(section)) begin(section);
  };
  const watch = () => {
    look();
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
  };
  if (document.body) watch();
  else document.addEventListener("DOMContentLoaded", watch);
})();
