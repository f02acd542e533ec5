// How the image under the brush is looked at: zoom by Ctrl and wheel, pinch, buttons or keys; pan; the brush's ring.
// The wheel alone changes the size of the brush.
(() => {
  const MOST = 16, STEP = 1.25;
  let scale = 1, left = 0, top = 0, pan = null, spaced = false;
  const touches = new Map();

  const brush = () => document.querySelector("#source .brush:not(.empty)");
  const tools = () => window.tesseraBrush;

  const apply = () => {
    const frame = brush();
    if (!frame) return;
    left = Math.min(0, Math.max(left, frame.clientWidth * (1 - scale)));
    top = Math.min(0, Math.max(top, frame.clientHeight * (1 - scale)));
    frame.querySelector(".zoom").style.transform = scale === 1 ? "" : `translate(${left}px, ${top}px) scale(${scale})`;
    frame.parentElement.classList.toggle("zoomed", scale > 1);
    const shown = document.querySelector("#brush-zoom");
    if (shown) shown.textContent = `${Math.round(scale * 100)} %`;
  };

  // Zoom so that what lies under a point of the screen stays there.
  const zoom = (factor, x, y) => {
    const frame = brush();
    if (!frame) return;
    const box = frame.getBoundingClientRect(), after = Math.min(Math.max(scale * factor, 1), MOST);
    const [dx, dy] = [(x ?? box.left + box.width / 2) - box.left, (y ?? box.top + box.height / 2) - box.top];
    left = dx - (dx - left) * after / scale;
    top = dy - (dy - top) * after / scale;
    scale = after;
    apply();
  };

  const reset = () => { [scale, left, top] = [1, 0, 0]; apply(); };

  const ring = (event) => {
    const frame = brush(), target = tools().canvas(), mark = frame?.querySelector(".ring");
    if (!mark) return;
    const inside = event.target === target && tools().isOpen() && event.pointerType !== "touch";
    mark.hidden = !inside;
    if (!inside) return;
    const box = frame.getBoundingClientRect(), across = target.getBoundingClientRect().width / target.width;
    const size = 2 * tools().radius(target) * across;
    Object.assign(mark.style, { width: `${size}px`, height: `${size}px`,
      left: `${event.clientX - box.left}px`, top: `${event.clientY - box.top}px` });
  };

  document.addEventListener("wheel", (event) => {
    if (!tools().isOpen() || !event.target.closest?.("#source .brush:not(.empty)")) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY / 300), event.clientX, event.clientY);
    else tools().resize(event.deltaY < 0 ? 1.12 : 0.88);
    ring(event);
  }, { passive: false });

  // Panning: the middle button, or the space bar held; with two fingers pinch and pan at once.
  const middle = () => {
    const points = [...touches.values()], [one, two] = points;
    return [(one[0] + two[0]) / 2, (one[1] + two[1]) / 2, Math.hypot(one[0] - two[0], one[1] - two[1])];
  };
  document.addEventListener("pointerdown", (event) => {
    const frame = event.target.closest?.("#source .brush:not(.empty)");
    if (!frame || !tools().isOpen()) return;
    if (event.pointerType === "touch") {
      touches.set(event.pointerId, [event.clientX, event.clientY]);
      if (touches.size === 2) { tools().giveUp(); frame.dataset.panning = "1"; pan = middle(); }
    } else if (event.button === 1 || (event.button === 0 && spaced)) {
      event.preventDefault();
      frame.dataset.panning = "1";
      pan = [event.clientX, event.clientY, 1];
    }
  }, true);
  document.addEventListener("pointermove", (event) => {
    if (!pan) return ring(event);
    if (touches.has(event.pointerId)) touches.set(event.pointerId, [event.clientX, event.clientY]);
    else if (event.pointerType === "touch") return;
    const now = touches.size === 2 ? middle() : [event.clientX, event.clientY, pan[2]];
    left += now[0] - pan[0];
    top += now[1] - pan[1];
    zoom(now[2] / pan[2], now[0], now[1]);
    pan = now;
  });
  for (const kind of ["pointerup", "pointercancel"]) document.addEventListener(kind, (event) => {
    touches.delete(event.pointerId);
    if (event.pointerType === "touch" && touches.size >= 2) return;
    pan = null;
    if (!touches.size) { delete brush()?.dataset.panning; if (spaced && brush()) brush().dataset.panning = "1"; }
  });

  const ZOOMS = { in: () => zoom(STEP), out: () => zoom(1 / STEP), fit: reset };
  document.addEventListener("click", (event) => ZOOMS[event.target.closest?.("[data-zoom]")?.dataset.zoom]?.());
  document.addEventListener("keydown", (event) => {
    if (!brush() || !tools().isOpen() || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target !== tools().canvas()) return;  // else the keys mean something where they are typed
    if (event.key === " ") { spaced = true; brush().dataset.panning = "1"; }
    else if (event.key === "+" || event.key === "=") ZOOMS.in();
    else if (event.key === "-") ZOOMS.out();
    else if (event.key === "0") ZOOMS.fit();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keyup", (event) => {
    if (event.key !== " " || !spaced) return;
    spaced = false;
    if (!pan) delete brush()?.dataset.panning;
  });
  document.addEventListener("tessera-source", reset);
})();
