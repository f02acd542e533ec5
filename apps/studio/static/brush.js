// The mask brush: draws on a canvas over the image and hands the mask over as a PNG in a hidden text field.
// Everything listens on the document, because the page redraws its parts.
(() => {
  // Stripes of three tones, of which some stand out from an image of any colour, and from each other.
  const STRIPES = [["#d9603a", 6], ["#1d1b22", 2], ["#ffffff", 2]];  // CSS pixels, along the x axis
  const FINE = 2;  // pixels of the pattern to a CSS pixel
  const KEPT_BYTES = 96 << 20;  // of pixels for undo and redo
  const MOST_TEXT = 3_900_000;  // characters of a mask; the server takes 4,000,000
  const HALF = 128;  // from which on a pixel counts as marked
  let drawing = false, erasing = false, last = null, before = null, touched = null;
  const past = [], future = [];

  const canvas = () => document.querySelector("#source .brush canvas");
  const isOpen = () => document.querySelector("#workspace")?.dataset.tab === "inpaint";
  const slider = () => document.querySelector("#brush-size");
  const radius = (target) => (slider()?.value ?? 12) / 200 * Math.min(target.width, target.height);
  const say = (text) => { const note = document.querySelector("#brush-note"); if (note) note.textContent = text; };

  const place = (event, target) => {
    const box = target.getBoundingClientRect();
    return [(event.clientX - box.left) * target.width / box.width, (event.clientY - box.top) * target.height / box.height];
  };

  // Slanted stripes, as wide on the screen whatever the size of the image.
  const colour = (target) => {
    const tile = document.createElement("canvas"), side = STRIPES.reduce((sum, [, width]) => sum + width, 0);
    const scale = target.width / (target.offsetWidth || target.width);
    tile.width = tile.height = side * FINE;
    const pixels = tile.getContext("2d");
    for (let y = 0; y < tile.height; y++) {
      let x = y;
      for (const [tone, width] of STRIPES) {
        pixels.fillStyle = tone;
        for (let i = 0; i < width * FINE; i++, x++) pixels.fillRect(x % tile.width, y, 1, 1);
      }
    }
    const pattern = target.getContext("2d").createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(scale / FINE));
    return pattern;
  };

  const stroke = (target, from, to) => {
    const paint = target.getContext("2d"), reach = radius(target) + 2;
    paint.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    paint.strokeStyle = colour(target);
    paint.lineWidth = 2 * radius(target);
    paint.lineCap = paint.lineJoin = "round";
    paint.beginPath();
    paint.moveTo(...from);
    paint.lineTo(to[0] + 0.01, to[1]);
    paint.stroke();
    for (const [x, y] of [from, to]) {
      touched = [Math.min(touched[0], x - reach), Math.min(touched[1], y - reach),
                 Math.max(touched[2], x + reach), Math.max(touched[3], y + reach)];
    }
  };

  // ------------------------------------------------------------------ undo and redo: only what a change touched is kept
  const begin = (target, whole) => {
    before = document.createElement("canvas");
    [before.width, before.height] = [target.width, target.height];
    before.getContext("2d").drawImage(target, 0, 0);
    touched = whole ? [0, 0, target.width, target.height] : [Infinity, Infinity, -Infinity, -Infinity];
  };

  const patch = (source, [left, top, right, bottom]) => ({
    left, top, pixels: source.getContext("2d").getImageData(left, top, right - left, bottom - top),
  });

  const end = (target) => {
    const box = [Math.max(Math.floor(touched[0]), 0), Math.max(Math.floor(touched[1]), 0),
                 Math.min(Math.ceil(touched[2]), target.width), Math.min(Math.ceil(touched[3]), target.height)];
    if (box[2] > box[0] && box[3] > box[1]) {
      past.push(patch(before, box));
      future.length = 0;
      let bytes = past.reduce((sum, one) => sum + one.pixels.data.length, 0);
      while (past.length > 1 && bytes > KEPT_BYTES) bytes -= past.shift().pixels.data.length;
    }
    before = touched = null;
    handOver(target);
  };

  const swap = (target, from, to) => {
    const one = from.pop();
    if (!one) return;
    to.push(patch(target, [one.left, one.top, one.left + one.pixels.width, one.top + one.pixels.height]));
    target.getContext("2d").putImageData(one.pixels, one.left, one.top);
    handOver(target);
  };

  // ------------------------------------------------------------------ what is handed over, and what is brought
  // Edges of strokes are smooth on the screen; a mask is not: half covered counts as covered.
  const plain = (target, share) => {
    const mask = document.createElement("canvas");
    [mask.width, mask.height] = [target.width, target.height].map((side) => Math.max(Math.round(side * share), 1));
    const paint = mask.getContext("2d");
    paint.imageSmoothingEnabled = false;
    paint.drawImage(target, 0, 0, mask.width, mask.height);
    const data = paint.getImageData(0, 0, mask.width, mask.height), words = new Uint32Array(data.data.buffer);
    let any = false;
    for (let i = 0; i < words.length; i++) {
      const on = words[i] >>> 24 >= HALF;  // little-endian: the last byte is alpha
      any ||= on;
      words[i] = on ? 0xffffffff : 0xff000000;
    }
    paint.putImageData(data, 0, 0);
    return any ? mask : null;
  };

  const handOver = (target) => {
    const field = document.querySelector("#mask textarea, #mask input");
    let text = plain(target, 1)?.toDataURL("image/png") ?? "";
    // A mask of any size in the shape of the image is understood; one of many small spots is handed over coarser.
    for (let share = 0.5; text.length > MOST_TEXT; share /= 2) text = plain(target, share)?.toDataURL("image/png") ?? "";
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };

  // Mark the pixels for which `keep` holds; it is given their red, green, blue and alpha.
  const fill = (target, keep) => {
    const paint = target.getContext("2d"), data = paint.getImageData(0, 0, target.width, target.height).data;
    const marked = paint.createImageData(target.width, target.height), words = new Uint32Array(marked.data.buffer);
    for (let i = 0; i < words.length; i++)
      words[i] = keep(data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]) ? 0xffffffff : 0;
    paint.putImageData(marked, 0, 0);
    paint.globalCompositeOperation = "source-in";
    paint.fillStyle = colour(target);
    paint.fillRect(0, 0, target.width, target.height);
    paint.globalCompositeOperation = "source-over";
  };

  // Draw a mask onto the canvas: white where to generate, or transparent where it is transparent anywhere.
  const show = (target, image) => {
    const paint = target.getContext("2d");
    paint.globalCompositeOperation = "copy";
    paint.imageSmoothingEnabled = false;
    paint.drawImage(image, 0, 0, target.width, target.height);
    paint.globalCompositeOperation = "source-over";
    const data = paint.getImageData(0, 0, target.width, target.height).data;
    let clear = false;
    for (let i = 3; i < data.length && !clear; i += 4) clear = data[i] < HALF;
    fill(target, (red, green, blue, alpha) => clear ? alpha < HALF : 0.3 * red + 0.59 * green + 0.11 * blue >= HALF);
  };

  const load = async (target, file, tools) => {
    let image = null;
    try {
      image = await createImageBitmap(file);
    } catch {
      return say(tools.dataset.unreadable);  // no image that this browser reads
    }
    const shape = Math.log(image.width / image.height * target.height / target.width);
    if (Math.abs(shape) > 0.02) say(tools.dataset.otherShape.replace("{mask}", `${image.width} \u00d7 ${image.height}`));
    else {
      say("");
      begin(target, true);
      show(target, image);
      end(target);
    }
    image.close();
  };

  const save = (target) => {
    const mask = plain(target, 1);
    if (!mask) return;
    const link = document.createElement("a");
    [link.href, link.download] = [mask.toDataURL("image/png"), "mask.png"];
    link.click();
  };

  // ------------------------------------------------------------------ tools, keys, pointers
  const whole = (keep) => (target) => { begin(target, true); fill(target, keep); end(target); };
  const choose = (erases) => () => {
    erasing = erases;
    for (const one of document.querySelectorAll("[data-tool=draw], [data-tool=erase]"))
      one.setAttribute("aria-pressed", String((one.dataset.tool === "erase") === erasing));
  };
  const TOOLS = {
    draw: choose(false),
    erase: choose(true),
    undo: (target) => swap(target, past, future),
    redo: (target) => swap(target, future, past),
    clear: whole(() => false),
    invert: whole((red, green, blue, alpha) => alpha < HALF),
    load: () => document.querySelector("#mask-file").click(),
    save,
  };

  const resize = (factor) => {
    const one = slider();
    if (!one) return;
    const step = Math.max(1, Math.round(one.value * Math.abs(factor - 1)));
    one.value = Number(one.value) + (factor > 1 ? step : -step);
    one.dispatchEvent(new Event("input", { bubbles: true }));
  };

  const giveUp = () => {  // two fingers zoom: what the first one drew meanwhile goes
    if (!drawing) return;
    drawing = false;
    const target = canvas(), paint = target.getContext("2d");
    paint.globalCompositeOperation = "copy";
    paint.drawImage(before, 0, 0);
    paint.globalCompositeOperation = "source-over";
    before = touched = null;
  };
  window.tesseraBrush = { canvas, isOpen, place, radius, resize, giveUp };

  document.addEventListener("pointerdown", (event) => {
    const target = event.target.closest?.("#source .brush canvas");
    if (!target || !isOpen() || event.button !== 0 || target.closest(".brush").dataset.panning) return;
    event.preventDefault();
    target.focus({ preventScroll: true });
    target.setPointerCapture(event.pointerId);
    begin(target, false);
    drawing = true;
    last = place(event, target);
    stroke(target, last, last);
  });
  document.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    const target = canvas();
    for (const one of event.getCoalescedEvents?.() ?? [event]) {
      const here = place(one, target);
      stroke(target, last, here);
      last = here;
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) document.addEventListener(kind, () => {
    if (!drawing) return;
    drawing = false;
    end(canvas());
  });

  document.addEventListener("click", (event) => {
    const tool = event.target.closest?.("[data-tool]"), target = canvas();
    if (!tool || !(tool.dataset.tool in TOOLS) || !target) return;
    say("");
    TOOLS[tool.dataset.tool](target);
  });
  document.addEventListener("change", (event) => {
    if (event.target.id !== "mask-file" || !event.target.files.length || !canvas()) return;
    load(canvas(), event.target.files[0], event.target.closest(".tools"));
    event.target.value = "";  // the same file may be chosen again
  });
  document.addEventListener("keydown", (event) => {
    if (!isOpen() || !canvas() || event.target.closest?.("input:not([type=range]), textarea, [contenteditable]")) return;
    const undoes = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
    if (undoes && (key === "z" || key === "y")) TOOLS[key === "y" || event.shiftKey ? "redo" : "undo"](canvas());
    else if (!undoes && key === "[") resize(0.85);
    else if (!undoes && key === "]") resize(1.18);
    else return;
    event.preventDefault();
  });

  // A mask that the server brings (settings of an image) is drawn onto the canvas.
  new MutationObserver(() => {
    const target = canvas();
    if (!target || target.dataset.ready) return;
    target.dataset.ready = "1";
    past.length = future.length = 0;
    say("");
    document.dispatchEvent(new CustomEvent("tessera-source"));
    if (!target.dataset.mask) return;
    const mask = new Image();
    mask.onload = () => show(target, mask);
    mask.src = target.dataset.mask;
  }).observe(document, { childList: true, subtree: true });

  // Dropping a file onto the source, or onto an end of a clip, hands it to the button that chooses one there.
  const zone = (event) => event.target.closest?.("#source, #ends .end");
  document.addEventListener("dragover", (event) => { if (zone(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const input = zone(event)?.querySelector("input[type=file]:not(#mask-file)");
    if (!input || !event.dataTransfer.files.length) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
})();
