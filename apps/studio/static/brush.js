// The mask brush: paints on a canvas over the source picture and hands the mask over as a PNG in a hidden text field.
// Everything listens on the document, because the page redraws its parts.
(() => {
  // Stripes of three tones, of which some stand out from an image of any colour, and from each other.
  const STRIPES = [["#d9603a", 6], ["#1d1b22", 2], ["#ffffff", 2]];  // CSS pixels, along the x axis
  const FINE = 2;  // pixels of the pattern to a CSS pixel
  let drawing = false, erasing = false, last = null;
  const history = [];

  const canvas = () => document.querySelector("#source .brush canvas");
  const size = (target) => (document.querySelector("#brush-size")?.value ?? 12) / 100 * Math.min(target.width, target.height);

  const place = (event, target) => {
    const box = target.getBoundingClientRect();
    return [(event.clientX - box.left) * target.width / box.width, (event.clientY - box.top) * target.height / box.height];
  };

  // Slanted stripes, as wide on the screen whatever the size of the image.
  const colour = (target) => {
    const tile = document.createElement("canvas"), side = STRIPES.reduce((sum, [, width]) => sum + width, 0);
    const scale = target.width / (target.getBoundingClientRect().width || target.width);
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
    const paint = target.getContext("2d");
    paint.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    paint.strokeStyle = colour(target);
    paint.lineWidth = size(target);
    paint.lineCap = paint.lineJoin = "round";
    paint.beginPath();
    paint.moveTo(...from);
    paint.lineTo(to[0] + 0.01, to[1]);
    paint.stroke();
  };

  const remember = (target) => {
    history.push(target.getContext("2d").getImageData(0, 0, target.width, target.height));
    if (history.length > 30) history.shift();
  };

  // Edges of strokes are smooth on the screen; a mask is not: half covered counts as covered.
  const handOver = (target) => {
    const data = target.getContext("2d").getImageData(0, 0, target.width, target.height);
    let any = false;
    for (let i = 0; i < data.data.length; i += 4) {
      const on = data.data[i + 3] >= 128;
      any ||= on;
      data.data.fill(on ? 255 : 0, i, i + 3);
      data.data[i + 3] = 255;
    }
    const plain = document.createElement("canvas");
    [plain.width, plain.height] = [target.width, target.height];
    plain.getContext("2d").putImageData(data, 0, 0);
    const field = document.querySelector("#mask textarea, #mask input");
    field.value = any ? plain.toDataURL("image/png") : "";
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };

  // Mark the pixels for which `keep` holds; it is given their four bytes.
  const fill = (target, keep) => {
    const paint = target.getContext("2d"), data = paint.getImageData(0, 0, target.width, target.height);
    for (let i = 0; i < data.data.length; i += 4)
      data.data.fill(keep(data.data.subarray(i, i + 4)) ? 255 : 0, i, i + 4);
    paint.putImageData(data, 0, 0);
    paint.globalCompositeOperation = "source-in";
    paint.fillStyle = colour(target);
    paint.fillRect(0, 0, target.width, target.height);
  };

  const TOOLS = {
    draw: () => { erasing = false; },
    erase: () => { erasing = true; },
    undo: (target) => { if (history.length) target.getContext("2d").putImageData(history.pop(), 0, 0); },
    clear: (target) => { remember(target); fill(target, () => false); },
    invert: (target) => { remember(target); fill(target, (pixel) => pixel[3] < 128); },
  };

  document.addEventListener("pointerdown", (event) => {
    const target = event.target.closest?.("#source .brush canvas");
    if (!target || document.querySelector("#workspace")?.dataset.tab !== "inpaint") return;
    event.preventDefault();
    target.setPointerCapture(event.pointerId);
    remember(target);
    drawing = true;
    last = place(event, target);
    stroke(target, last, last);
  });
  document.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    const target = canvas(), here = place(event, target);
    stroke(target, last, here);
    last = here;
  });
  for (const kind of ["pointerup", "pointercancel"]) document.addEventListener(kind, () => {
    if (!drawing) return;
    drawing = false;
    handOver(canvas());
  });

  document.addEventListener("click", (event) => {
    const tool = event.target.closest?.("[data-tool]");
    if (!tool || !canvas()) return;
    TOOLS[tool.dataset.tool](canvas());
    if (tool.dataset.tool !== "draw" && tool.dataset.tool !== "erase") handOver(canvas());
    for (const one of document.querySelectorAll("[data-tool=draw], [data-tool=erase]"))
      one.setAttribute("aria-pressed", String((one.dataset.tool === "erase") === erasing));
  });

  // A mask that the server brings (settings of a picture) is drawn onto the canvas.
  new MutationObserver(() => {
    const target = canvas();
    if (!target || target.dataset.ready) return;
    target.dataset.ready = "1";
    history.length = 0;
    if (!target.dataset.mask) return;
    const mask = new Image();
    mask.onload = () => {
      target.getContext("2d").drawImage(mask, 0, 0);
      fill(target, (pixel) => pixel[0] >= 128);
    };
    mask.src = target.dataset.mask;
  }).observe(document, { childList: true, subtree: true });

  // Dropping a file onto the source, or onto an end of a clip, hands it to the button that chooses one there.
  const zone = (event) => event.target.closest?.("#source, #ends .end");
  document.addEventListener("dragover", (event) => { if (zone(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const input = zone(event)?.querySelector("input[type=file]");
    if (!input || !event.dataTransfer.files.length) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
})();
