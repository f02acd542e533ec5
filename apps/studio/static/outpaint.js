// Outpainting: the sides of the image are dragged outward; how far stands in four number fields, which lay it out too.
(() => {
  const SIDES = ["left", "top", "right", "bottom"], MOST = 200;  // percent, as the server takes it
  const grown = {};  // percent by side, as the fields say
  let drag = null;

  const frame = () => document.querySelector("#source .brush-frame");
  const field = (side) => document.querySelector(`#grow-${side} input`);
  const share = (side) => Math.min(Math.max(Number(grown[side]) || 0, 0), MOST);

  const layOut = (...percents) => {
    if (percents.length === SIDES.length) SIDES.forEach((side, i) => { grown[side] = percents[i]; });
    if (!frame()) return;
    for (const side of SIDES) frame().style.setProperty(`--grow-${side}`, share(side) / 100);
    frame().classList.toggle("grown", SIDES.some(share));
  };

  const write = (side, percent) => {
    const input = field(side);
    input.value = percent;
    for (const kind of ["input", "change", "blur"]) input.dispatchEvent(new Event(kind, { bubbles: true }));
  };

  const isAcross = (side) => side === "left" || side === "right";

  document.addEventListener("pointerdown", (event) => {
    const handle = event.target.closest?.("#source .handle");
    if (!handle || event.button !== 0) return;
    event.preventDefault();
    handle.setPointerCapture(event.pointerId);
    const side = handle.dataset.side, image = frame().querySelector(".view").getBoundingClientRect();
    drag = {
      side, handle, at: [event.clientX, event.clientY], from: share(side), now: share(side),
      length: isAcross(side) ? image.width : image.height,
      pixels: Number(frame().dataset[isAcross(side) ? "width" : "height"]),
    };
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const moved = isAcross(drag.side) ? event.clientX - drag.at[0] : event.clientY - drag.at[1];
    const outward = drag.side === "left" || drag.side === "top" ? -moved : moved;
    drag.now = Math.round(Math.min(Math.max(drag.from + 100 * outward / drag.length, 0), MOST));
    const ghost = frame().querySelector(".ghost");
    ghost.hidden = false;
    for (const side of SIDES) ghost.style[side] = "0";
    ghost.style[drag.side] = `${(drag.from - drag.now) / 100 * drag.length}px`;
    ghost.textContent = `${drag.now} % \u00b7 ${Math.round(drag.now / 100 * drag.pixels)} px`;
  });
  for (const kind of ["pointerup", "pointercancel"]) document.addEventListener(kind, () => {
    if (!drag) return;
    frame().querySelector(".ghost").hidden = true;
    if (kind === "pointerup" && drag.now !== drag.from) write(drag.side, drag.now);
    drag = null;
    layOut();
  });

  window.tesseraGrown = layOut;  // called when a field has changed, by hand or by the server
  document.addEventListener("tessera-source", () => layOut());
})();
